"""Losses, with the gradients of torch_manual.functions.loss."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_manual.functions.loss import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    mse_loss,
)


class MSELoss(torch.nn.MSELoss):
    """torch.nn.MSELoss with hand-derived gradients (docs/derivations/loss.md)."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return mse_loss(input, target, reduction=self.reduction)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss with hand-derived gradients (docs/derivations/loss.md)."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    """torch.nn.BCEWithLogitsLoss with hand-derived gradients (docs/derivations/loss.md)."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(
            input, target, self.weight, pos_weight=self.pos_weight, reduction=self.reduction
        )
