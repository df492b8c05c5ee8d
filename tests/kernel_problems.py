"""What the tests of the compiled CPU kernel share: problems of every class, where to run them."""

from typing import NamedTuple

import pytest
import torch

from torch_manual.kernels import cpu_library
from torch_manual.kernels import lstm as ops
from torch_manual.kernels.cpu_library import Grid

if cpu_library.status() != "available":
    pytest.skip(f"no CPU kernel: {cpu_library.status()}", allow_module_level=True)

BUILT = cpu_library.INSTRUCTION_SETS[
    cpu_library.INSTRUCTION_SETS.index(cpu_library.instruction_set()) :
]
GRIDS = (Grid(), Grid(1, 2, 1), Grid(1, 1, 2), Grid(2, 1, 1), Grid(1, 3, 2))
# T, B, I, H
SIZES = (
    (3, 5, 4, 7),
    (4, 13, 9, 33),
    (6, 1, 2, 1),
    (3, 5, 8, 100),
    (5, 2, 3, 17),
    (1, 3, 5, 17),
    (2, 3, 0, 5),
)
CLASSES = {
    "dense": {},
    "bidirectional": {"D": 2},
    "projection": {"D": 2, "projection": True},
    "diagonal": {"peepholes": 1},
    "full": {"peepholes": 2},
    "full-projection": {"D": 2, "peepholes": 2, "projection": True},
    "packed": {"D": 2, "packed": True},
    "packed-projection": {"D": 2, "packed": True, "projection": True, "peepholes": 1},
    "packed-full": {"D": 2, "packed": True, "peepholes": 2},
    "no-bias": {"bias": False},
}


class Problem(NamedTuple):
    """The arguments of the forward op, and of the backward op what comes from outside."""

    x: torch.Tensor
    h0: torch.Tensor
    c0: torch.Tensor
    batch_sizes: torch.Tensor | None
    weights: list
    outer: tuple  # dy, dh_n, dc_n, dcells

    def to(self, dtype):
        def cast(t):
            return None if t is None else t.to(dtype)

        weights, outer = ([cast(t) for t in part] for part in (self.weights, self.outer))
        states = (cast(t) for t in self[:3])
        return Problem(*states, self.batch_sizes, weights, tuple(outer))


def problem(T, B, I, H, D=1, peepholes=0, projection=False, packed=False, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    P = max(1, H // 3) if projection else H
    batch_sizes, N = None, T * B
    if packed:
        lengths = torch.randint(1, T + 1, (B,), generator=generator)
        lengths[0] = T
        batch_sizes = torch.stack([(lengths > t).sum() for t in range(T)])
        N = int(lengths.sum())
    weights = []
    for _ in range(D):
        small = H**-0.5
        weights += [draw(4 * H, I) * small, draw(4 * H, P) * small]
        weights += [draw(4 * H), draw(4 * H)] if bias else [None, None]
        weights += [draw(P, H) * small if projection else None]
        weights += [draw(*[H] * peepholes) * small if peepholes else None for _ in range(3)]
    states = draw(N, I), draw(D, B, P), draw(D, B, H)
    outer = draw(N, D * P), draw(D, B, P), draw(D, B, H), draw(D, N, H)
    return Problem(*states, batch_sizes, weights, outer)


def plain(p):
    forward = ops._forward(*p[:5], True)
    return forward, ops._backward(*p.outer, p.c0, p.batch_sizes, p.weights, *forward[3:])


def error(results, right):
    """The largest error of each of `results`; NaN if one is."""
    return torch.stack(
        [
            (a.double() - b).abs().max() if b.numel() else torch.zeros(()).double()
            for a, b in zip(results, right, strict=True)
        ]
    )
