"""Dropout: the equations (docs/derivations/dropout.md) and the autograd.Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class DropoutFunction(torch.autograd.Function):
    """Y = X ⊙ m for a drawn noise m.    B1  dX = dY ⊙ m"""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, noise: Tensor) -> Tensor:
        return input * noise  # F2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, noise = inputs
        ctx.save_for_backward(noise)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (noise,) = ctx.saved_tensors
        return dy * noise, None  # B1


def draw_noise(input: Tensor, p: float) -> Tensor:
    """F1  m = 0 with probability p, else 1 / (1 − p), in stock's own way of drawing it.

    On CUDA stock runs one fused kernel with its own random offsets, so the mask is taken from it.
    """
    if p == 1:
        return input.new_zeros(())
    if input.is_cuda:
        _, kept = torch.native_dropout(input.detach(), p, True)
        return kept.to(input.dtype) * (1 / (1 - p))
    return torch.empty_like(input).bernoulli_(1 - p).div_(1 - p)  # F1


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """F2  Y = X ⊙ m, like torch.nn.functional.dropout and with the same numbers for a seed.

    Shapes: any → the same. Saves: the noise. Returns `input` itself where nothing can be dropped
        (p = 0, not training, no elements), and draws nothing then, nor for p = 1.
    Errors: stock's ValueError for p outside [0, 1].
    Source: Srivastava et al., JMLR 15 (2014); docs/derivations/dropout.md.
    """
    if p < 0.0 or p > 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if p == 0 or not training or input.numel() == 0:
        return input
    result = DropoutFunction.apply(input, draw_noise(input, p))
    return input.copy_(result) if inplace else result
