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
from torch_manual.kernels import cpu

REPEATS = 50_000  # a millisecond or two
TRIES = 8


def fma_peak(dtype: torch.dtype) -> float | None:
    """Return the flop/s of multiply-adds in registers, on the threads torch uses now.

    None without the CPU kernel, which holds the loop.
    """
    if cpu.status() != "available":
        return None
    best = 0.0
    for _ in range(TRIES):
        start = time.perf_counter()
        done = cpu.multiply_add(dtype, torch.get_num_threads(), REPEATS)
        best = max(best, done / (time.perf_counter() - start))
    return best


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
