"""What is tested: one `Case` per recurrent layer, and the samples every layer is tried on."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

import reference
import torch_manual


@dataclass(frozen=True)
class Sample:
    """A shape: T steps, B sequences, I inputs, H hidden units; the layer's other arguments."""

    id: str
    T: int
    B: int
    I: int
    H: int
    kwargs: dict = field(default_factory=dict)
    lengths: tuple[int, ...] | None = None
    scale: float = 1.0

    @property
    def D(self) -> int:
        return 2 if self.kwargs.get("bidirectional") else 1

    @property
    def P(self) -> int:
        return self.kwargs.get("proj_size") or self.H

    @property
    def layers(self) -> int:
        return self.kwargs.get("num_layers", 1)

    def inputs(self, dtype=torch.float64, seed=0) -> list[torch.Tensor]:
        """x, h0, c0, each a leaf that requires grad."""
        gen = torch.Generator().manual_seed(seed)
        n = self.layers * self.D
        shapes = (self.T, self.B, self.I), (n, self.B, self.P), (n, self.B, self.H)
        return [
            (torch.randn(s, generator=gen, dtype=torch.float64) * self.scale)
            .to(dtype)
            .requires_grad_()
            for s in shapes
        ]


TWO = {"num_layers": 2, "bidirectional": True}
SAMPLES = [
    Sample("T1-B1-I1-H1", 1, 1, 1, 1),
    Sample("T3-B2-I5-H7", 3, 2, 5, 7),
    Sample("no-bias", 3, 3, 2, 5, {"bias": False}),
    Sample("reverse", 4, 2, 3, 5, {"bidirectional": True}),
    Sample("proj", 4, 3, 3, 5, {"proj_size": 2}),
    Sample("two-layers-reverse-proj", 3, 2, 3, 4, {**TWO, "proj_size": 3}),
    Sample("saturated", 3, 2, 3, 4, scale=30.0),
    Sample("packed", 5, 4, 3, 5, lengths=(3, 5, 1, 3)),
    Sample("packed-reverse-proj", 4, 3, 2, 4, {"bidirectional": True, "proj_size": 3}, (2, 4, 1)),
    Sample("packed-two-layers", 4, 3, 2, 3, TWO, (4, 4, 2)),
]


@dataclass(frozen=True)
class Case:
    """A layer: its class, torch.nn's (None where there is none) and the reference equations."""

    name: str
    module: Callable[..., nn.Module]
    stock: type[nn.Module] | None
    reference: Callable
    samples: list[Sample]
    kwargs: dict = field(default_factory=dict)

    def build(self, sample: Sample, dtype=torch.float64, seed=1, **kwargs) -> nn.Module:
        torch.manual_seed(seed)
        return self.module(
            sample.I, sample.H, dtype=dtype, **self.kwargs, **sample.kwargs, **kwargs
        )


CASES = [
    Case("lstm", torch_manual.LSTM, nn.LSTM, reference.lstm, SAMPLES),
    Case(
        "peephole-diagonal",
        torch_manual.PeepholeLSTM,
        None,
        reference.lstm,
        SAMPLES,
        {"peephole": "diagonal"},
    ),
    Case(
        "peephole-full",
        torch_manual.PeepholeLSTM,
        None,
        reference.lstm,
        SAMPLES,
        {"peephole": "full"},
    ),
]

CASE_SAMPLES = [(case, sample) for case in CASES for sample in case.samples]
IDS = [f"{case.name}-{sample.id}" for case, sample in CASE_SAMPLES]


def run(module, sample, x, h0, c0):
    """The outputs of a layer as padded tensors: y, h_n, c_n and, where it returns them, cells."""
    if sample.lengths is None:
        y, (h_n, c_n), *cells = module(x, (h0, c0))
        return y, h_n, c_n, *cells
    packed = nn.utils.rnn.pack_padded_sequence(x, sample.lengths, enforce_sorted=False)
    y, (h_n, c_n), *cells = module(packed, (h0, c0))
    y, *cells = (nn.utils.rnn.pad_packed_sequence(p)[0] for p in (y, *cells))
    return y, h_n, c_n, *cells


def run_reference(case, sample, params, x, h0, c0):
    return case.reference(x, h0, c0, params, sample.layers, sample.D == 2, sample.lengths)


def cotangents(outputs, seed=7):
    """Fixed random weights for every output, so that no gradient can hide."""
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=gen, dtype=torch.float64).to(t.dtype) for t in outputs]


def gradients(outputs, inputs, weights):
    return torch.autograd.grad(outputs, inputs, weights, allow_unused=True)
