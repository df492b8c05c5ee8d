"""lstm_sums.py on CPU tensors, by the compiled kernel (csrc/lstm_sums.h).

BLAS would serve, and does for other dtypes; the kernel's own tiles take 10 to 30 % less time here,
and the bias' gradient comes with them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_manual.kernels import cpu, cpu_grid, cpu_library, memory

DTYPES = (torch.float32, torch.float64)
_input_sums_arguments = struct.Struct("11q").pack
_NOT_DELAYED = (0,) * 6
_peephole_sums_arguments = struct.Struct("9q").pack
_weight_sums_arguments = struct.Struct("19q").pack


def lstm_input_sums(dpre: Sequence[Tensor], weights_ih: Sequence[Tensor]) -> Tensor:
    dpre, weights_ih = ([t.contiguous() for t in ts] for ts in (dpre, weights_ih))
    (N, K), I, D = dpre[0].shape, weights_ih[0].shape[1], len(dpre)
    dx = memory.empty(dpre[0], N, I)
    addresses = cpu.addresses(t for ts in (dpre, weights_ih) for t in (ts[0], ts[-1]))
    threads = cpu_grid.threads(N * K * I)  # of one direction, so that one alone gives the same bits
    cpu_library.call(
        "lstm_input_sums",
        dx.dtype,
        _input_sums_arguments(N, I, K, K, D, threads, dx.data_ptr(), *addresses),
    )
    return dx


def lstm_weight_sums(
    dpre: Tensor,
    x: Tensor | None,
    h_prev: Tensor | None,
    bias: bool,
    samples: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dpre = dpre.contiguous()
    S = 1 if samples is None else samples
    N, M = dpre.shape[0] // S if S else 0, dpre.shape[1]
    apart = () if samples is None else (samples,)
    given, results, widths = [], [], []
    for t in (x, h_prev):
        given.append(None if t is None else t.contiguous())
        widths.append(0 if t is None else t.shape[1])
        results.append(
            dpre.new_empty(0) if t is None else memory.empty(dpre, *apart, M, t.shape[1])
        )
    results.append(memory.empty(dpre, *apart, M) if bias else dpre.new_empty(0))
    if N == 0:
        return tuple(t.zero_() for t in results)  # type: ignore[return-value]
    cpu_library.call(
        "lstm_weight_sums",
        dpre.dtype,
        _weight_sums_arguments(
            *(N, *widths, M, cpu_grid.threads(N * S * M * sum(widths)), S, S * M),
            *cpu.addresses((dpre, *given)),
            *(t.data_ptr() for t in results),
            *_NOT_DELAYED,
        ),
    )
    return results[0], results[1], results[2]


def lstm_peephole_sums(dpre: Tensor, c_prev: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    dpre, c_prev, c = dpre.contiguous(), c_prev.contiguous(), c.contiguous()
    N, H = c.shape
    dweights = c.new_empty(H), c.new_empty(H), c.new_empty(H)
    if N == 0:
        return tuple(t.zero_() for t in dweights)
    threads = cpu_grid.threads(N * 3 * H)
    addresses = cpu.addresses((dpre, c_prev, c, *dweights))
    cpu_library.call(
        "lstm_peephole_sums", c.dtype, _peephole_sums_arguments(N, H, threads, *addresses)
    )
    return dweights
