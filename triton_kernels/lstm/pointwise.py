"""L0: the gate mathematics in one launch per step, around torch's matrix products.

It serves every shape and dtype, projections and full peepholes, and is what the other levels fall
back on. `forward_ref` and `backward_ref`: `_forward_direction` and `_backward_direction` of
torch_manual/kernels/lstm.py, whose loops these are.

Shapes: N rows, B sequences of which the first n are alive in a step, H units, P outputs; everything
of one direction, contiguous, in the dtype of accumulation; `y`, `gates`, `cells`, `dpre` in the
dtype of storage, y (N, P) with any stride over rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch_manual.triton_kernels.lstm.gates import (
    cell,
    cell_backward,
    load_peepholes,
    output,
    output_backward,
)

BLOCK = 256


@triton.jit(do_not_specialize=["n"])
def _lstm_pointwise_forward_kernel(
    pre_ptr,  # (n, 4H)
    weight_ci_ptr,  # (H,), also cf and co
    weight_cf_ptr,
    weight_co_ptr,
    c_ptr,  # (n, H): c_prev in, c out
    m_ptr,  # (n, H)
    y_ptr,  # (n, H), unless PROJECTED
    gates_ptr,  # (n, 4H), if SAVE
    cells_ptr,  # (n, H), if SAVE
    n,
    H,
    stride_y_n,
    CELL: tl.constexpr,
    OUTPUT: tl.constexpr,
    PEEPHOLES: tl.constexpr,
    PROJECTED: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """F2 to F7; with a full peephole in two launches, as the output gate sees the new cell."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n.to(tl.int64) * H
    row, col = offs // H, offs % H
    at_gate = row * 4 * H + col
    dtype: tl.constexpr = c_ptr.dtype.element_ty
    w_ci, w_cf, w_co = load_peepholes(
        weight_ci_ptr, weight_cf_ptr, weight_co_ptr, col, mask, dtype, PEEPHOLES
    )
    c = tl.load(c_ptr + offs, mask=mask, other=0.0)
    if CELL:
        pre_i = tl.load(pre_ptr + at_gate, mask=mask, other=0.0)
        pre_f = tl.load(pre_ptr + at_gate + H, mask=mask, other=0.0)
        pre_g = tl.load(pre_ptr + at_gate + 2 * H, mask=mask, other=0.0)
        i, f, g, c = cell(pre_i, pre_f, pre_g, c, w_ci, w_cf, PEEPHOLES)
        tl.store(c_ptr + offs, c, mask=mask)
        if SAVE:
            tl.store(gates_ptr + at_gate, i, mask=mask)
            tl.store(gates_ptr + at_gate + H, f, mask=mask)
            tl.store(gates_ptr + at_gate + 2 * H, g, mask=mask)
            tl.store(cells_ptr + offs, c, mask=mask)
    if OUTPUT:
        pre_o = tl.load(pre_ptr + at_gate + 3 * H, mask=mask, other=0.0)
        o, m = output(pre_o, c, w_co, PEEPHOLES)
        tl.store(m_ptr + offs, m, mask=mask)
        if not PROJECTED:
            tl.store(y_ptr + row * stride_y_n + col, m, mask=mask)
        if SAVE:
            tl.store(gates_ptr + at_gate + 3 * H, o, mask=mask)


@triton.jit(do_not_specialize=["n"])
def _lstm_pointwise_backward_kernel(
    dm_ptr,  # (n, H)
    dc_ptr,  # (n, H): dc_next in, dc_prev out
    dpre_o_ptr,  # (n, H), scratch between the two launches
    gates_ptr,  # (n, 4H)
    cells_ptr,  # (n, H)
    c_prev_ptr,  # (n, H)
    weight_ci_ptr,  # (H,), also cf and co
    weight_cf_ptr,
    weight_co_ptr,
    dpre_ptr,  # (n, 4H)
    n,
    H,
    CELL: tl.constexpr,
    OUTPUT: tl.constexpr,
    PEEPHOLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """B3 to B8; with a full peephole in two launches, as B4 waits for dpre_o W_co."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n.to(tl.int64) * H
    row, col = offs // H, offs % H
    at_gate = row * 4 * H + col
    dtype: tl.constexpr = dc_ptr.dtype.element_ty
    dm = tl.load(dm_ptr + offs, mask=mask, other=0.0)
    o = tl.load(gates_ptr + at_gate + 3 * H, mask=mask, other=0.0).to(dtype)
    c = tl.load(cells_ptr + offs, mask=mask, other=0.0).to(dtype)
    if OUTPUT:
        dpre_o = output_backward(dm, o, c)
        tl.store(dpre_ptr + at_gate + 3 * H, dpre_o, mask=mask)
        if not CELL:
            tl.store(dpre_o_ptr + offs, dpre_o, mask=mask)
    if CELL:
        if not OUTPUT:
            dpre_o = tl.load(dpre_o_ptr + offs, mask=mask, other=0.0)
        w_ci, w_cf, w_co = load_peepholes(
            weight_ci_ptr, weight_cf_ptr, weight_co_ptr, col, mask, dtype, PEEPHOLES
        )
        i = tl.load(gates_ptr + at_gate, mask=mask, other=0.0).to(dtype)
        f = tl.load(gates_ptr + at_gate + H, mask=mask, other=0.0).to(dtype)
        g = tl.load(gates_ptr + at_gate + 2 * H, mask=mask, other=0.0).to(dtype)
        c_prev = tl.load(c_prev_ptr + offs, mask=mask, other=0.0).to(dtype)
        dc_next = tl.load(dc_ptr + offs, mask=mask, other=0.0)
        dpre_i, dpre_f, dpre_g, dc_prev = cell_backward(
            dm, dpre_o, dc_next, i, f, g, o, c, c_prev, w_ci, w_cf, w_co, PEEPHOLES
        )
        tl.store(dpre_ptr + at_gate, dpre_i, mask=mask)
        tl.store(dpre_ptr + at_gate + H, dpre_f, mask=mask)
        tl.store(dpre_ptr + at_gate + 2 * H, dpre_g, mask=mask)
        tl.store(dc_ptr + offs, dc_prev, mask=mask)


def forward(
    gx: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    peepholes: tuple[Tensor | None, ...],
    order: list[slice],
    h: Tensor,
    c: Tensor,
    y: Tensor,
    gates: Tensor | None,
    cells: Tensor | None,
) -> None:
    """Run the steps `order`; h (B, P) and c (B, H) hold h0 and c0 and become h_n and c_n.

    gx (N, 4H) is the input part of F1; gates and cells are None when nothing is saved.
    """
    H = c.shape[1]
    full = peepholes[0] is not None and peepholes[0].dim() == 2
    m = h if weight_hr is None else torch.empty_like(c)
    for rows in order:
        n = rows.stop - rows.start
        pre = torch.addmm(gx[rows], h[:n], weight_hh.T)  # F1
        for cell_part, output_part in ((True, False), (False, True)) if full else ((True, True),):
            if full and cell_part:
                pre[:, :H] += c[:n] @ peepholes[0].T  # type: ignore[union-attr]
                pre[:, H : 2 * H] += c[:n] @ peepholes[1].T  # type: ignore[union-attr]
            elif full:
                pre[:, 3 * H :] += c[:n] @ peepholes[2].T  # type: ignore[union-attr]
            _lstm_pointwise_forward_kernel[(triton.cdiv(n * H, BLOCK),)](
                pre,
                *((pre if w is None else w) for w in peepholes),
                c,
                m,
                y[rows],
                pre if gates is None else gates[rows],
                pre if cells is None else cells[rows],
                n,
                H,
                y.stride(0),
                CELL=cell_part,
                OUTPUT=output_part,
                PEEPHOLES=peepholes[0] is not None and not full,
                PROJECTED=weight_hr is not None,
                SAVE=gates is not None,
                BLOCK=BLOCK,
            )
        if weight_hr is not None:
            torch.mm(m[:n], weight_hr.T, out=h[:n])  # F8
            y[rows] = h[:n]


def backward(
    dy: Tensor,
    dcells: Tensor | None,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    peepholes: tuple[Tensor | None, ...],
    order: list[slice],
    gates: Tensor,
    cells: Tensor,
    c_before: Tensor,
    dh: Tensor,
    dc: Tensor,
    dpre: Tensor,
    dh_rows: Tensor | None,
) -> None:
    """Run the steps `order`, last to first; dh (B, P) and dc (B, H) hold dh_n and dc_n and become
    dh0 and dc0.

    dy (N, P) and dcells (N, H) with any strides; c_before (N, H) holds every row's c_{t-1}; dh_rows
    (N, P) receives B1's dh where a projection needs it.
    """
    H = dc.shape[1]
    full = peepholes[0] is not None and peepholes[0].dim() == 2
    dpre_o = torch.empty_like(dc)
    for rows in order:
        n = rows.stop - rows.start
        dh_now = dy[rows] + dh[:n]  # B1
        if dh_rows is not None:
            dh_rows[rows] = dh_now
        dm = dh_now if weight_hr is None else dh_now @ weight_hr  # B2
        if dcells is not None:
            dc[:n] += dcells[rows]
        for cell_part, output_part in ((False, True), (True, False)) if full else ((True, True),):
            if full and cell_part:
                dc[:n].addmm_(dpre_o[:n], peepholes[2])  # type: ignore[arg-type]
            _lstm_pointwise_backward_kernel[(triton.cdiv(n * H, BLOCK),)](
                dm,
                dc,
                dpre_o,
                gates[rows],
                cells[rows],
                c_before[rows],
                *((dm if w is None else w) for w in peepholes),
                dpre[rows],
                n,
                H,
                CELL=cell_part,
                OUTPUT=output_part,
                PEEPHOLES=peepholes[0] is not None and not full,
                BLOCK=BLOCK,
            )
        if full:
            dc[:n].addmm_(dpre[rows, :H].to(dc.dtype), peepholes[0])  # type: ignore[arg-type]
            dc[:n].addmm_(dpre[rows, H : 2 * H].to(dc.dtype), peepholes[1])  # type: ignore[arg-type]
        torch.mm(dpre[rows].to(dh.dtype), weight_hh, out=dh[:n])  # B9
