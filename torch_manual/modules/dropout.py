"""Dropout, with the gradient of torch_manual.functions.dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_manual.functions.dropout import dropout


class Dropout(torch.nn.Dropout):
    """torch.nn.Dropout with a hand-derived gradient (docs/derivations/dropout.md)."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training, self.inplace)
