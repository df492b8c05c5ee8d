"""The memory one step takes beyond its weights and inputs, as the operating system counts it.

A fresh process runs a tiny step of the same kind (libraries page in, threads start), hands unused
heap back, resets the kernel's high-water mark, and runs one step of the case. The peak is the rise
of that mark: outputs, gradients, what is saved for backward and every workspace, also those a
library allocates behind torch's back. Good to about 0.3 MiB; Linux only.
"""

from __future__ import annotations

import ctypes
import math
import re
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.cases import Case, Pass
from benchmarks.worker import fresh_process
from benchmarks.workload import side

RESET_PEAK = Path("/proc/self/clear_refs")


def peak_mib(case: Case, which: str, pass_: Pass, threads: int) -> float:
    if not RESET_PEAK.exists():
        return math.nan
    with fresh_process() as process:
        return process.submit(_peak_of_one_step, case, which, pass_, threads).result()


def _peak_of_one_step(case: Case, which: str, pass_: Pass, threads: int) -> float:
    torch.set_num_threads(threads)
    side(replace(case, T=min(case.T, 2), B=min(case.B, 2)), which).step(pass_)
    weighed = side(case, which)
    ctypes.CDLL(None).malloc_trim(0)
    RESET_PEAK.write_text("5")
    before = _status_mib("VmRSS")
    results = weighed.step(pass_)
    peak = _status_mib("VmHWM")
    del results
    return max(peak - before, 0.0)


def _status_mib(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"{field}:\s+(\d+) kB", status)
    assert match, f"/proc/self/status has no {field}"
    return int(match[1]) / 1024
