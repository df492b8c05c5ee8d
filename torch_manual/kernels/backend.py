"""Which implementation serves the recurrence: plain torch ops, C on the CPU, Triton on a GPU."""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor

_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NAMES = ("auto", "eager", "cpu", "triton")
_requested = "auto"


def backends() -> dict[str, str]:
    """Return, for each backend, `"available"` or the reason why it is not."""
    return {"eager": "available", "cpu": _cpu_status(), "triton": _triton_status()}


def _cpu_status() -> str:
    from torch_manual.kernels import cpu_library  # it asks here which backend is requested

    return cpu_library.status()


def _triton_status() -> str:
    try:
        import triton

        importlib.import_module("torch_manual.triton_kernels")
    except ImportError as error:
        return str(error)
    if triton.knobs.runtime.interpret or torch.cuda.is_available():
        return "available"
    return "no GPU (with TRITON_INTERPRET=1 set before Python starts, CPU tensors are served)"


def triton_serves(t: Tensor) -> bool:
    """Whether the backend asked for lets the Triton kernels serve tensors such as `t`.

    Raises:
        RuntimeError: `use_backend` asks for a kernel that has no code for `t`.
    """
    if _requested == "auto":
        return t.is_cuda and t.dtype in _TRITON_DTYPES and _triton_status_once() == "available"
    if _requested == "triton":
        if not (t.is_cuda or (t.is_cpu and _interpreted())):
            raise RuntimeError(
                f"use_backend: the 'triton' kernels serve CUDA tensors, got one on {t.device} "
                "(CPU tensors with TRITON_INTERPRET=1 set before Python starts)"
            )
        if t.dtype not in _TRITON_DTYPES:
            raise RuntimeError(f"use_backend: the 'triton' kernels have no code for {t.dtype}")
        return True
    if _requested == "cpu" and not t.is_cpu:
        raise RuntimeError(
            f"use_backend: the 'cpu' kernel serves CPU tensors, got one on {t.device}"
        )
    return False


_triton_status_once = functools.cache(_triton_status)


def _interpreted() -> bool:
    import triton

    return triton.knobs.runtime.interpret


class use_backend:
    """Choose the implementation of the recurrence, for the process or for a `with` block.

    `"auto"` takes the fastest one that serves the tensors at hand; `"eager"` plain torch ops, on
    any device and real dtype; `"cpu"` the compiled kernel; `"triton"` the Triton kernels (on CPU
    tensors too, when TRITON_INTERPRET=1).

    The choice takes effect at once and, used as a context manager, is undone on exit. It is global
    to the process, not to a thread, because autograd may run a backward pass on threads of its own:
    `with` blocks of two threads that overlap undo each other's choice. An object serves one block.

    Raises:
        ValueError: `name` is none of the four.
        RuntimeError: the backend asked for is not available here; the message says why.
    """

    def __init__(self, name: str) -> None:
        global _requested
        if name not in NAMES:
            raise ValueError(f"use_backend: name must be one of {', '.join(NAMES)}, got {name!r}")
        status = "available" if name == "auto" else backends()[name]
        if status != "available":
            raise RuntimeError(f"use_backend: {name!r} is not available: {status}")
        self._before = _requested
        _requested = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc: object) -> None:
        global _requested
        _requested = self._before


def requested() -> str:
    """Return the backend asked for by `use_backend`, or `"auto"`."""
    return _requested
