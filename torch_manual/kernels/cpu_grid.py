"""How many threads share a call of the compiled CPU kernel, and what they share of it."""

from __future__ import annotations

import math
import sys

import torch

from torch_manual.kernels import cpu_library, crowding
from torch_manual.kernels.cpu_library import Grid

_LARGE_CACHE = 2 << 20  # the second level's of Intel's servers, whose third level is slow
_WORTH_A_THREAD = 1_000_000  # multiplications
_WORTH_WAITING = 8_000  # multiplications of a thread in a step
ALONE = Grid()


def grid(T: int, B: int, work: int, H: int, D: int, backward: bool = False) -> Grid:
    """The threads to use, by shape; `work` is the number of multiplications of one direction.

    Threads that share the sequences never wait for one another, but each reads all weights: worth
    it for four sequences a thread, and for any where units are few. Those that share the units wait
    at every step, and a step must be worth it.
    """
    if cpu_library.chosen.grid:
        return cpu_library.chosen.grid
    n = threads(D * work)
    if n == 1:
        return ALONE
    directions = D if n >= D else 1
    n //= directions
    if n == 1 or work < _WORTH_A_THREAD:
        return Grid(directions)
    few_units = H <= (96 if backward else 48)
    if T > 1 and few_units and 1 < B < 4 * n:
        return Grid(directions, min(n, B))
    if T > 1 and 4 * n <= B:
        least = _least_units(4 * (work // (T * B)), B // n, H, backward)
        units = next((u for u in range(least, n) if n % u == 0), n)
        if units < n:
            return Grid(directions, n // units, units)
    units = min(n, -(-H // 32), max(1, work // (T * _WORTH_WAITING)))
    return Grid(directions, units=units)


def thinned(grid: Grid) -> Grid:
    """`grid`, or fewer threads for it while these would wait for a core.

    Their sums are the same: none is shared, and a thread takes on whole places of others.
    """
    spared = crowding.spared()
    if not spared or cpu_library.chosen.grid:
        return grid
    parts = grid.directions * grid.batches
    left = max(1, parts * grid.units - spared)
    units = max(1, left // parts)
    return Grid(grid.directions, grid.batches, units, min(left, parts * units))


def _least_units(size: int, rows: int, H: int, backward: bool) -> int:
    """How many threads at least share the units.

    `size` is that of the weights, in bytes of float32; `rows` the sequences of each thread if they
    share those.

    Behind a large second-level cache the third is slow. So the weights that a thread reads at a
    step should leave room in the second. The backward pass has more to hand from core to core, four
    gates for every output: its weights may even come from the third for many rows.
    """
    cache = cpu_library.second_level_cache()
    if cache < _LARGE_CACHE:
        return 1 if H <= 256 else sys.maxsize
    if backward:
        return 1 if H <= 512 and (size <= cache or rows >= 16) else sys.maxsize
    return max(1, -(-size * 9 // (5 * cache))) if H <= 256 else sys.maxsize


def threads(work: int) -> int:
    """How many threads may share so many multiplications."""
    if cpu_library.chosen.grid:
        return math.prod(cpu_library.chosen.grid[:3])
    if work < _WORTH_A_THREAD:
        return 1
    return torch.get_num_threads()


def unpacked(T: int, N: int, kept: bool = False) -> bool:
    """Whether packing the weights would not pay for so few rows.

    `kept`: they may be packed already. Unpacked ones are read at every step, W_ih among them.
    """
    if cpu_library.chosen.unpacked is not None:
        return cpu_library.chosen.unpacked
    if T == 1:
        return N <= 24
    return N <= 12 and not (kept and T >= 8)
