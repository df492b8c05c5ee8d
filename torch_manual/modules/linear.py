"""Linear, with the gradients of torch_manual.functions.linear."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_manual.functions.linear import linear


class Linear(torch.nn.Linear):
    """torch.nn.Linear with hand-derived gradients (docs/derivations/linear.md)."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
