"""Embedding: the equations (docs/derivations/embedding.md) and the autograd.Function.

Dims: V num_embeddings, D embedding_dim, * the shape of the indices.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_manual.functions._function import refuse_complex
from torch_manual.functions.activation import widen


class EmbeddingFunction(torch.autograd.Function):
    """Y_n = W[k_n]. Every row of W collects the gradients of the places it was copied to.

    B1  dY_n = 0 where k_n = padding_idx    B2  dY_n = dY_n / count(k_n), if scale_grad_by_freq
    B3  dW[k] = Σ_{n : k_n = k} dY_n
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        indices: Tensor, weight: Tensor, padding_idx: int | None, scale_grad_by_freq: bool
    ) -> Tensor:
        return F.embedding(indices, weight)  # F1

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        indices, weight, ctx.padding_idx, ctx.scale_grad_by_freq = inputs
        ctx.weight_shape = weight.shape
        ctx.save_for_backward(indices)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        indices = ctx.saved_tensors[0].reshape(-1)
        V, D = ctx.weight_shape
        dy = widen(dy).reshape(indices.numel(), D)
        if ctx.padding_idx is not None:
            dy = dy.masked_fill((indices == ctx.padding_idx).unsqueeze(-1), 0)  # B1
        if ctx.scale_grad_by_freq:
            counts = dy.new_zeros(V).index_add(0, indices, dy.new_ones(indices.numel()))
            dy = dy / counts[indices].unsqueeze(-1)  # B2
        dw = dy.new_zeros(V, D).index_add(0, indices, dy)  # B3
        return None, dw, None, None


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """F1  Y_n = W[k_n], like torch.nn.functional.embedding.

    Shapes: input (*) of int64 or int32, weight (V, D) → (*, D).
    Saves: the indices. `max_norm` first renormalizes the rows looked up, in place and outside the
        gradient, as stock does.
    Errors: ValueError for sparse=True (the gradient is dense); stock's AssertionError for a
        padding_idx out of range, IndexError for an index out of range; TypeError for complex
        weights.
    Source: docs/derivations/embedding.md.
    """
    refuse_complex("embedding", weight)
    if sparse:
        raise ValueError(f"embedding: sparse must be False (gradients are dense), got {sparse}")
    if padding_idx is not None:
        if not -weight.size(0) <= padding_idx < weight.size(0):
            raise AssertionError("Padding_idx must be within num_embeddings")
        padding_idx %= weight.size(0)
    if max_norm is not None:
        with torch.no_grad():
            torch.embedding_renorm_(weight, input.contiguous(), max_norm, norm_type)
    return EmbeddingFunction.apply(input, weight, padding_idx, scale_grad_by_freq)
