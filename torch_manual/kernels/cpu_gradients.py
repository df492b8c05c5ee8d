"""A backward pass and the sums that follow it in one call of the compiled kernel: B1 to B13, B15.

The ops of kernels/lstm.py and kernels/lstm_sums.py, but nothing is looked at in between: small
layers spend more time in Python than in their gradient, and the kernel takes the sums over a few
steps while what they are sums of is in the cache (csrc/lstm_gradients.h). To train in little
memory, the same call runs the forward pass again, a segment at a time.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_manual.kernels import backend, cpu, cpu_grid, cpu_library, crowding, memory
from torch_manual.kernels.cpu_sums import DTYPES
from torch_manual.kernels.lstm import LSTMWeights, dispatched

SMALL = 256  # units: beyond, the weights that a chunk's sums read leave no cache for its dpre
_N_WEIGHTS = len(LSTMWeights._fields)
_WEIGHT_HR = LSTMWeights._fields.index("weight_hr")
_NOTHING = (0,) * _N_WEIGHTS
_arguments = struct.Struct(f"{cpu.SIZES_WORDS + 4 + 6 + 17 + 4 * _N_WEIGHTS}q").pack


def serves(x: Tensor, weights: Sequence[Tensor | None], *others: Tensor | None) -> bool:
    """Whether this file does, given all tensors of a call."""
    return does(x, weights) and not dispatched(x, *others, weights=weights)


def does(x: Tensor, weights: Sequence[Tensor | None]) -> bool:
    """Whether it does if nobody listens to the dispatcher.

    It does for dense and packed batches in float32 and float64 without projections.
    """
    return (
        x.dtype in DTYPES
        and all(w is None for w in weights[_WEIGHT_HR::_N_WEIGHTS])
        and x.shape[0] > 0
        and x.is_cpu
        and not backend.triton_serves(x)
        and cpu_library.serves(x.dtype)
    )


def chunk_rows(H: int, itemsize: int) -> int:
    """How many rows of a recurrence to do before the sums over them: of 2 MiB of dpre, or 1024."""
    return (2 << 20) // (4 * H * itemsize) if H <= SMALL else 1024


def most_segments(T: int, B: int, H: int, itemsize: int, recompute: int) -> int:
    """How many segments of `recompute` steps or more a pass has at most."""
    return -(-T // torch.sym_max(recompute, chunk_rows(H, itemsize) // B))


def lstm_forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor | None],
    recompute: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, h_n, c_n and, (segments, D, B, H), c before every segment of `recompute` steps."""
    D, B, H = c0.shape
    T, _ = cpu.steps(x.shape[0], B, batch_sizes)
    c_kept = x.new_empty(most_segments(T, B, H, x.element_size(), recompute), D, B, H)
    given = x, h0, c0, batch_sizes, weights, (0, 0, c_kept.data_ptr())
    return *cpu.run_forward(*given, recompute, chunk_rows(H, x.element_size())), c_kept


def lstm_gradients(
    needs: Sequence[bool],
    outer: Sequence[Tensor | None],
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    y: Tensor,
    gates: Tensor | None,
    cells: Tensor | None,
    weights: Sequence[Tensor | None],
    keep_dpre: bool = False,
    recompute: int = 0,
    c_kept: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """`lstm_gradients` of functions/lstm_gradients.py, where `serves` has it so.

    With one direction h0 and c0 may be (B, H), and so are their gradients then.

    Args:
        keep_dpre: return dpre and dh; else None stands in their place.
        recompute, c_kept: what `lstm_forward` was given and has kept, in place of gates and cells.
    """
    dy, stride_dy = cpu.rows_of(outer[0])
    dh_n, dc_n, dcells = (None if t is None else t.contiguous() for t in outer[1:])
    x, h0, c0, y = x.contiguous(), h0.contiguous(), c0.contiguous(), y.contiguous()
    gates, cells = (None if t is None else t.contiguous() for t in (gates, cells))
    weights, pointers, full = cpu.in_c_order(weights)
    (N, I), (*directions, B, H) = x.shape, c0.shape
    D = directions[0] if directions else 1
    T, lengths = cpu.steps(N, B, batch_sizes)
    dx = memory.empty(x, N, I) if needs[0] else None
    rows = chunk_rows(H, x.element_size())
    dpre = memory.empty(x, D, N, 4 * H) if keep_dpre else None
    dh = memory.empty(x, D, N, H) if keep_dpre else None
    dh0, dc0 = torch.empty_like(h0) if needs[1] else None, torch.empty_like(c0)
    dweights = [
        memory.empty_like(w) if need and w is not None else None
        for w, need in zip(weights, needs[3:], strict=True)
    ]
    to_dweights = cpu.addresses(dweights)
    cpu_library.call(
        "lstm_gradients",
        x.dtype,
        _arguments(
            *(T, B, I, H, H, D, full, False),
            *(*cpu_grid.thinned(cpu_grid.grid(T, B, N * 4 * H * H, H, D, backward=True)), lengths),
            *cpu_grid.thinned(cpu_grid.grid(T, B, N * 4 * H * (I + H), H, D)),
            *(N, cpu_grid.threads(N * 4 * H * (I + H)), crowding.spared()),
            *(cpu_grid.unpacked(T, N), recompute, rows),
            *cpu.addresses((x, h0, c0, y, gates, cells, c_kept, dy)),
            stride_dy,
            *cpu.addresses((dh_n, dc_n, dcells, dpre, dh, dh0, dc0, dx)),
            *pointers,
            *(to_dweights if D == 2 else (*to_dweights, *_NOTHING)),
        ),
    )
    return (
        dx,
        dh0,
        dc0 if needs[2] else None,
        dpre,
        dh,
        *dweights,
    )
