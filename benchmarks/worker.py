"""One side of a case in a process of its own, as the program that uses the layer has it.

Whether malloc keeps the pages of a freed block or returns them to the system depends on all that
the process has freed before, and a step that waits for new pages takes up to 1.7 times as long. So
neither the other side nor an earlier case may have run in the process that is timed.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from benchmarks import machine, measure
from benchmarks.cases import Case, Pass
from benchmarks.measure import Block
from benchmarks.workload import side

SETTLE = 0.01  # seconds: for some, OpenMP's threads look for more work, on the other side's cores
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h

_block: Callable[[], Block]


def fresh_process(initializer: Any = None, arguments: tuple[Any, ...] = ()) -> ProcessPoolExecutor:
    """A process that has imported torch and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    return ProcessPoolExecutor(1, context, initializer, arguments)


def worker(
    case: Case, which: str, pass_: Pass, threads: int, keep_memory: bool
) -> ProcessPoolExecutor:
    """A process that holds one side of a case; give it `run_block`.

    `keep_memory` tells its malloc to keep what is freed.
    """
    return fresh_process(_start, (case, which, pass_, threads, keep_memory))


def malloc_can_keep_memory() -> bool:
    return sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallopt")


def run_block() -> Block:
    result = _block()
    time.sleep(SETTLE)
    return result


def _start(case: Case, which: str, pass_: Pass, threads: int, keep_memory: bool) -> None:
    global _block
    if keep_memory:
        mallopt = ctypes.CDLL(None).mallopt
        if not (mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)):
            raise RuntimeError("malloc cannot be told to keep memory")
    torch.set_num_threads(threads)
    chosen = side(case, which)
    gc.collect()
    gc.disable()
    before = chosen.renew_weights if pass_ == "training" else measure.nothing
    _block = measure.block(lambda: chosen.step(pass_), before)
    machine.wait_for_cores()
