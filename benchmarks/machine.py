"""The machine a run was made on, and how fast it is at this moment."""

from __future__ import annotations

import datetime
import os
import platform
import re
import time
from pathlib import Path

import torch

import torch_manual
from torch_manual.kernels import cpu_library

REPEATS = 50_000  # a fraction of a millisecond
TRIES = 8
OURS = 0.75  # of the rate that as many cores had before: with less, they are shared
_best_alone = 0.0


def fma_peak(dtype: torch.dtype) -> float | None:
    """Return the flop/s of multiply-adds in registers, on the threads torch uses now.

    None without the CPU kernel, which holds the loop.
    """
    if cpu_library.status() != "available":
        return None
    return max(_rate(dtype, torch.get_num_threads()) for _ in range(TRIES))


def cores_are_ours() -> bool:
    """Whether every thread of torch's has a core of its own at this moment.

    Two processors of a virtual machine may be put on one core for seconds or minutes. Nothing shows
    it, neither load nor stolen time, but that both together then multiply and add as fast as one.
    """
    global _best_alone
    if cpu_library.status() != "available":
        return True
    _best_alone = max(_best_alone, _rate(torch.float32, 1))
    threads = torch.get_num_threads()
    together = max(_rate(torch.float32, threads) for _ in range(2))  # the first call wakes them
    return together >= OURS * threads * _best_alone


def wait_for_cores(seconds: float = 30.0) -> None:
    """Wait until `cores_are_ours`, but no longer than that."""
    end = time.monotonic() + seconds
    while not cores_are_ours() and time.monotonic() < end:
        time.sleep(0.2)


def _rate(dtype: torch.dtype, threads: int) -> float:
    start = time.perf_counter()
    done = cpu_library.multiply_add(dtype, threads, REPEATS)
    return done / (time.perf_counter() - start)


def describe() -> dict[str, str]:
    return {
        "CPU": f"{_cpu_model()}, {os.cpu_count()} cores",
        "ISA": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "torch_manual": torch_manual.__version__,
        "CPU kernel": torch_manual.backends()["cpu"],
        "date": datetime.date.today().isoformat(),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    match = cpuinfo.exists() and re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
    return match[1] if match else platform.processor() or platform.machine()
