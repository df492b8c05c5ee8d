"""The loops of lstm_tangent.py in the compiled CPU kernel (csrc/lstm_tangent.h).

Same arguments and results as `_tangent_direction` and `_backward_tangent_direction` there. What
does not depend on another step is taken here, over all rows at once; the kernel then goes the way
of a forward or a backward pass, with the one product a step that these have.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_manual.kernels import cpu, cpu_grid, cpu_library, memory
from torch_manual.kernels.cpu_sums import lstm_input_sums
from torch_manual.kernels.lstm import LSTMWeights, _peep, _peep_back
from torch_manual.kernels.lstm_tangent import Products, filled, known_tpre
from torch_manual.kernels.rows import first, previous

_tangent_arguments = struct.Struct(f"{cpu.FORWARD_WORDS + 4}q").pack
_backward_tangent_arguments = struct.Struct(f"{cpu.BACKWARD_WORDS + 7}q").pack


def tangent_direction(
    products: Products,
    th: Tensor,
    tc: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    w: LSTMWeights,
    tw: LSTMWeights,
    gates: Tensor,
    cells: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (N, H), (B, P) = cells.shape, th.shape
    th, tc, c0, gates, cells = (t.contiguous() for t in (th, tc, c0, gates, cells))
    x, weight_ih = _as_one_product(products)
    x = None if x is None else x.contiguous()
    peeping = any(t is not None for t in tw[5:])
    known = x is None or peeping
    if known:
        tpre = known_tpre([], tw[2:4] if x is None else (), gates)
    else:
        tpre = memory.empty_like(gates)
    if peeping:
        c_prev = previous(cells, c0, batch_sizes, reverse)
        tpre_i, tpre_f, _, tpre_o = tpre.chunk(4, -1)
        tpre_i.copy_(_peep(tpre_i, c_prev, tw.weight_ci))
        tpre_f.copy_(_peep(tpre_f, c_prev, tw.weight_cf))
        tpre_o.copy_(_peep(tpre_o, cells, tw.weight_co))
    if tw.weight_hr is not None:
        ty = (gates.chunk(4, -1)[3] * torch.tanh(cells)) @ tw.weight_hr.T
    else:
        ty = cells.new_zeros(N, P) if w.weight_hr is not None else memory.empty(cells, N, P)
    tcells, th_n, tc_n = memory.empty_like(cells), torch.empty_like(th), torch.empty_like(tc)
    T, lengths = cpu.steps(N, B, batch_sizes)
    if T == 0:
        return ty, th, tc, tpre, tcells
    weights, pointers, full = cpu.in_c_order((weight_ih, w.weight_hh, tw[2], tw[3], *w[4:]))
    I = 0 if x is None else x.shape[1]
    cpu_library.call(
        "lstm_tangent",
        cells.dtype,
        _tangent_arguments(
            *(T, B, I, H, P, 1, full, reverse),
            *(*cpu_grid.grid(T, B, N * 4 * H * (I + P), H, 1), lengths),
            *(0, 0, 0, *cpu.addresses((x, th, tc))),
            *(ty.data_ptr(), th_n.data_ptr(), tc_n.data_ptr(), tpre.data_ptr(), tcells.data_ptr()),
            *(0, 0, *pointers),
            *(*cpu.addresses((gates, cells, c0)), known),
        ),
    )
    return ty, th_n, tc_n, tpre, tcells


def _as_one_product(products: Products) -> tuple[Tensor | None, Tensor | None]:
    """The factors of the sum of all, (N, K) and (4H, K); without terms there are none."""
    products = [factors for factors in products if factors[0].shape[1] > 0]
    if len(products) < 2:
        return products[0] if products else (None, None)
    a, b = zip(*products, strict=True)
    return torch.cat(a, 1), torch.cat(b, 1)


def backward_tangent_direction(
    dh: Tensor,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    touter: Sequence[Tensor | None],
    dpre: Tensor,
    c0: Tensor,
    tc0: Tensor,
    batch_sizes: Tensor | None,
    w: LSTMWeights,
    tw: LSTMWeights,
    gates: Tensor,
    cells: Tensor,
    tgates: Tensor,
    tcells: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (N, H), B, P = cells.shape, len(c0), w.weight_hh.shape[1]
    T, lengths = cpu.steps(N, B, batch_sizes)
    tdy, tdh_n, tdc_n, tdcells = touter
    tdh0, tdc0 = filled(tdh_n, cells, B, P), filled(tdc_n, cells, B, H)
    tdpre = memory.empty(gates, *gates.shape)
    tdh = cells.new_empty((N, P) if w.weight_hr is not None else 0)
    if T == 0:
        return tdpre, tdh, tdh0, tdc0

    def from_next(sent: Tensor) -> Tensor:
        """What every row is sent by the step after it; of the last step, zeros."""
        return previous(sent, sent.new_zeros(B, sent.shape[1]), batch_sizes, not reverse)

    dm = dh if w.weight_hr is None else dh @ w.weight_hr
    tdm = None if tw.weight_hr is None else dh @ tw.weight_hr  # R10
    tsent = None if tw.weight_hh is None else lstm_input_sums([dpre], [tw.weight_hh])  # R17
    if tsent is not None:
        tdy = _sum(from_next(tsent), tdy)
    sent_c, tsent_c = _sent_to_cell(dpre, w), _sent_to_cell(dpre, tw)  # R16
    dpre_o = dpre.chunk(4, -1)[3]
    dc_given = _sum(dcells, None if sent_c is None else from_next(sent_c))
    dc_given = _sum(dc_given, _through(dpre_o, w.weight_co))
    tdc_given = _sum(tdcells, None if tsent_c is None else from_next(tsent_c))
    tdc_given = _sum(tdc_given, _through(dpre_o, tw.weight_co))  # R12
    dc_next = filled(dc_n, cells, B, H)
    given = [_contiguous(t) for t in (tdy, tdh_n, tdc_n, tdc_given, c0, gates, cells)]
    more = [_contiguous(t) for t in (dm, tdm, dc_given, dc_next, tgates, tcells, tc0)]
    weights, pointers, full = cpu.in_c_order(_of_recurrence(w))
    addresses = cpu.addresses(given)
    cpu_library.call(
        "lstm_backward_tangent",
        cells.dtype,
        _backward_tangent_arguments(
            *(T, B, 0, H, P, 1, full, reverse),
            *(*cpu_grid.grid(T, B, N * 4 * H * P, H, 1, backward=True), lengths),
            *(addresses[0], P, *addresses[1:]),
            *(tdpre.data_ptr(), tdh.data_ptr(), tdh0.data_ptr(), tdc0.data_ptr()),
            *pointers,
            *cpu.addresses(more),
        ),
    )
    for out, sent in ((tdh0, tsent), (tdc0, tsent_c)):
        if sent is not None:
            out += first(sent, B, batch_sizes, reverse)
    return tdpre, tdh, tdh0, tdc0


def _of_recurrence(w: LSTMWeights) -> LSTMWeights:
    """The weights that the recurrences read."""
    return w._replace(weight_ih=None, bias_ih=None, bias_hh=None)  # type: ignore[arg-type]


def _sent_to_cell(dpre: Tensor, w: LSTMWeights) -> Tensor | None:
    """What the gates of every row send to the cell of the row before it through peepholes."""
    dpre_i, dpre_f, _, _ = dpre.chunk(4, -1)
    return _sum(_through(dpre_i, w.weight_ci), _through(dpre_f, w.weight_cf))


def _through(dpre: Tensor, weight: Tensor | None) -> Tensor | None:
    return None if weight is None else _peep_back(dpre, weight)  # type: ignore[return-value]


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
