"""A training step beside its matrix products alone, by `torch.mm`: `python -m benchmarks.products`.

An LSTM layer's training step has six products: x W_ihᵀ of all rows at once and h W_hhᵀ step by step
(F1), dpre W_hh step by step (B9), and of all rows dpre W_ih (B10), dpreᵀ x (B11) and dpreᵀ h (B12).
A layer that leaves them to BLAS takes longer than BLAS takes for them: gates come on top, and the
operands of the next step wait for them. So a ratio of at most 1 says that what bounds the step is
how fast this machine multiplies, and that our products are the faster ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.cases import CASES, Case
from benchmarks.table import RESULTS, print_and_write
from benchmarks.transforms import HEAD, Comparison
from benchmarks.workload import side


def products(case: Case) -> Callable[[], None]:
    """The products of a training step of `case`, of random operands."""
    T, B, I, H = case.T, case.B, case.I, case.H
    x, h, pre, dpre = (torch.randn(T * B, n) for n in (I, H, 4 * H, 4 * H))
    weight_ih, weight_hh = torch.randn(4 * H, I), torch.randn(4 * H, H)
    dx, dh = torch.empty(T * B, I), torch.empty(B, H)
    dweight_ih, dweight_hh = torch.empty(4 * H, I), torch.empty(4 * H, H)

    def run() -> None:
        torch.mm(x, weight_ih.T, out=pre)
        for h_t, pre_t in zip(h.split(B), pre.split(B), strict=True):
            torch.addmm(pre_t, h_t, weight_hh.T, out=pre_t)
        for dpre_t in dpre.split(B):
            torch.mm(dpre_t, weight_hh, out=dh)
        torch.mm(dpre, weight_ih, out=dx)
        torch.mm(dpre.T, x, out=dweight_ih)
        torch.mm(dpre.T, h, out=dweight_hh)

    return run


def comparisons() -> Iterator[Comparison]:
    for case in CASES:
        if case.kind == "dense":
            step = side(case, "ours").training
            yield Comparison(case.label, "its products", step, products(case), limit=1.0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.products", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a row")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of products.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = (comparison.row(options.seconds) for comparison in comparisons())
    print_and_write(options.out / "products.md", "A training step beside its products", HEAD, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
