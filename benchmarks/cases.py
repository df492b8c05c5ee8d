"""What is timed, one row a case, and what is asked of each group of rows.

Dims: T steps, B batch, I input, H hidden, P = proj_size or H.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

Pass = Literal["inference", "training"]
PASSES: tuple[Pass, ...] = ("inference", "training")


@dataclass(frozen=True)
class Case:
    kind: str
    T: int
    B: int
    I: int
    H: int
    proj_size: int = 0
    layers: int = 1
    bidirectional: bool = False
    dtype: str = "float32"
    packed: bool = False  # lengths from a long-tailed distribution, T the longest
    cell: bool = False  # in a loop over T steps
    peephole: str = ""
    recompute: int | None = None
    against_ours: bool = False  # stock has no such layer: our plain LSTM takes its place

    @property
    def P(self) -> int:
        return self.proj_size or self.H

    @property
    def label(self) -> str:
        proj = f" P{self.P}" if self.proj_size else ""
        return f"{self.kind} T{self.T} B{self.B} I{self.I} H{self.H}{proj}"

    def lengths(self) -> torch.Tensor:
        """Return the lengths of the B sequences, longest first."""
        if not self.packed:
            return torch.full((self.B,), self.T)
        normal = torch.randn(self.B, generator=torch.Generator().manual_seed(0))
        lengths = (self.T / 16 * normal.exp()).long().clamp(1, self.T)
        lengths[0] = self.T
        return lengths.sort(descending=True).values

    def flops(self, pass_: Pass) -> float:
        """Return the operations of the matrix products; a backward pass has twice a forward's."""
        H, P, D = self.H, self.P, 2 if self.bidirectional else 1
        step = 0
        for layer in range(self.layers):
            step += D * 4 * H * ((self.I if layer == 0 else D * P) + P)
        if self.proj_size:
            step += self.layers * D * H * P
        if self.peephole == "full":
            step += self.layers * D * 3 * H * H
        forward = 2.0 * step * int(self.lengths().sum())
        return forward if pass_ == "inference" else 3 * forward


CASES = (
    Case("dense", 128, 16, 64, 64),
    Case("dense", 128, 1, 64, 64),
    Case("dense", 128, 32, 128, 128),
    Case("dense", 128, 32, 256, 256),
    Case("dense", 512, 8, 256, 256),
    Case("dense", 100, 64, 512, 512),
    Case("dense", 50, 64, 1024, 1024),
    Case("dense", 1000, 1, 32, 32),
    Case("dense", 64, 20, 100, 200),
    Case("dense", 256, 4, 40, 96),
    Case("dense", 35, 20, 650, 650),
    Case("dense", 50, 128, 64, 32),
    Case("dense", 200, 3, 17, 33),
    Case("2 layers", 128, 32, 128, 128, layers=2),
    Case("2 layers", 35, 20, 200, 200, layers=2),
    Case("bidirectional", 128, 32, 128, 128, bidirectional=True),
    Case("bidirectional", 100, 1, 64, 64, bidirectional=True),
    Case("bidirectional", 60, 16, 300, 256, bidirectional=True),
    Case("2 layers bidirectional", 128, 16, 128, 128, layers=2, bidirectional=True),
    Case("2 layers bidirectional", 50, 5, 40, 100, layers=2, bidirectional=True),
    Case("packed", 100, 32, 128, 128, packed=True),
    Case("packed", 1000, 8, 64, 64, packed=True),
    Case("packed", 4000, 8, 32, 32, packed=True),
    Case("proj_size", 128, 32, 128, 256, proj_size=128),
    Case("proj_size", 100, 8, 64, 128, proj_size=32),
    Case("float64", 128, 16, 64, 64, dtype="float64"),
    Case("float64", 50, 8, 256, 256, dtype="float64"),
    Case("step", 1, 1, 128, 128),
    Case("step", 1, 1, 32, 32),
    Case("step", 1, 8, 256, 256),
    Case("step", 1, 16, 300, 300),
    Case("step", 1, 64, 512, 512),
    Case("step", 1, 1, 1024, 1024),
    Case("LSTMCell", 1, 1, 128, 128, cell=True),
    Case("LSTMCell", 1, 1, 32, 32, cell=True),
    Case("LSTMCell", 1, 8, 256, 256, cell=True),
    Case("LSTMCell", 1, 16, 300, 300, cell=True),
    Case("LSTMCell", 1, 64, 512, 512, cell=True),
    Case("LSTMCell loop", 20, 1, 128, 128, cell=True),
    Case("LSTMCell loop", 20, 8, 64, 64, cell=True),
    Case("LSTMCell loop", 20, 16, 300, 300, cell=True),
    Case("LSTMCell loop", 20, 64, 512, 512, cell=True),
    Case("diagonal peephole", 128, 16, 64, 64, peephole="diagonal"),
    Case("diagonal peephole", 128, 32, 256, 256, peephole="diagonal"),
    Case("diagonal peephole vs ours", 128, 16, 64, 64, peephole="diagonal", against_ours=True),
    Case("diagonal peephole vs ours", 128, 32, 256, 256, peephole="diagonal", against_ours=True),
    Case("full peephole", 128, 16, 64, 64, peephole="full"),
    Case("full peephole", 128, 32, 256, 256, peephole="full"),
    Case("full peephole vs ours", 128, 16, 64, 64, peephole="full", against_ours=True),
    Case("full peephole vs ours", 128, 32, 256, 256, peephole="full", against_ours=True),
    Case("recompute=50 vs ours", 2000, 8, 128, 128, recompute=50, against_ours=True),
    Case("recompute=100 vs ours", 4000, 8, 64, 64, recompute=100, against_ours=True),
    Case("recompute=100 vs ours", 500, 32, 256, 256, recompute=100, against_ours=True),
)
QUICK_KINDS = ("dense", "bidirectional", "packed", "step")


class Target(NamedTuple):
    minimum: float
    mean: float | None


TARGETS = {
    "training, dense float32": Target(1.10, 1.5),
    "inference, dense float32": Target(1.00, 1.6),
    "training, two layers or bidirectional": Target(1.2, 1.5),
    "training, packed, proj_size or float64": Target(1.6, 4.0),
    "one-step inference": Target(1.2, 2.0),
    "diagonal peephole, at most 1.15 × our LSTM's time": Target(1 / 1.15, None),
    "full peephole, at most 1.6 × our LSTM's time": Target(1 / 1.6, None),
    "recompute, at most 1.5 × our LSTM's time": Target(1 / 1.5, None),
}


def group(case: Case, pass_: Pass) -> str:
    """Return the target a row counts for, or nothing."""
    if case.peephole:
        named = (name for name in TARGETS if name.startswith(f"{case.peephole} peephole"))
        return next(named) if case.against_ours else ""
    if case.recompute:
        return "recompute, at most 1.5 × our LSTM's time" if pass_ == "training" else ""
    if case.T == 1 and pass_ == "inference":
        return "one-step inference"
    if case.packed or case.proj_size or case.dtype == "float64":
        return "training, packed, proj_size or float64" if pass_ == "training" else ""
    if case.cell:
        return ""
    if pass_ == "training" and (case.layers > 1 or case.bidirectional):
        return "training, two layers or bidirectional"
    return f"{pass_}, dense float32"


def quick(cases: tuple[Case, ...]) -> list[Case]:
    """Return the first case of each of a few kinds."""
    return [next(case for case in cases if case.kind == kind) for kind in QUICK_KINDS]
