"""Activations, with the gradients of torch_manual.functions.activation."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_manual.functions.activation import gelu, log_softmax, relu, sigmoid, softmax, tanh

# The warning about a missing `dim` points at the caller of the module, this many frames up.
_STACKLEVEL = 5


class Sigmoid(torch.nn.Sigmoid):
    """torch.nn.Sigmoid with a hand-derived gradient (docs/derivations/activation.md)."""

    def forward(self, input: Tensor) -> Tensor:
        return sigmoid(input)


class Tanh(torch.nn.Tanh):
    """torch.nn.Tanh with a hand-derived gradient (docs/derivations/activation.md)."""

    def forward(self, input: Tensor) -> Tensor:
        return tanh(input)


class ReLU(torch.nn.ReLU):
    """torch.nn.ReLU with a hand-derived gradient (docs/derivations/activation.md)."""

    def forward(self, input: Tensor) -> Tensor:
        return relu(input, self.inplace)


class GELU(torch.nn.GELU):
    """torch.nn.GELU with a hand-derived gradient (docs/derivations/activation.md)."""

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, approximate=self.approximate)


class Softmax(torch.nn.Softmax):
    """torch.nn.Softmax with a hand-derived gradient (docs/derivations/activation.md)."""

    def forward(self, input: Tensor) -> Tensor:
        return softmax(input, self.dim, _stacklevel=_STACKLEVEL)


class LogSoftmax(torch.nn.LogSoftmax):
    """torch.nn.LogSoftmax with a hand-derived gradient (docs/derivations/activation.md)."""

    def forward(self, input: Tensor) -> Tensor:
        return log_softmax(input, self.dim, _stacklevel=_STACKLEVEL)
