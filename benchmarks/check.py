"""No time without a right result: ours against a float64 reference, no worse than stock is."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from benchmarks.cases import Case, Pass
from benchmarks.workload import side

SLACK = 2.0
FLOOR = {torch.float32: 1e-6, torch.float64: 1e-12}


class Workload:
    """Both sides of a case, and the reference they are held to."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.stock = side(case, "stock")
        self.ours = side(case, "ours")
        self._plain = side(case, "plain") if case.peephole else self.stock

    @cached_property
    def _expected(self) -> list[Tensor]:
        return side(self.case, "reference").training()

    def disagreement(self, pass_: Pass) -> str:
        """Return which result of ours is wrong, and by how much; nothing if none is.

        The error of a tensor is its largest deviation from the reference, relative to the largest
        element there. Ours may be twice what stock's own error is, or the floor.
        """
        ours, plain = self.ours.step(pass_), self._plain.step(pass_)
        for name, a, b, expected in zip(self.ours.names, ours, plain, self._expected, strict=False):
            allowed = max(SLACK * error(b, expected), FLOOR[a.dtype])
            if not error(a, expected) <= allowed:
                return f"{name}: error {error(a, expected):.1e}, allowed {allowed:.1e}"
        return ""


def error(result: Tensor, expected: Tensor) -> float:
    scale = expected.detach().abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((result.detach().double() - expected.detach()).abs().max() / scale)
