"""Linear layer: the equations (docs/derivations/linear.md) and the autograd.Function.

Dims: I in_features, O out_features, * any leading dims.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_manual.functions._autocast import autocast_cast
from torch_manual.functions._function import refuse_complex


class LinearFunction(torch.autograd.Function):
    """Y = X Wᵀ + b, saving only what the requested gradients read.

    B1  dX = dY W    B2  dW = Σ_* dYᵀ X    B3  db = Σ_* dY
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(input, weight, bias)  # F1

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias = inputs
        needs_dx, needs_dw, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_dw else None, weight if needs_dx else None)
        ctx.bias_shape = None if bias is None else bias.shape

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad
        dx = dy @ weight if needs_dx else None  # B1
        dw = rows(dy).mT @ rows(x) if needs_dw else None  # B2
        db = dy.sum_to_size(ctx.bias_shape) if needs_db else None  # B3
        return dx, dw, db


def rows(x: Tensor) -> Tensor:
    """x as a matrix: its leading dims made one, so that Σ_* is a matrix product."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F1  Y = X Wᵀ + b, like torch.nn.functional.linear.

    Shapes: input (*, I), weight (O, I), bias (O,) → (*, O); or weight (I,), bias () → (*,).
    Saves: input if dW is wanted, weight if dX is wanted; the bias never.
    Under autocast the three are cast to its dtype, and gradients return in their own.
    Errors: stock's own, from the matrix product; TypeError for complex tensors.
    Source: equations (18)-(20) of the article; docs/derivations/linear.md.
    """
    refuse_complex("linear", input, weight)
    input, weight, bias = autocast_cast(input, weight, bias)
    if weight.dim() == 1 and (bias is None or bias.dim() == 0):
        of_one = None if bias is None else bias.unsqueeze(0)
        return LinearFunction.apply(input, weight.unsqueeze(0), of_one).squeeze(-1)
    return LinearFunction.apply(input, weight, bias)
