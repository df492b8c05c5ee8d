"""Layer normalization: the equations (docs/derivations/layer_norm.md) and the autograd.Function.

Dims: D the normalized_shape, the last dims of the input; * the dims before it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_manual.functions.activation import widen


class LayerNormFunction(torch.autograd.Function):
    """Y = x̂ ⊙ w + b. Saves the input, and takes μ, r and x̂ from it again (F1-F3).

    B1  dx̂ = dY ⊙ w    B2  dX = r (dx̂ − mean_D(dx̂) − x̂ ⊙ mean_D(dx̂ ⊙ x̂))
    B3  dw = Σ_* dY ⊙ x̂    B4  db = Σ_* dY
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor,
        normalized_shape: tuple[int, ...],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)  # F4

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.normalized_shape, weight, _, ctx.eps = inputs
        needs_dx, _, needs_dw, _, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_dx or needs_dw else None, weight if needs_dx else None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_dx, _, needs_dw, needs_db, _ = ctx.needs_input_grad
        dims = tuple(range(-len(ctx.normalized_shape), 0))
        dy = widen(dy)
        dx = dw = db = None
        if needs_dx or needs_dw:
            x = widen(x)
            centred = x - x.mean(dims, keepdim=True)
            var = (centred * centred).mean(dims, keepdim=True)  # F1
            r = torch.rsqrt(var + ctx.eps)  # F2
            x_hat = centred * r  # F3
        if needs_dx:
            dx_hat = dy if weight is None else dy * weight  # B1
            mean = dx_hat.mean(dims, keepdim=True)
            mean_x_hat = (dx_hat * x_hat).mean(dims, keepdim=True)
            dx = r * (dx_hat - mean - x_hat * mean_x_hat)  # B2
        if needs_dw:
            dw = (dy * x_hat).sum_to_size(ctx.normalized_shape)  # B3
        if needs_db:
            db = dy.sum_to_size(ctx.normalized_shape)  # B4
        return dx, None, dw, db, None


def layer_norm(
    input: Tensor,
    normalized_shape: list[int] | tuple[int, ...] | torch.Size,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Like torch.nn.functional.layer_norm. With the mean and variance over D:

    F1  μ = mean_D(X), v = mean_D((X − μ)²)    F2  r = 1/√(v + eps)
    F3  x̂ = (X − μ) r    F4  Y = x̂ ⊙ w + b

    Shapes: input (*, D), normalized_shape D, weight D, bias D → (*, D).
    Saves: input if dX or dw is wanted, weight if dX is wanted.
    Errors: stock's RuntimeError for shapes that do not fit.
    Source: Ba, Kiros and Hinton (2016), arXiv:1607.06450; docs/derivations/layer_norm.md.
    """
    return LayerNormFunction.apply(input, tuple(normalized_shape), weight, bias, eps)
