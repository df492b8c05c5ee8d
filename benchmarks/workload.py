"""A case made into layers and inputs. What is checked, what is timed and what is weighed is one
and the same: `Side.step`."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import torch_manual
from benchmarks.cases import Case, Pass

reference = importlib.import_module("tests.reference")  # untyped: mypy is not to follow it


class Side:
    """A layer and its inputs. The same case gives every side the same weights and inputs.

    A step alone (T = 1) starts from states, as it does in use; a sequence starts from zeros.
    """

    def __init__(self, case: Case, module: nn.Module, dtype: torch.dtype) -> None:
        self.module = module.to(dtype)
        self.packed = case.packed
        generator = torch.Generator().manual_seed(1)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(dtype)

        x = draw(case.T, case.B, case.I)
        if case.cell and case.T == 1:
            x = x[0]
        self.batch_sizes = None
        if case.packed:
            x, self.batch_sizes, _, _ = pack_padded_sequence(x, case.lengths())
        layers = () if case.cell else (case.layers * (2 if case.bidirectional else 1),)
        self.states: tuple[Tensor, ...] = ()
        if case.T == 1:
            self.states = (draw(*layers, case.B, case.P), draw(*layers, case.B, case.H))
        self.x = x
        self.weights = list(module.parameters())
        self.leaves = [self.x, *self.states, *self.weights]
        for leaf in self.leaves:
            leaf.requires_grad_()
        self.names = ["h", "c"] if case.cell else ["y", "h_n", "c_n"]
        self.names += ["dx", "dh_0", "dc_0"][: 1 + len(self.states)]
        self.names += [f"d{name}" for name, _ in module.named_parameters()]
        self.output_grads = [draw(*output.shape) for output in self.inference()]

    def step(self, pass_: Pass) -> list[Tensor]:
        """Return the outputs, and in training the gradients of inputs, states and weights."""
        return self.inference() if pass_ == "inference" else self.training()

    def inference(self) -> list[Tensor]:
        with torch.no_grad():
            return self._forward()

    def training(self) -> list[Tensor]:
        outputs = self._forward()
        return outputs + list(torch.autograd.grad(outputs, self.leaves, self.output_grads))

    def renew_weights(self) -> None:
        """Write the weights anew, so that no packed copy of them outlives a training step."""
        with torch.no_grad():
            for weight in self.weights:
                weight.mul_(1.0)

    def _forward(self) -> list[Tensor]:
        x = PackedSequence(self.x, self.batch_sizes) if self.packed else self.x
        first, second = self.module(x, self.states or None)
        if isinstance(first, PackedSequence):
            first = first.data
        return [first, *second] if isinstance(second, tuple) else [first, second]


def side(case: Case, which: str) -> Side:
    """Return one side of a case: `"stock"`, `"ours"` or, in float64, the `"reference"`.

    `"plain"` is the reference's layer in the case's own dtype: stock, where stock has the layer.
    """
    dtype = torch.float64 if which == "reference" else getattr(torch, case.dtype)
    torch.manual_seed(0)
    return Side(case, _module(case, which), dtype)


def _module(case: Case, which: str) -> nn.Module:
    cell: Any
    if case.cell:
        cell = torch_manual.LSTMCell if which == "ours" else nn.LSTMCell
        return cell(case.I, case.H) if case.T == 1 else Loop(cell(case.I, case.H))
    options: dict[str, Any] = {}
    if case.peephole and which != "stock":
        options["peephole"] = case.peephole
        cell = torch_manual.PeepholeLSTM if which == "ours" else SteppedPeephole
    elif which == "ours" or case.against_ours:
        cell = torch_manual.LSTM
        options["recompute"] = case.recompute if which == "ours" else None
    else:
        cell = nn.LSTM
    return cell(
        case.I,
        case.H,
        case.layers,
        bidirectional=case.bidirectional,
        proj_size=case.proj_size,
        **options,
    )


class Loop(nn.Module):
    """A cell in a loop over the steps of its input."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        for x in input:
            hx = self.cell(x, hx)
        return hx


class SteppedPeephole(torch_manual.PeepholeLSTM):
    """The peephole LSTM step by step under autograd, as the tests' reference has it."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        zeros = input.new_zeros(1, input.shape[1], self.hidden_size)
        y, h_n, c_n, _ = reference.lstm(input, zeros, zeros, dict(self.named_parameters()))
        return y, (h_n, c_n)
