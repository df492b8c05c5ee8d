"""Activations: the equations (docs/derivations/activation.md) and their autograd.Functions.

Sigmoid, tanh, ReLU, softmax and log-softmax save their output Y, GELU its input X. The forward
values are torch's own, so they equal torch.nn's bit for bit; the gradients are ours.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import _get_softmax_dim  # type: ignore[attr-defined]

from torch_manual.functions._function import refuse_complex

SQRT_2 = math.sqrt(2)
SQRT_2_PI = math.sqrt(2 * math.pi)
GELU_SCALE = math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715


def widen(x: Tensor) -> Tensor:
    """x in float32 if it is float16 or bfloat16, else x: rounding once, at the end, as stock does.

    Autograd itself casts a gradient back to the dtype of the tensor it belongs to.
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class SigmoidFunction(torch.autograd.Function):
    """B1  dX = dY ⊙ Y ⊙ (1 − Y)"""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor) -> Tensor:
        return torch.sigmoid(input)  # F1

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        y = widen(ctx.saved_tensors[0])
        return dy * y * (1 - y)  # B1


class TanhFunction(torch.autograd.Function):
    """B2  dX = dY ⊙ (1 − Y²)"""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor) -> Tensor:
        return torch.tanh(input)  # F2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        y = widen(ctx.saved_tensors[0])
        return dy * (1 - y * y)  # B2


class ReLUFunction(torch.autograd.Function):
    """B3  dX = dY where Y > 0, else 0. A NaN passes its gradient on, as in torch.nn."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor) -> Tensor:
        return torch.relu(input)  # F3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return dy.masked_fill(y <= 0, 0)  # B3


class GELUFunction(torch.autograd.Function):
    """B4  dX = dY ⊙ (Φ(X) + X ⊙ φ(X))
    B5  dX = dY ⊙ ½ (1 + t + X ⊙ (1 − t²) ⊙ u′),  u′ = √(2/π) (1 + 3·0.044715 X²)
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, approximate: str) -> Tensor:
        return F.gelu(input, approximate=approximate)  # F4, F5

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.approximate = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        x = widen(ctx.saved_tensors[0])
        if ctx.approximate == "none":
            cdf = 0.5 * (1 + torch.erf(x / SQRT_2))
            pdf = torch.exp(-0.5 * x * x) / SQRT_2_PI
            return dy * (cdf + x * pdf), None  # B4
        t = torch.tanh(GELU_SCALE * (x + GELU_CUBIC * x**3))
        du = GELU_SCALE * (1 + 3 * GELU_CUBIC * x * x)
        return dy * 0.5 * (1 + t + x * (1 - t * t) * du), None  # B5


class SoftmaxFunction(torch.autograd.Function):
    """B6  dX = Y ⊙ (dY − Σ_dim dY ⊙ Y)"""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, dim: int) -> Tensor:
        return torch.softmax(input, dim)  # F6

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.dim = inputs
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        y = widen(ctx.saved_tensors[0])
        return y * (dy - (dy * y).sum(ctx.dim, keepdim=True)), None  # B6


class LogSoftmaxFunction(torch.autograd.Function):
    """B7  dX = dY − exp(Y) ⊙ Σ_dim dY"""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, dim: int) -> Tensor:
        return torch.log_softmax(input, dim)  # F7

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.dim = inputs
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        y = widen(ctx.saved_tensors[0])
        return dy - torch.exp(y) * widen(dy).sum(ctx.dim, keepdim=True), None  # B7


def sigmoid(input: Tensor) -> Tensor:
    """F1  Y = 1 / (1 + exp(−X)), like torch.nn.functional.sigmoid.

    Shapes: any → the same. Saves: the output. Errors: TypeError for complex tensors.
    Source: equation (17) of the article; docs/derivations/activation.md.
    """
    refuse_complex("sigmoid", input)
    return SigmoidFunction.apply(input)


def tanh(input: Tensor) -> Tensor:
    """F2  Y = tanh(X), like torch.nn.functional.tanh.

    Shapes: any → the same. Saves: the output. Errors: TypeError for complex tensors.
    Source: equations (21)-(24) of the article; docs/derivations/activation.md.
    """
    refuse_complex("tanh", input)
    return TanhFunction.apply(input)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """F3  Y = max(X, 0), like torch.nn.functional.relu.

    Shapes: any → the same. Saves: the output.
    `inplace` writes the result into `input` and returns `input`, as stock does; the saved output
    is a tensor of its own, so it saves no memory and cannot be spoiled by a later write.
    Errors: stock's own, for an in-place write into a leaf that requires grad.
    Source: docs/derivations/activation.md.
    """
    result = ReLUFunction.apply(input)
    return input.copy_(result) if inplace else result


def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """F4  Y = X Φ(X), or, with `approximate="tanh"`,
    F5  Y = ½ X (1 + tanh u),  u = √(2/π) (X + 0.044715 X³); like torch.nn.functional.gelu.

    Shapes: any → the same. Saves: the input.
    Errors: stock's RuntimeError for another `approximate`.
    Source: Hendrycks and Gimpel (2016), arXiv:1606.08415; docs/derivations/activation.md.
    """
    return GELUFunction.apply(input, approximate)


def softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """F6  Y = exp(X) / Σ_dim exp(X), like torch.nn.functional.softmax.

    Shapes: any → the same. Saves: the output.
    Errors: stock's IndexError for a `dim` out of range; its warning where `dim` is None.
    Source: docs/derivations/activation.md.
    """
    if dim is None:
        dim = _get_softmax_dim("softmax", input.dim(), _stacklevel)
    return SoftmaxFunction.apply(input if dtype is None else input.to(dtype), dim)


def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """F7  Y = X − log Σ_dim exp(X), like torch.nn.functional.log_softmax.

    Shapes: any → the same. Saves: the output.
    Errors: stock's IndexError for a `dim` out of range; its warning where `dim` is None.
    Source: docs/derivations/activation.md.
    """
    if dim is None:
        dim = _get_softmax_dim("log_softmax", input.dim(), _stacklevel)
    return LogSoftmaxFunction.apply(input if dtype is None else input.to(dtype), dim)
