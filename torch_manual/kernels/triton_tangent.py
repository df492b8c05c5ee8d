"""The loops of lstm_tangent.py with their gate mathematics in Triton; products stay torch's.

Same arguments and results as `_tangent_direction` and `_backward_tangent_direction` there. Full
peepholes are left to those.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_manual.kernels.lstm import LSTMWeights
from torch_manual.kernels.rows import steps


def tangent_direction(
    tx: Tensor | None,
    th: Tensor,
    tc: Tensor,
    tw: LSTMWeights,
    x: Tensor,
    h_before: Tensor,
    c_before: Tensor,
    batch_sizes: Tensor | None,
    w: LSTMWeights,
    gates: Tensor,
    cells: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from torch_manual.triton_kernels.lstm.tangent import step_tangent

    th, tc, gates, cells = (t.contiguous() for t in (th, tc, gates, cells))
    ty = x.new_empty(len(x), th.shape[1])
    tgates, tcells, tm = torch.empty_like(gates), torch.empty_like(cells), torch.empty_like(tc)
    tpre = torch.zeros_like(gates)
    for a, b in ((tx, w.weight_ih), (x, tw.weight_ih), (h_before, tw.weight_hh)):
        if a is not None and b is not None:
            tpre += a @ b.T
    for tbias in (tw.bias_ih, tw.bias_hh):
        if tbias is not None:
            tpre += tbias
    peepholes = _peepholes(w, tw)
    order = steps(len(x), len(th), batch_sizes)
    for rows in reversed(order) if reverse else order:
        n = rows.stop - rows.start
        tpre[rows].addmm_(th[:n], w.weight_hh.T)  # R1
        step_tangent(
            *(tpre[rows], tc[:n], gates[rows], cells[rows], c_before[rows], peepholes),
            *(tgates[rows], tcells[rows], tm[:n]),
        )
        th[:n] = tm[:n] if w.weight_hr is None else tm[:n] @ w.weight_hr.T  # R8
        if tw.weight_hr is not None:
            m = gates[rows, -cells.shape[1] :] * torch.tanh(cells[rows])
            th[:n] += m @ tw.weight_hr.T
        ty[rows] = th[:n]
    return ty, th, tc, tgates, tcells


def backward_tangent_direction(
    outer: tuple[Tensor, ...],
    touter: tuple[Tensor, ...],
    dpre: Tensor,
    c_before: Tensor,
    tc_before: Tensor,
    batch_sizes: Tensor | None,
    w: LSTMWeights,
    tw: LSTMWeights,
    gates: Tensor,
    cells: Tensor,
    tgates: Tensor,
    tcells: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from torch_manual.triton_kernels.lstm.tangent import step_backward_tangent

    dy, dh_next, dc_next, dcells = outer
    tdy, tdh_next, tdc_next, tdcells = (t.contiguous() for t in touter)
    dc_next = dc_next.contiguous()
    dpre, gates, cells, tgates, tcells = (
        t.contiguous() for t in (dpre, gates, cells, tgates, tcells)
    )
    tdpre = torch.empty_like(dpre)
    tdh_rows = torch.empty_like(dy) if w.weight_hr is not None else dy.new_empty(0)
    sent_back = dpre @ w.weight_hh
    peepholes = _peepholes(w, tw)
    order = steps(len(dy), len(dh_next), batch_sizes)
    for rows in order if reverse else reversed(order):
        n = rows.stop - rows.start
        dh = dm = dy[rows] + dh_next[:n]
        tdh = tdm = tdy[rows] + tdh_next[:n]  # R9
        if w.weight_hr is not None:
            dm, tdm = dh @ w.weight_hr, tdh @ w.weight_hr  # R10
            tdh_rows[rows] = tdh
        if tw.weight_hr is not None:
            tdm = tdm + dh @ tw.weight_hr
        dc_next[:n] += dcells[rows]
        tdc_next[:n] += tdcells[rows]
        step_backward_tangent(
            *(dm, tdm, dpre[rows], dc_next[:n], tdc_next[:n], gates[rows], tgates[rows]),
            *(cells[rows], tcells[rows], c_before[rows], tc_before[rows], peepholes, tdpre[rows]),
        )
        tdh_next[:n] = tdpre[rows] @ w.weight_hh  # R17
        if tw.weight_hh is not None:
            tdh_next[:n] += dpre[rows] @ tw.weight_hh
        dh_next[:n] = sent_back[rows]
    return tdpre, tdh_rows, tdh_next, tdc_next


def _peepholes(w: LSTMWeights, tw: LSTMWeights) -> tuple[Tensor | None, ...]:
    """The diagonal peepholes and their tangents, zero where there is none; without any, None."""
    if w.weight_ci is None:
        return (None,) * 6
    weights = [t.contiguous() for t in w[5:8] if t is not None]
    tangents = [
        torch.zeros_like(t) if u is None else u.contiguous()
        for t, u in zip(weights, tw[5:8], strict=True)
    ]
    return *weights, *tangents
