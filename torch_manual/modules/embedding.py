"""Embedding, with the gradients of torch_manual.functions.embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_manual.functions.embedding import embedding


class Embedding(torch.nn.Embedding):
    """torch.nn.Embedding with a hand-derived gradient (docs/derivations/embedding.md).

    sparse=True is refused with a ValueError on the first call: the gradient is dense.
    """

    def forward(self, input: Tensor) -> Tensor:
        return embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )
