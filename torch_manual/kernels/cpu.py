"""The compiled CPU kernel (torch_manual/csrc): loading it, and the ops it implements.

The build puts one shared object per instruction set beside its sources, `csrc/lstm_avx512.so`,
`lstm_avx2.so` and `lstm_baseline.so`. At first use the best one that the processor can run is
loaded. Torch is imported first, so both use one OpenMP runtime. See docs/cpu_kernel.md.

Shapes are those of torch_manual/kernels/lstm.py; csrc/lstm.h describes the structures filled here.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import platform
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_manual.kernels import backend, crowding, memory

INSTRUCTION_SETS = ("avx512", "avx2", "baseline")
FOLDER = Path(
    os.environ.get("TORCH_MANUAL_KERNEL_FOLDER", Path(__file__).resolve().parent.parent / "csrc")
)
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
_LARGE_CACHE = 2 << 20  # the second level's of Intel's servers, whose third level is slow
HALF = (torch.float16, torch.bfloat16)
_WEIGHTS = 8  # of one direction; LSTMWeights in kernels/lstm.py
_NONE = (0,) * _WEIGHTS
_WORTH_A_THREAD = 1_000_000  # multiplications
_WORTH_WAITING = 8_000  # multiplications of a thread in a step


class Grid(NamedTuple):
    """How many threads share the directions, the sequences and the hidden units of one call."""

    directions: int = 1
    batches: int = 1
    units: int = 1


_ALONE = Grid()


class _Override(NamedTuple):
    instruction_set: str | None = None
    grid: Grid | None = None
    unpacked: bool | None = None


_override = _Override(instruction_set=os.environ.get("TORCH_MANUAL_INSTRUCTION_SET"))
_libraries: dict[str, dict[tuple[str, torch.dtype], Any]] = {}
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
    global _override
    before, _override = _override, _override._replace(**choices)
    try:
        yield
    finally:
        _override = before


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
    if _override.instruction_set:
        return _override.instruction_set
    return _best_instruction_set()


def _best_instruction_set() -> str:
    if not _path("baseline").exists():
        raise RuntimeError(
            f"it was not compiled when torch_manual was installed: no {_path('baseline')} "
            "(install again where there is a C++ compiler)"
        )
    query = ctypes.CDLL(str(_path("baseline"))).best_instruction_set
    query.restype = ctypes.c_char_p
    best = INSTRUCTION_SETS.index(query().decode())
    for name in INSTRUCTION_SETS[best:]:
        if _path(name).exists():
            if name == "baseline" and platform.machine() in ("x86_64", "AMD64"):
                raise RuntimeError(
                    "the processor has neither AVX2 nor AVX-512: torch ops are faster"
                )
            return name
    raise RuntimeError(f"no file in {FOLDER} that this processor can run")


def _path(name: str) -> Path:
    return FOLDER / f"lstm_{name}.so"


def _functions() -> dict[tuple[str, torch.dtype], Any]:
    """The functions of the library in use, by name and dtype."""
    chosen = _override.instruction_set or ""
    if chosen not in _libraries:
        library = ctypes.CDLL(str(_path(instruction_set())))
        _libraries[chosen] = {
            (name, dtype): getattr(library, f"{name}_{suffix}")
            for name in _FUNCTIONS
            for dtype, suffix in ((torch.float32, "float32"), (torch.float64, "float64"))
        }
    return _libraries[chosen]


def _after_fork() -> None:
    """OpenMP would wait forever for its parent's threads: a child leaves them to a new thread."""
    global _forked, _caller
    _forked, _caller = True, None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def grid(T: int, B: int, work: int, H: int, D: int, backward: bool = False) -> Grid:
    """The threads to use, by shape; `work` is the number of multiplications of one direction.

    Threads that share the sequences never wait for one another, but each reads all weights: worth
    it for four sequences a thread, and for any where units are few. Those that share the units wait
    at every step, and a step must be worth it.
    """
    if _override.grid:
        return _override.grid
    n = threads(D * work)
    if n == 1:
        return _ALONE
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
    """`grid`, or fewer threads that share units while these would wait for a core."""
    if grid.units == 1 or _override.grid:
        return grid
    return grid._replace(units=max(1, grid.units - crowding.spared()))


def _least_units(size: int, rows: int, H: int, backward: bool) -> int:
    """How many threads at least share the units.

    `size` is that of the weights, in bytes of float32; `rows` the sequences of each thread if they
    share those.

    Behind a large second-level cache the third is slow. So the weights that a thread reads at a
    step should leave room in the second. The backward pass has more to hand from core to core, four
    gates for every output: its weights may even come from the third for many rows.
    """
    cache = _second_level_cache()
    if cache < _LARGE_CACHE:
        return 1 if H <= 256 else sys.maxsize
    if backward:
        return 1 if H <= 512 and (size <= cache or rows >= 16) else sys.maxsize
    return max(1, -(-size * 9 // (5 * cache))) if H <= 256 else sys.maxsize


@functools.cache
def _second_level_cache() -> int:
    query = ctypes.CDLL(str(_path("baseline"))).second_level_cache
    query.restype = ctypes.c_int64
    return query()


def threads(work: int) -> int:
    """How many threads may share so many multiplications."""
    if _override.grid:
        return math.prod(_override.grid)
    if work < _WORTH_A_THREAD:
        return 1
    return torch.get_num_threads()


# Sizes take twelve words; then come three more and nine pointers, or eleven pointers and a stride.
FORWARD_WORDS = 12 + 12 + 2 * _WEIGHTS
BACKWARD_WORDS = 12 + 12 + 2 * _WEIGHTS
_forward_arguments = struct.Struct(f"{FORWARD_WORDS}q").pack
_dual_arguments = struct.Struct(f"{FORWARD_WORDS + 7 + 2 * _WEIGHTS}q").pack
_backward_arguments = struct.Struct(f"{BACKWARD_WORDS}q").pack


def lstm_forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor | None],
    save: bool,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`torch_manual::lstm_forward` on CPU tensors."""
    dtype = x.dtype
    if dtype in HALF:
        single = [None if w is None else w.float() for w in weights]
        results = lstm_forward(
            x.float(), h0.float(), c0.float(), batch_sizes, single, save, reverse
        )
        return tuple(t.to(dtype) for t in results)  # type: ignore[return-value]
    (D, _, H), N = c0.shape, x.shape[0]
    gates = memory.empty(x, D, N, 4 * H) if save else x.new_empty(0)
    cells = memory.empty(x, D, N, H) if save else x.new_empty(0)
    kept = gates.data_ptr(), cells.data_ptr(), 0
    return *run_forward(x, h0, c0, batch_sizes, weights, kept, reverse=reverse), gates, cells


def run_forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor | None],
    kept: tuple[int, int, int],
    recompute: int = 0,
    chunk_rows: int = 0,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, h_n and c_n; `kept` are the addresses of gates, cells and c_kept, or 0."""
    x, h0, c0 = x.contiguous(), h0.contiguous(), c0.contiguous()
    (N, I), (D, B, P), H = x.shape, h0.shape, c0.shape[2]
    y, h_n, c_n = memory.empty(x, N, D * P), torch.empty_like(h0), torch.empty_like(c0)
    T, lengths = steps(N, B, batch_sizes)
    if T == 0:
        return y, h_n.copy_(h0), c_n.copy_(c0)
    weights, pointers, full = in_c_order(weights)
    work = N * 4 * H * (I + P)
    call(
        "lstm_forward",
        x.dtype,
        _forward_arguments(
            *(T, B, I, H, P, D, full, reverse, *thinned(grid(T, B, work, H, D)), lengths),
            *(unpacked(T, N), recompute, chunk_rows),
            *(x.data_ptr(), h0.data_ptr(), c0.data_ptr()),
            *(y.data_ptr(), h_n.data_ptr(), c_n.data_ptr(), *kept),
            *pointers,
        ),
    )
    return y, h_n, c_n


def lstm_step(
    x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Tensor | None], save: bool
) -> tuple[Tensor, ...]:
    """`lstm_forward` of one step and direction: x (B, I), h (B, P), c (B, H).

    Returns the next h and c, and with `save` gates (1, B, 4H) and cells (1, B, H).
    """
    x, h, c = x.contiguous(), h.contiguous(), c.contiguous()
    (B, I), P, H = x.shape, h.shape[1], c.shape[1]
    h_n, c_n = torch.empty_like(h), torch.empty_like(c)
    kept = (memory.empty(x, 1, B, 4 * H), memory.empty(x, 1, B, H)) if save else ()
    if B == 0:
        return h_n, c_n, *kept
    weights, pointers, full = in_c_order(weights)
    gates, cells = (t.data_ptr() for t in kept) if save else (0, 0)
    y = h_n.data_ptr()
    call(
        "lstm_forward",
        x.dtype,
        _forward_arguments(
            *(1, B, I, H, P, 1, full, False, *grid(1, B, B * 4 * H * (I + P), H, 1), 0),
            *(unpacked(1, B), 0, 0),
            *(x.data_ptr(), h.data_ptr(), c.data_ptr(), y, y, c_n.data_ptr(), gates, cells, 0),
            *pointers,
        ),
    )
    return h_n, c_n, *kept


def lstm_dual(
    tx: Tensor | None,
    th0: Tensor | None,
    tc0: Tensor | None,
    tweights: Sequence[Tensor | None],
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor | None],
    return_cells: bool,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """`lstm_dual` of kernels/lstm_dual.py on CPU tensors, without projection and full peepholes."""
    x, h0, c0 = x.contiguous(), h0.contiguous(), c0.contiguous()
    tx, th0, tc0 = (None if t is None else t.contiguous() for t in (tx, th0, tc0))
    (N, I), (D, B, H) = x.shape, c0.shape
    T, lengths = steps(N, B, batch_sizes)
    shapes = [(N, D * H), (D, B, H), (D, B, H), *([(D, N, H)] if return_cells else [])]
    out, tout = (tuple([memory.empty(x, *shape) for shape in shapes]) for _ in range(2))
    if T == 0:
        for t, given in zip((*out[1:3], *tout[1:3]), (h0, c0, th0, tc0), strict=True):
            t.zero_() if given is None else t.copy_(given)
        return out, tout
    weights, pointers, _ = in_c_order(weights)
    tweights, tpointers, _ = in_c_order(tweights)
    products = sum(t is not None for t in (tx, tweights[0])) * I
    products += I + H * (2 + (tweights[1] is not None))
    call(
        "lstm_dual",
        x.dtype,
        _dual_arguments(
            *(T, B, I, H, H, D, 0, False, *grid(T, B, N * 4 * H * products, H, D), lengths),
            *(0, 0, 0, x.data_ptr(), h0.data_ptr(), c0.data_ptr()),
            *(t.data_ptr() for t in out[:3]),
            *(0, out[3].data_ptr() if return_cells else 0, 0),
            *pointers,
            *(0 if t is None else t.data_ptr() for t in (tx, th0, tc0)),
            *(t.data_ptr() for t in tout[:3]),
            tout[3].data_ptr() if return_cells else 0,
            *tpointers,
        ),
    )
    return out, tout


def unpacked(T: int, N: int) -> bool:
    """Whether packing the weights would not pay for so few rows."""
    if _override.unpacked is not None:
        return _override.unpacked
    return N <= (24 if T == 1 else 12)


def lstm_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    c0: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor | None],
    gates: Tensor,
    cells: Tensor,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`torch_manual::lstm_backward` on CPU tensors."""
    dtype = gates.dtype
    if dtype in HALF:
        single = [
            None if t is None else t.float()
            for t in (dy, dh_n, dc_n, dcells, c0, gates, cells, *weights)
        ]
        dy, dh_n, dc_n, dcells, c0, gates, cells, *weights = single  # type: ignore[assignment]
        results = lstm_backward(
            dy, dh_n, dc_n, dcells, c0, batch_sizes, weights, gates, cells, reverse
        )
        return tuple(t.to(dtype) for t in results)  # type: ignore[return-value]
    gates, cells, c0 = gates.contiguous(), cells.contiguous(), c0.contiguous()
    dh_n, dc_n, dcells = (None if t is None else t.contiguous() for t in (dh_n, dc_n, dcells))
    weights, pointers, full = in_c_order(weights)
    weight_hh, projected = weights[1], weights[4] is not None
    assert weight_hh is not None
    (D, N, _), (_, B, H), P = gates.shape, c0.shape, weight_hh.shape[1]
    dpre = memory.empty(gates, *gates.shape)
    dh = memory.empty(gates, D, N, P) if projected else gates.new_empty(D, 0)
    dh0, dc0 = gates.new_empty(D, B, P), torch.empty_like(c0)
    T, lengths = steps(N, B, batch_sizes)
    if T == 0:
        for out, given in ((dh0, dh_n), (dc0, dc_n)):
            out.zero_() if given is None else out.copy_(given)
        return dpre, dh, dh0, dc0
    dy, stride_dy = rows_of(dy)
    work = N * 4 * H * P
    threads_of = thinned(grid(T, B, work, H, D, backward=True))
    call(
        "lstm_backward",
        dtype,
        _backward_arguments(
            *(T, B, 0, H, P, D, full, reverse, *threads_of, lengths),
            *(0 if dy is None else dy.data_ptr(), stride_dy),
            *(0 if t is None else t.data_ptr() for t in (dh_n, dc_n, dcells)),
            *(c0.data_ptr(), gates.data_ptr(), cells.data_ptr()),
            *(dpre.data_ptr(), dh.data_ptr(), dh0.data_ptr(), dc0.data_ptr()),
            *pointers,
        ),
    )
    return dpre, dh, dh0, dc0


def rows_of(dy: Tensor | None) -> tuple[Tensor | None, int]:
    """`dy` with dense rows, and the stride between them: 0 where one row stands for all."""
    if dy is None:
        return None, 0
    if dy.stride(0) == 0:  # as in the gradient of y.sum()
        return dy[:1].contiguous(), 0
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    return dy, dy.stride(0)


def call(name: str, dtype: torch.dtype, arguments: bytes) -> None:
    begun = time.monotonic()
    outcome = _run(_functions()[name, dtype], arguments)
    if outcome == crowding.CROWDED:
        crowding.note(begun)
    elif outcome:
        raise MemoryError(f"{name}: no memory for the packed weights")


def _run(function: Any, *arguments: Any) -> int:
    global _caller
    if not _forked or torch.get_num_threads() == 1:
        return function(*arguments)
    _caller = _caller or ThreadPoolExecutor(1, "torch_manual")
    return _caller.submit(function, *arguments).result()


def multiply_add(dtype: torch.dtype, n_threads: int, repeats: int) -> int:
    """Keep the processor multiplying and adding in registers; return how many operations it did."""
    function = _functions()["multiply_add", dtype]
    function.argtypes, function.restype = [ctypes.c_int64] * 2, ctypes.c_int64
    return _run(function, n_threads, repeats)


def steps(n_rows: int, batch: int, batch_sizes: Tensor | None) -> tuple[int, int]:
    """T, and the address of batch_sizes or 0."""
    if batch_sizes is None:
        return (n_rows // batch if batch else 0), 0
    return len(batch_sizes), batch_sizes.data_ptr()


def in_c_order(
    weights: Sequence[Tensor | None],
) -> tuple[Sequence[Tensor | None], tuple[int, ...], bool]:
    """The weights in C order, their addresses (of two directions), and if peepholes are full."""
    addresses = []
    for w in weights:
        if w is None:
            addresses.append(0)
        elif w.is_contiguous():
            addresses.append(w.data_ptr())
        else:
            return in_c_order([None if w is None else w.contiguous() for w in weights])
    pointers = tuple(addresses)
    full = pointers[5:_WEIGHTS] != _NONE[5:] and _is_full(weights[5:_WEIGHTS])
    return weights, pointers if len(pointers) > _WEIGHTS else pointers + _NONE, full


def _is_full(peepholes: Sequence[Tensor | None]) -> bool:
    return any(w is not None and w.dim() == 2 for w in peepholes)
