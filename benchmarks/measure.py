"""Two sides timed in turns, and the statistics of it.

A round runs a block of stock and a block of ours; the next round the other way about. A row is the
median of the rounds' ratios, so that a slow stretch of the machine meets both sides alike.

A round is rejected when the machine took more than 1 % of our threads' time in a block: the time
that all of them stood ready but waited for a core because another process had it (Linux: the second
field of /proc/self/task/*/schedstat) plus the time the hypervisor stole (/proc/stat). It is
rejected, too, when our threads did not have a core each before and after it
(`benchmarks.machine.cores_are_ours`).
"""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import machine

BLOCK_SECONDS = 0.02
MAX_LOST = 0.01
MIN_ROUNDS = 3
PATIENCE = 3  # times the seconds and the rounds of a row, before we make do with what was clean


class Block(NamedTuple):
    seconds: float  # a call
    clean: bool


@dataclass(frozen=True)
class Round:
    stock: float  # seconds a call
    ours: float
    clean: bool


@dataclass(frozen=True)
class Timing:
    stock_ms: float
    ours_ms: float
    ratio: float
    rounds: int
    rejected: int
    noisy: bool  # too few clean rounds: the figures are of all rounds


def interleaved(
    stock: Callable[[], Block], ours: Callable[[], Block], seconds: float
) -> list[Round]:
    """Run rounds until `seconds` and `MIN_ROUNDS` of them are clean, or `PATIENCE` times both."""
    rounds: list[Round] = []
    clean_seconds = all_seconds = 0.0
    clean_rounds = 0
    while (clean_seconds < seconds or clean_rounds < MIN_ROUNDS) and (
        all_seconds < PATIENCE * seconds or len(rounds) < PATIENCE * MIN_ROUNDS
    ):
        start = time.perf_counter()
        if len(rounds) % 2 == 0:
            a, b = stock(), ours()
        else:
            b, a = ours(), stock()
        wall = time.perf_counter() - start
        clean = a.clean and b.clean
        rounds.append(Round(a.seconds, b.seconds, clean))
        all_seconds += wall
        clean_seconds += wall * clean
        clean_rounds += clean
    return rounds


def summarize(rounds: Sequence[Round]) -> Timing:
    """Return the medians over the clean rounds, or over all when too few of them are clean."""
    clean = [r for r in rounds if r.clean]
    noisy = len(clean) < MIN_ROUNDS
    used = rounds if noisy else clean
    return Timing(
        stock_ms=1e3 * statistics.median(r.stock for r in used),
        ours_ms=1e3 * statistics.median(r.ours for r in used),
        ratio=statistics.median(r.stock / r.ours for r in used),
        rounds=len(rounds),
        rejected=len(rounds) - len(clean),
        noisy=noisy,
    )


def nothing() -> None:
    """What comes before a call where nothing changes between two calls."""


def block(
    step: Callable[[], object],
    before: Callable[[], None] = nothing,
    seconds: float = BLOCK_SECONDS,
) -> Callable[[], Block]:
    """Return a function that runs `step` for about `seconds`.

    If that takes several calls, one more goes before them. `before` runs before every call. Neither
    counts.
    """

    def run(calls: int) -> float:
        spent = 0.0
        for _ in range(calls):
            before()
            start = time.perf_counter()
            step()
            spent += time.perf_counter() - start
        return spent

    def watched() -> Block:
        were_ours, lost, start = machine.cores_are_ours(), lost_seconds(), time.perf_counter()
        if calls > 1:
            run(1)
        spent = run(calls)
        allowed = MAX_LOST * torch.get_num_threads() * (time.perf_counter() - start)
        clean = lost_seconds() - lost <= allowed and were_ours and machine.cores_are_ours()
        return Block(spent / calls, clean)

    run(1)  # the first call of all may import and allocate
    calls = 1
    while run(calls) < seconds:
        calls *= 2
    return watched


def lost_seconds() -> float:
    """Return the seconds our threads waited for a core, plus those stolen from the machine."""
    return _waited() + _stolen()


def _waited() -> float:
    nanoseconds = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            nanoseconds += int(task.read_text().split()[1])
    return nanoseconds / 1e9


def _stolen() -> float:
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    ticks = int(stat.read_text().split(maxsplit=9)[8])
    return ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
