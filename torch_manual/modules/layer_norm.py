"""LayerNorm, with the gradients of torch_manual.functions.layer_norm."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_manual.functions.layer_norm import layer_norm


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm with hand-derived gradients (docs/derivations/layer_norm.md)."""

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
