"""Ours beside stock with machine or numbers against them: `python -m benchmarks.conditions`.

- busy core: another process keeps one of the cores busy, for every second measurement;
- denormals: x, h_0 and c_0 of 1e-40;
- last step's loss: dy is 0 but for the last step, so that gradients decay on their way back.

A row says how many times as long a call takes as it does otherwise, for stock and for ours, and
stock's time over ours then. Ours is not to be slowed more than stock. A busy core is met by fewer
threads (torch_manual/kernels/crowding.py), so that a measurement lasts long enough to see that, and
there is a pause before the next one.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

import torch_manual
from benchmarks.machine import cores_are_ours, wait_for_cores
from benchmarks.measure import Block, block, no_garbage_collection
from benchmarks.table import RESULTS, print_and_write
from torch_manual.kernels import crowding

HEAD = ("condition", "pass", "T B I H", "stock", "ours", "stock's time over ours", "")
SHAPES = ((128, 16, 64, 64), (128, 32, 128, 128), (512, 8, 256, 256), (1000, 1, 64, 64))
DENORMAL = 1e-40
NOISE = 1.05  # measurements of the same thing differ by as much
BLOCK_SECONDS = 0.15
PAUSE = crowding.WHILE + 0.1  # seconds, until all threads are back

Run = Callable[[], Block]


def blocks(
    sizes: Sequence[int], training: bool, scale: float = 1.0, last: bool = False
) -> tuple[Run, Run]:
    """Stock and ours, on the same weights and inputs; with `last`, dy is that of the last step."""
    T, B, I, H = sizes
    stock, ours = nn.LSTM(I, H), torch_manual.LSTM(I, H)
    ours.load_state_dict(stock.state_dict())
    x, h, c = (scale * torch.randn(size) for size in ((T, B, I), (1, B, H), (1, B, H)))
    dy = torch.randn(T, B, H)
    if last:
        dy[:-1] = 0
    x.requires_grad_(training)

    def of(module: nn.Module) -> Run:
        leaves = [x, *module.parameters()]

        def step() -> object:
            with torch.set_grad_enabled(training):
                y, _ = module(x, (h, c))
            return torch.autograd.grad(y, leaves, dy) if training else y

        return block(step, seconds=BLOCK_SECONDS)

    return of(stock), of(ours)


@contextmanager
def busy_core() -> Iterator[Callable[[bool], None]]:
    """A process on one of our cores, to be switched on and off; it ends with this one."""
    spin = """
import os, sys
core, parent = map(int, sys.argv[1:])
os.sched_setaffinity(0, [core])
while os.getppid() == parent:
    for _ in range(10**6):
        pass
"""
    core = min(os.sched_getaffinity(0))
    process = subprocess.Popen([sys.executable, "-c", spin, str(core), str(os.getpid())])
    process.send_signal(signal.SIGSTOP)
    try:
        yield lambda on: process.send_signal(signal.SIGCONT if on else signal.SIGSTOP)
    finally:
        process.kill()
        process.wait()


def slowdown(
    calm: Sequence[Run], hard: Sequence[Run], switch: Callable[[bool], None], seconds: float
) -> tuple[float, ...]:
    """How much longer stock and ours take, and stock's time over ours, as medians over rounds."""
    rounds: list[tuple[float, ...]] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rounds) < 3:
        order = 1 if len(rounds) % 2 else -1
        time.sleep(PAUSE)
        wait_for_cores()
        before = [run().seconds for run in calm[::order]][::order]
        switch(True)
        during = [run().seconds for run in hard[::order]][::order]
        switch(False)
        if not cores_are_ours() and time.perf_counter() < end:
            continue  # they may have been another's all along
        slower = [d / b for b, d in zip(before, during, strict=True)]
        rounds.append((*slower, during[0] / during[1]))
    return tuple(map(statistics.median, zip(*rounds, strict=True)))


def rows(seconds: float) -> Iterator[tuple[str, ...]]:
    for training in (False, True):
        for sizes in SHAPES:
            calm, tiny = blocks(sizes, training), blocks(sizes, training, DENORMAL)
            with busy_core() as switch:
                busy = slowdown(calm, calm, switch, seconds)
            found = [
                ("busy core", busy),
                ("denormals", slowdown(calm, tiny, lambda _: None, seconds)),
            ]
            if training:
                of_last = blocks(sizes, training, last=True)
                found.append(("last step's loss", slowdown(calm, of_last, lambda _: None, seconds)))
            for name, (stock, ours, ratio) in found:
                yield (
                    name,
                    "training" if training else "inference",
                    " ".join(map(str, sizes)),
                    f"{stock:.2f} ×",
                    f"{ours:.2f} ×",
                    f"{ratio:.2f}",
                    "" if ours <= NOISE * stock else "slowed more than stock",
                )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.conditions", description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="of a row")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of conditions.md")
    options = parser.parse_args(arguments)
    if not hasattr(os, "sched_setaffinity"):
        print("benchmarks: only Linux lets a process be kept on one core", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    path = options.out / "conditions.md"
    with no_garbage_collection():
        print_and_write(path, "Under other conditions", HEAD, rows(options.seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
