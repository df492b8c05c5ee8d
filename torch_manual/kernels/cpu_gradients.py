"""A backward pass and the sums that follow it in one call of the compiled kernel: B1 to B13.

The ops of kernels/lstm.py and kernels/lstm_sums.py, but nothing is looked at in between: small
layers spend more time in Python than in their gradient, and h_{t-1} need not be copied for B12.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_manual.kernels import backend, cpu, memory
from torch_manual.kernels.cpu_sums import DTYPES
from torch_manual.kernels.lstm import LSTMWeights, dispatched

_N_WEIGHTS = len(LSTMWeights._fields)
_NOTHING = (0,) * cpu.WEIGHT_SUMS_WORDS
_arguments = struct.Struct(f"{cpu.BACKWARD_WORDS + 10 + 2 * cpu.WEIGHT_SUMS_WORDS + 2}q").pack


def lstm_gradients(
    needs: Sequence[bool],
    outer: Sequence[Tensor | None],
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    weights: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...] | None:
    """`lstm_gradients` of functions/lstm_gradients.py; None where this does not serve.

    It serves dense and packed batches in float32 and float64, without projections and full
    peepholes. The gradients of diagonal peepholes are left out.
    """
    dtype = x.dtype
    if (
        dtype not in DTYPES
        or any(w is not None and _refused(k % _N_WEIGHTS, w) for k, w in enumerate(weights))
        or len(x) == 0
        or dispatched(*outer, x, h0, c0, y, gates, cells, *weights)
        or backend.triton_serves(x)
        or not cpu.serves(dtype)
    ):
        return None
    dy, stride_dy = cpu.rows_of(outer[0])
    dh_n, dc_n, dcells = (None if t is None else t.contiguous() for t in outer[1:])
    x, h0, c0, y, gates, cells = (t.contiguous() for t in (x, h0, c0, y, gates, cells))
    weights, pointers, _ = cpu.in_c_order(weights)
    (N, I), (D, B, H), M = x.shape, c0.shape, gates.shape[2]
    T, lengths = cpu.steps(N, B, batch_sizes)
    dx = cpu.empty(x, N, I) if needs[0] else None
    dpre = memory.empty(gates, D, N, M)
    dh0, dc0 = torch.empty_like(h0), torch.empty_like(c0)
    size = x.element_size()
    at_dpre, at_h0, at_y = dpre.data_ptr(), h0.data_ptr(), y.data_ptr()
    dweights: list[Tensor | None] = []
    sums: list[int] = []
    copies = [0, 0]
    for d in range(D):
        ih, hh, b_ih, b_hh = needs[3 + d * _N_WEIGHTS :][:4]
        given = (
            cpu.empty(x, M, I) if ih else None,
            cpu.empty(x, M, H) if hh else None,
            x.new_empty(M) if b_ih else None,
            x.new_empty(M) if b_hh else None,
        )
        dweights += *given, None, None, None, None
        dweight_ih, dweight_hh, dbias_ih, dbias_hh = _addresses(given)
        if b_ih and b_hh:
            copies[d] = dbias_hh
        threads = cpu.threads(N * M * (I * ih + H * hh))
        sums += N, I, H, M, threads, 1
        sums += at_dpre + d * N * M * size, x.data_ptr(), at_y + d * H * size
        sums += dweight_ih, dweight_hh, dbias_ih or dbias_hh
        sums += at_h0 + d * B * H * size, y.stride(0), d, T, B, lengths
    cpu.call(
        "lstm_gradients",
        dtype,
        _arguments(
            *(T, B, 0, H, H, D, 0, False, *cpu.grid(T, B, N * M * H, H, D), lengths),
            *_addresses((dy,)),
            stride_dy,
            *_addresses((dh_n, dc_n, dcells, c0, gates, cells, dpre, None, dh0, dc0)),
            *pointers,
            *(N, I, M, D, cpu.threads(N * M * I), 0 if dx is None else dx.data_ptr()),
            *(at_dpre, at_dpre + (D - 1) * N * M * size, pointers[0], pointers[_N_WEIGHTS]),
            *(sums if D == 2 else (*sums, *_NOTHING)),
            *copies,
        ),
    )
    return (
        dx,
        dh0 if needs[1] else None,
        dc0 if needs[2] else None,
        dpre,
        gates.new_empty(D, 0),
        *dweights,
    )


def _refused(place: int, w: Tensor) -> bool:
    """Whether a weight, the `place`-th of LSTMWeights, is a projection or a full peephole."""
    return place == 4 or (place > 4 and w.dim() == 2)


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]
