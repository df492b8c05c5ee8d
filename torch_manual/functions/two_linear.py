"""The article's toy layer, x W V: equations (8)-(10) (docs/derivations/two_linear.md).

Dims: I in_features, H hidden_features, O out_features, * any leading dims; row vectors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_manual.functions._autocast import autocast_cast
from torch_manual.functions._function import refuse_complex
from torch_manual.functions.linear import rows


class TwoLinearFunction(torch.autograd.Function):
    """Y = X W V. With z = ∂J/∂Y, the article's three derivative functions:

    B1  dX = z Vᵀ Wᵀ (8)    B2  dW = Xᵀ z Vᵀ (9)    B3  dV = (X W)ᵀ z (10)
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight_w: Tensor, weight_v: Tensor) -> Tensor:
        return input @ weight_w @ weight_v  # F1

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, v = inputs
        needs_dx, needs_dw, needs_dv = ctx.needs_input_grad
        ctx.save_for_backward(
            x if needs_dw or needs_dv else None,
            w if needs_dx or needs_dv else None,
            v if needs_dx or needs_dw else None,
        )

    @staticmethod
    def backward(ctx: Any, z: Tensor) -> tuple[Tensor | None, ...]:
        x, w, v = ctx.saved_tensors
        needs_dx, needs_dw, needs_dv = ctx.needs_input_grad
        dx = dw = dv = None
        if needs_dx or needs_dw:
            zv = z @ v.mT
            dx = zv @ w.mT if needs_dx else None  # B1
            dw = rows(x).mT @ rows(zv) if needs_dw else None  # B2
        if needs_dv:
            dv = rows(x @ w).mT @ rows(z)  # B3
        return dx, dw, dv


def two_linear(input: Tensor, weight_w: Tensor, weight_v: Tensor) -> Tensor:
    """F1  Y = X W V.

    Shapes: input (*, I), weight_w (I, H), weight_v (H, O) → (*, O).
    Saves: of input, weight_w and weight_v those that the wanted gradients read. The product X W
        is taken again in the backward pass: a saved intermediate could not be differentiated.
    Errors: ValueError if the weights are not two matrices that fit the input and each other;
        TypeError for complex tensors.
    Source: equations (6)-(10) of the article; docs/derivations/two_linear.md.
    """
    features = input.shape[-1] if input.dim() else None
    if weight_w.dim() != 2 or weight_w.shape[0] != features:
        raise ValueError(
            f"two_linear: weight_w must be (I, H) = ({features}, H), got {tuple(weight_w.shape)}"
        )
    if weight_v.dim() != 2 or weight_v.shape[0] != weight_w.shape[1]:
        raise ValueError(
            f"two_linear: weight_v must be (H, O) = ({weight_w.shape[1]}, O), "
            f"got {tuple(weight_v.shape)}"
        )
    refuse_complex("two_linear", input, weight_w, weight_v)
    return TwoLinearFunction.apply(*autocast_cast(input, weight_w, weight_v))
