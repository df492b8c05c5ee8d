"""What `python -m torch_manual check` tries: every layer, small, beside its stock counterpart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import torch_manual

T, B, I, H = 4, 2, 3, 4


@dataclass(frozen=True)
class CheckCase:
    """One layer: its name here, the arguments of its constructor and of its forward."""

    layer: str
    args: tuple[Any, ...]
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def label(self) -> str:
        named = [f"{name}={value!r}" for name, value in self.kwargs.items()]
        return f"{self.layer}({', '.join([*map(str, self.args), *named])}) {self.note}".rstrip()

    def build(self) -> nn.Module:
        """The layer with random parameters: a weight of ones would hide a forgotten factor."""
        layer = getattr(torch_manual, self.layer)(*self.args, **self.kwargs).double()
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.5)
        return layer

    def build_stock(self, ours: nn.Module) -> nn.Module:
        """The stock layer with the weights of ours; peepholes, which it has not, are left out."""
        if self.layer == "TwoLinear":
            return _TwoMatmuls(ours)
        name = self.layer.removeprefix("Peephole")
        kwargs = {key: value for key, value in self.kwargs.items() if key != "peephole"}
        stock = getattr(nn, name)(*self.args, **kwargs).double()
        weights = ours.state_dict()
        stock.load_state_dict({key: weights[key] for key in stock.state_dict()})
        return stock


class _TwoMatmuls(nn.Module):
    """X W V in plain torch, for lack of a stock layer that does it."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        for name, weight in ours.named_parameters():
            self.register_parameter(name, nn.Parameter(weight.detach().clone()))

    def forward(self, input: Tensor) -> Tensor:
        w, v = self.parameters()
        return input @ w @ v


def check_cases() -> list[CheckCase]:
    """All cases, with the same inputs every time."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, two_d = randn(B, T, I), randn(5, I)
    sequence = randn(T, B, I)
    packed = pack_padded_sequence(sequence, torch.tensor([2, T]), enforce_sorted=False)
    probabilities = randn(5, I).softmax(dim=1)
    classes = torch.tensor([0, 2, 1, 1, 0])

    def states(count: int = 1, width: int = H) -> tuple[Tensor, Tensor]:
        return randn(count, B, width), randn(count, B, H)

    return [
        CheckCase("Linear", (I, H), (x,)),
        CheckCase("Linear", (I, H), (x,), {"bias": False}),
        CheckCase("TwoLinear", (I, H, 2), (x,)),
        CheckCase("Sigmoid", (), (x,)),
        CheckCase("Tanh", (), (x,)),
        CheckCase("ReLU", (), (x,)),
        CheckCase("GELU", (), (x,)),
        CheckCase("GELU", (), (x,), {"approximate": "tanh"}),
        CheckCase("Softmax", (), (x,), {"dim": 1}),
        CheckCase("LogSoftmax", (), (x,), {"dim": 1}),
        CheckCase("Embedding", (6, I), (torch.tensor([[1, 2, 2], [0, 5, 1]]),)),
        CheckCase("LayerNorm", (I,), (x,)),
        CheckCase("Dropout", (0.4,), (x,)),
        CheckCase("MSELoss", (), (two_d, randn(5, I))),
        CheckCase("CrossEntropyLoss", (), (two_d, classes)),
        CheckCase("CrossEntropyLoss", (), (two_d, classes), {"label_smoothing": 0.1}),
        CheckCase("CrossEntropyLoss", (), (two_d, probabilities), note="probabilities"),
        CheckCase("BCEWithLogitsLoss", (), (two_d, probabilities)),
        CheckCase("LSTMCell", (I, H), (randn(B, I), (randn(B, H), randn(B, H)))),
        CheckCase("LSTM", (I, H), (sequence, states())),
        CheckCase("LSTM", (I, H), (sequence,), {"num_layers": 2, "bidirectional": True}),
        CheckCase("LSTM", (I, H), (sequence, states(width=2)), {"proj_size": 2}),
        CheckCase("LSTM", (I, H), (sequence, states()), {"bias": False}),
        CheckCase("LSTM", (I, H), (packed, states()), note="packed"),
        *(
            case
            for peephole in ("diagonal", "full")
            for case in (
                CheckCase(
                    "PeepholeLSTMCell",
                    (I, H),
                    (randn(B, I), (randn(B, H), randn(B, H))),
                    {"peephole": peephole},
                ),
                CheckCase("PeepholeLSTM", (I, H), (sequence, states()), {"peephole": peephole}),
            )
        ),
    ]
