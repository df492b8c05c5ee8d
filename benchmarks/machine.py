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

SIZE = 768  # three matrices fit the cache; rows are no multiple of 4 KiB and do not alias
TRIES = 8


def gemm_peak(dtype: torch.dtype) -> float:
    """Return the flop/s of torch.mm at its best, on the threads torch uses now."""
    a, b, c = (torch.randn(SIZE, SIZE, dtype=dtype) for _ in range(3))
    fastest = float("inf")
    for _ in range(TRIES):
        start = time.perf_counter()
        torch.mm(a, b, out=c)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * SIZE**3 / fastest


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
