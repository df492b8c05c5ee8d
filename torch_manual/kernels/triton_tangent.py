"""The loops of lstm_tangent.py with their gate mathematics in Triton; products stay torch's.

Same arguments and results as `_tangent_direction` and `_backward_tangent_direction` there. Full
peepholes are left to those.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_manual.kernels.lstm import LSTMWeights
from torch_manual.kernels.lstm_tangent import Products, filled, filled_outer, known_tpre
from torch_manual.kernels.rows import previous, steps
from torch_manual.kernels.triton import launched_beside


@launched_beside(3)
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
    from torch_manual.triton_kernels.lstm.tangent import step_tangent

    th, tc, gates, cells = (t.contiguous() for t in (th, tc, gates, cells))
    tpre = known_tpre(products, tw[2:4], gates)
    ty = th.new_empty(len(cells), th.shape[1])
    tgates, tcells, tm = torch.empty_like(gates), torch.empty_like(cells), torch.empty_like(tc)
    c_before = previous(cells, c0, batch_sizes, reverse).contiguous()
    peepholes = _peepholes(w, tw)
    order = steps(len(cells), len(th), batch_sizes)
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


@launched_beside(5)
def backward_tangent_direction(
    dh_rows: Tensor,
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
    from torch_manual.triton_kernels.lstm.tangent import step_backward_tangent

    dc_next, dcells = filled(dc_n, c0, *c0.shape), filled(dcells, cells, *cells.shape)
    tdy, tdh_next, tdc_next, tdcells = filled_outer(touter, c0, w, cells)
    c_before = previous(cells, c0, batch_sizes, reverse).contiguous()
    tc_before = previous(tcells, tc0, batch_sizes, reverse).contiguous()
    dh_rows, dpre, gates, cells, tgates, tcells = (
        t.contiguous() for t in (dh_rows, dpre, gates, cells, tgates, tcells)
    )
    tdpre = torch.empty_like(dpre)
    tdh_rows = torch.empty_like(dh_rows) if w.weight_hr is not None else dpre.new_empty(0)
    peepholes = _peepholes(w, tw)
    order = steps(len(dpre), len(c0), batch_sizes)
    for rows in order if reverse else reversed(order):
        n = rows.stop - rows.start
        dh = dm = dh_rows[rows]
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
