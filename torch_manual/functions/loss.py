"""Losses: the equations (docs/derivations/loss.md) and their autograd.Functions.

Dims: N rows, C classes, * any shape. Every loss is a loss ℓ per element or row and a reduction,

    F1  J = ℓ ("none"),  Σ ℓ ("sum")  or  Σ ℓ / n ("mean")
    B1  dℓ = dJ, dJ or dJ / n

and n is the number of ℓ, or the sum of the weights that count. Written below: p = softmax(X), σ the
sigmoid, x the input (predictions or logits), t the target, w the weight. The values are torch's
own, bit for bit; the gradients are ours.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn._reduction import legacy_get_string

from torch_manual.functions.activation import widen


class MSELossFunction(torch.autograd.Function):
    """F2  ℓ = w ⊙ (x − t)²

    B2  dx = 2 w ⊙ (x − t) ⊙ dℓ    B3  dt = −dx
    B4  dw = (x − t)² ⊙ dℓ, and under "mean", where n = Σ w, less J ⊙ dℓ
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
        return F.mse_loss(  # type: ignore[call-arg]  # F1, F2
            input, target, reduction=reduction, weight=weight
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.reduction = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dj: Tensor) -> tuple[Tensor | None, ...]:
        x, t, w = ctx.saved_tensors
        needs_dx, needs_dt, needs_dw, _ = ctx.needs_input_grad
        e = widen(x) - widen(t)
        n = 1
        if ctx.reduction == "mean":
            n = e.numel() if w is None else w.sum()
        dl = widen(dj) / n  # B1
        dx = dt = dw = None
        if needs_dx or needs_dt:
            de = 2 * e * dl if w is None else 2 * w * e * dl
            dx = de.sum_to_size(x.shape) if needs_dx else None  # B2
            dt = -de.sum_to_size(t.shape) if needs_dt else None  # B3
        if needs_dw:
            dw = (e * e * dl).sum_to_size(w.shape)  # B4
            if ctx.reduction == "mean":
                dw = dw - (w * e * e).sum() / n * dl
        return dx, dt, dw, None


class CrossEntropyLossFunction(torch.autograd.Function):
    """With label smoothing ε, and q the target as a distribution over the classes:

    F3  log p = log_softmax(x)    F4  q = (1 − ε) t + ε / C, where an index t stands for its one-hot
    F5  ℓ = −Σ_C w ⊙ q ⊙ log p, and 0 at an ignored index
    B5  a = w ⊙ q ⊙ dℓ, dℓ = 0 at an ignored index    B6  dx = p ⊙ Σ_C a − a
    B7  dt = −(1 − ε) w ⊙ log p ⊙ dℓ    B8  dw = −Σ_N q ⊙ log p ⊙ dℓ    (probabilities only)

    Under "mean" n is the number of rows, or, for indices, Σ w[t] over those not ignored.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
    ) -> Tensor:
        return F.cross_entropy(  # F1, F3, F4, F5
            input,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.ignore_index, ctx.reduction, smoothing = inputs
        ctx.label_smoothing = max(smoothing, 0.0)  # as in stock, which takes negative ones for none
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dj: Tensor) -> tuple[Tensor | None, ...]:
        x, target, weight = ctx.saved_tensors
        needs_dx, needs_dt, needs_dw, *_ = ctx.needs_input_grad
        smoothing = ctx.label_smoothing
        x = widen(x)
        dim = min(1, x.dim() - 1)
        C = x.shape[dim]
        row_shape = x.shape[:dim] + x.shape[dim + 1 :]
        per_class = (C,) + (1,) * (x.dim() - dim - 1)
        w = x.new_ones(per_class) if weight is None else weight.view(per_class)
        log_p = torch.log_softmax(x, dim)  # F3

        n: Tensor | int = 1
        if target.shape == x.shape:
            t = widen(target)
            counted = torch.ones(row_shape, dtype=torch.bool, device=x.device)
            if ctx.reduction == "mean":
                n = counted.numel()
        else:
            classes = torch.arange(C, device=x.device).view(per_class)
            t = (target.unsqueeze(dim) == classes).to(x.dtype)
            counted = target.long() != ctx.ignore_index  # which uint8 has not
            if ctx.reduction == "mean":
                n = (w * t * counted.unsqueeze(dim)).sum()
        q = (1 - smoothing) * t + smoothing / C  # F4
        dl = (widen(dj) / n).expand(row_shape)  # B1
        dl = dl.masked_fill(~counted, 0).unsqueeze(dim)

        dx = dt = dw = None
        if needs_dx:
            a = w * q * dl  # B5
            dx = torch.exp(log_p) * a.sum(dim, keepdim=True) - a  # B6
        if needs_dt:
            dt = -(1 - smoothing) * w * log_p * dl  # B7
        if needs_dw:
            dw = -(q * log_p * dl).sum_to_size(per_class).view(C)  # B8
        return dx, dt, dw, None, None, None


class BCEWithLogitsLossFunction(torch.autograd.Function):
    """With P the pos_weight, and log σ(x) = −log(1 + exp(−x)):

    F6  ℓ = w ⊙ [(1 − t) ⊙ x − (1 + (P − 1) t) ⊙ log σ(x)]
    B9  dx = w ⊙ [(1 − t) − (1 + (P − 1) t) ⊙ σ(−x)] ⊙ dℓ,  which is w ⊙ (σ(x) − t) ⊙ dℓ for P = 1
    B10 dt = −w ⊙ [x + (P − 1) ⊙ log σ(x)] ⊙ dℓ
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        pos_weight: Tensor | None,
        reduction: str,
    ) -> Tensor:
        return F.binary_cross_entropy_with_logits(  # F1, F6
            input, target, weight, pos_weight=pos_weight, reduction=reduction
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.reduction = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dj: Tensor) -> tuple[Tensor | None, ...]:
        x, t, w, pos_weight = ctx.saved_tensors
        needs_dx, needs_dt, *_ = ctx.needs_input_grad
        x, t = widen(x), widen(t)
        extra = 0 if pos_weight is None else pos_weight - 1
        dl = widen(dj) / (x.numel() if ctx.reduction == "mean" else 1)  # B1
        if w is not None:
            dl = w * dl
        dx = dt = None
        if needs_dx:
            dx = ((1 - t) - (1 + extra * t) * torch.sigmoid(-x)) * dl  # B9
        if needs_dt:
            dt = -(x + extra * F.logsigmoid(x)) * dl  # B10
        return dx, dt, None, None, None


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """F2  ℓ = w ⊙ (x − t)², like torch.nn.functional.mse_loss.

    Shapes: input (*), target (*) or broadcasting with it (stock's warning), weight as input → (*)
        or (). Saves: its tensors. Gradients for input, target and weight.
    Errors: stock's ValueError for another reduction or a weight of another size.
    Source: docs/derivations/loss.md.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_get_string(size_average, reduce)
    return MSELossFunction.apply(input, target, weight, reduction)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """F5  ℓ = −Σ_C w ⊙ q ⊙ log p (F3, F4), like torch.nn.functional.cross_entropy.

    Shapes: input (C), (N, C) or (N, C, d1, ...); target without C for class indices, as input for
        class probabilities; weight (C) → the target's shape without C, or ().
    Saves: its tensors. Gradients for input and, of probabilities, for target and weight.
        With "mean" and every index ignored the value is nan and the gradient 0, as in stock.
    Errors: stock's own; RuntimeError, as in stock, for a weight that requires grad beside indices.
    Source: docs/derivations/loss.md.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_get_string(size_average, reduce)
    if target.shape != input.shape:
        _refuse_grad("cross_entropy", weight=weight)
    return CrossEntropyLossFunction.apply(
        input, target, weight, ignore_index, reduction, label_smoothing
    )


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """F6  ℓ = w ⊙ [(1 − t) ⊙ x − (1 + (P − 1) t) ⊙ log σ(x)], like
    torch.nn.functional.binary_cross_entropy_with_logits.

    Shapes: input (*), target (*), weight and pos_weight broadcasting with it → (*) or ().
    Saves: its tensors. Gradients for input and target.
    Errors: stock's ValueError for a target of another size or another reduction; stock's
        RuntimeError for a weight or pos_weight that requires grad.
    Source: docs/derivations/loss.md.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_get_string(size_average, reduce)
    _refuse_grad("binary_cross_entropy_with_logits", weight=weight, pos_weight=pos_weight)
    return BCEWithLogitsLossFunction.apply(input, target, weight, pos_weight, reduction)


def _refuse_grad(function: str, **constants: Tensor | None) -> None:
    """Raise, as stock does, where a gradient would be asked of what has none."""
    for name, tensor in constants.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"The function '{function}' is not differentiable with respect to argument "
                f"'{name}'. This input cannot have requires_grad True."
            )
