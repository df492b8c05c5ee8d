"""The shared objects of the compiled CPU kernel (torch_manual/csrc): which one, and calling it.

The build puts one per instruction set beside its sources, `csrc/lstm_avx512.so`, `lstm_avx2.so`
and `lstm_baseline.so`. At first use the best one that the processor can run is loaded. Torch is
imported first, so both use one OpenMP runtime. See docs/cpu_kernel.md.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from torch_manual.kernels import backend, crowding

INSTRUCTION_SETS = ("avx512", "avx2", "baseline")
FOLDER = Path(
    os.environ.get("TORCH_MANUAL_KERNEL_FOLDER", Path(__file__).resolve().parent.parent / "csrc")
)
HALF = (torch.float16, torch.bfloat16)
_OUTDATED = 3  # what a call of csrc/lstm.cpp returns for a structure of another size
_FUNCTIONS = (
    "lstm_forward",
    "lstm_backward",
    "lstm_tangent",
    "lstm_dual",
    "lstm_backward_tangent",
    "lstm_input_sums",
    "lstm_weight_sums",
    "lstm_peephole_sums",
    "lstm_gradients",
    "multiply_add",
)


class Grid(NamedTuple):
    """How many threads share the directions, the sequences and the hidden units of one call.

    `threads`: so few do it all, the places of several each, where none share units; 0: all.
    """

    directions: int = 1
    batches: int = 1
    units: int = 1
    threads: int = 0


class _Chosen(NamedTuple):
    instruction_set: str | None = None
    grid: Grid | None = None
    unpacked: bool | None = None


chosen = _Chosen(instruction_set=os.environ.get("TORCH_MANUAL_INSTRUCTION_SET"))
_libraries: dict[str, dict[tuple[str, torch.dtype], Any]] = {}
_loaded: list[ctypes.CDLL] = []
_status: str | None = None
_forked = False
_caller: ThreadPoolExecutor | None = None  # in a forked child; its one thread has its own OpenMP's


@contextmanager
def override(**choices: Any) -> Iterator[None]:
    """Within a `with` block, fix what is otherwise chosen by processor and shape. For tests.

    Args:
        choices: `instruction_set`, a name of INSTRUCTION_SETS; `grid`, a `Grid`; `unpacked`,
            whether the weights are read where they are.
    """
    global chosen
    before, chosen = chosen, chosen._replace(**choices)
    try:
        yield
    finally:
        chosen = before


def status() -> str:
    """Return `"available"`, or why the kernel does not serve here."""
    global _status
    if _status is None:
        try:
            _functions()
            _status = "available"
        except (OSError, RuntimeError) as error:
            _status = str(error)
    return _status


def serves(dtype: torch.dtype) -> bool:
    """Whether the backend asked for lets this kernel serve CPU tensors of `dtype`.

    Raises:
        RuntimeError: `use_backend("cpu")` asks for it, and it has no code for `dtype`.
    """
    requested = backend.requested()
    if requested not in ("auto", "cpu"):
        return False
    has_code = dtype in (torch.float32, torch.float64, *HALF)
    if requested == "cpu" and not has_code:
        raise RuntimeError(f"use_backend: the 'cpu' kernel has no code for {dtype}")
    return has_code and (_status or status()) == "available"


def instruction_set() -> str:
    """Return the instruction set in use.

    Raises:
        RuntimeError: none of those built runs here.
    """
    if chosen.instruction_set:
        return chosen.instruction_set
    return _best_instruction_set()


def _best_instruction_set() -> str:
    if not _path("baseline").exists():
        raise RuntimeError(
            f"it was not compiled when torch_manual was installed: no {_path('baseline')} "
            "(install again where there is GCC, or CXX names it)"
        )
    query = ctypes.CDLL(str(_path("baseline"))).best_instruction_set
    query.restype = ctypes.c_char_p
    best = INSTRUCTION_SETS.index(query().decode())
    for name in INSTRUCTION_SETS[best:]:
        if _path(name).exists():
            if name == "baseline" and platform.machine() in ("x86_64", "AMD64"):
                wanted = INSTRUCTION_SETS[best]
                raise RuntimeError(
                    "the processor has neither AVX2 nor AVX-512: torch ops are faster"
                    if wanted == name
                    else f"it was compiled without {wanted}, in which torch ops are faster: "
                    "install again"
                )
            return name
    raise RuntimeError(f"no file in {FOLDER} that this processor can run")


def _path(name: str) -> Path:
    return FOLDER / f"lstm_{name}.so"


def _functions() -> dict[tuple[str, torch.dtype], Any]:
    """The functions of the library in use, by name and dtype."""
    key = chosen.instruction_set or ""
    if key not in _libraries:
        library = ctypes.CDLL(str(_path(instruction_set())))
        _loaded.append(library)
        _libraries[key] = {
            (name, dtype): getattr(library, f"{name}_{suffix}")
            for name in _FUNCTIONS
            for dtype, suffix in ((torch.float32, "float32"), (torch.float64, "float64"))
        }
    return _libraries[key]


def drop_workspace() -> None:
    """Give back to the system the memory that the last call has left for the next one."""
    for library in _loaded:
        library.drop_workspace()


def _after_fork() -> None:
    """OpenMP would wait forever for its parent's threads: a child leaves them to a new thread."""
    global _forked, _caller
    _forked, _caller = True, None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def second_level_cache() -> int:
    """Return the size in bytes of a core's second-level cache, 0 if unknown."""
    query = ctypes.CDLL(str(_path("baseline"))).second_level_cache
    query.restype = ctypes.c_int64
    return query()


def call(name: str, dtype: torch.dtype, arguments: bytes) -> None:
    """Call a function of the library with a structure of csrc.

    Raises:
        MemoryError: there is no memory for the packed weights.
        RuntimeError: the structure is not of the size that the library was compiled for.
    """
    begun = time.monotonic()
    outcome = _run(_functions()[name, dtype], arguments, len(arguments))
    if outcome == crowding.CROWDED:
        crowding.note(begun)
    elif outcome == _OUTDATED:
        raise RuntimeError(
            f"{name}: {_path(instruction_set())} was compiled from other sources than these: "
            "build it again, by installing torch_manual again"
        )
    elif outcome:
        raise MemoryError(f"{name}: no memory for the packed weights")


def _run(function: Any, *arguments: Any) -> int:
    global _caller
    if not _forked or torch.get_num_threads() == 1:
        return function(*arguments)
    _caller = _caller or ThreadPoolExecutor(1, "torch_manual")
    future = _caller.submit(function, *arguments)
    try:
        return future.result()
    finally:  # whatever a signal raises here, the tensors that are written outlive the call
        wait([future])


def multiply_add(dtype: torch.dtype, n_threads: int, repeats: int) -> int:
    """Keep the processor multiplying and adding in registers; return how many operations it did."""
    function = _functions()["multiply_add", dtype]
    function.argtypes, function.restype = [ctypes.c_int64] * 2, ctypes.c_int64
    return _run(function, n_threads, repeats)
