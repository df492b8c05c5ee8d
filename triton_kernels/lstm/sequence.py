"""L1: the whole sequence in one program per block of sequences, W_hh resident.

Nothing is exchanged between programs, so there is no barrier and the time of a step hardly depends
on B. It serves layers whose W_hh fits one multiprocessor, without projection or full peepholes.
Reference in plain torch: `_forward_direction` and `_backward_direction` of
torch_manual/kernels/lstm.py.

Shapes: T steps, B sequences, N rows, H units, D directions, the second running from the last step
to the first. Sequences alive in a step are its first rows; a state not alive stays as it is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch_manual.triton_kernels._math import join_gates, split_gates, step_rows
from torch_manual.triton_kernels.lstm.gates import (
    cell,
    cell_backward,
    load_peepholes,
    output,
    output_backward,
)


@triton.jit
def _load_weight_hh(weight_hh_ptr, H, BLOCK_H: tl.constexpr):
    """W_hh of one direction as (4·BLOCK_H, BLOCK_H), row 4·unit + gate, zero outside."""
    row = tl.arange(0, 4 * BLOCK_H)
    unit, gate = row // 4, row % 4
    col = tl.arange(0, BLOCK_H)
    offs = (gate * H + unit)[:, None] * H + col[None, :]
    return tl.load(weight_hh_ptr + offs, mask=(unit < H)[:, None] & (col < H)[None, :], other=0.0)


@triton.jit(do_not_specialize=["T", "B", "N", "reverse"])
def _lstm_sequence_forward_kernel(
    gx_ptr,  # (D, N, 4H): the input part of F1
    weight_hh_ptr,  # (D, 4H, H)
    weight_ci_ptr,  # (D, H), also cf and co
    weight_cf_ptr,
    weight_co_ptr,
    h0_ptr,  # (D, B, H)
    c_ptr,  # (D, B, H), dtype of accumulation: c0 in, c_n out
    starts_ptr,  # (T + 3,): see step_rows
    y_ptr,  # (N, D·H)
    h_n_ptr,  # (D, B, H)
    gates_ptr,  # (D, N, 4H), if SAVE
    cells_ptr,  # (D, N, H), if SAVE
    T,
    B,
    N,
    H,
    stride_y_n,
    reverse,  # 1: the first direction runs from the last step to the first, too
    PEEPHOLES: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    d = tl.program_id(1).to(tl.int64)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    col = tl.arange(0, BLOCK_H)
    mask_h = col < H
    dtype: tl.constexpr = c_ptr.dtype.element_ty
    weight_hh = tl.trans(_load_weight_hh(weight_hh_ptr + d * 4 * H * H, H, BLOCK_H))
    w_ci, w_cf, w_co = load_peepholes(
        weight_ci_ptr, weight_cf_ptr, weight_co_ptr, d * H + col, mask_h, dtype, PEEPHOLES
    )
    mask_state = (b < B)[:, None] & mask_h[None, :]
    at_state = (d * B + b)[:, None] * H + col[None, :]
    h = tl.load(h0_ptr + at_state, mask=mask_state, other=0.0)
    c = tl.load(c_ptr + at_state, mask=mask_state, other=0.0)
    for s in range(T):
        t = tl.where(d + reverse == 0, s, T - 1 - s)
        start, n = step_rows(starts_ptr, t)
        alive = (b < n)[:, None]
        mask = alive & mask_h[None, :]
        row = d * N + start + b
        at_gate = row[:, None] * (4 * H) + col[None, :]
        gx_i = tl.load(gx_ptr + at_gate, mask=mask, other=0.0)
        gx_f = tl.load(gx_ptr + at_gate + H, mask=mask, other=0.0)
        gx_g = tl.load(gx_ptr + at_gate + 2 * H, mask=mask, other=0.0)
        gx_o = tl.load(gx_ptr + at_gate + 3 * H, mask=mask, other=0.0)
        product = tl.dot(h, weight_hh, input_precision=PRECISION, out_dtype=dtype)
        pre_i, pre_f, pre_g, pre_o = split_gates(product)
        pre_i, pre_f, pre_g, pre_o = pre_i + gx_i, pre_f + gx_f, pre_g + gx_g, pre_o + gx_o  # F1
        i, f, g, c_new = cell(pre_i, pre_f, pre_g, c, w_ci, w_cf, PEEPHOLES)
        o, m = output(pre_o, c_new, w_co, PEEPHOLES)
        c = tl.where(alive, c_new, c)
        h = tl.where(alive, m.to(h.dtype), h)  # F8
        at_y = (start + b)[:, None] * stride_y_n + (d * H + col)[None, :]
        tl.store(y_ptr + at_y, h, mask=mask)
        if SAVE:
            tl.store(gates_ptr + at_gate, i, mask=mask)
            tl.store(gates_ptr + at_gate + H, f, mask=mask)
            tl.store(gates_ptr + at_gate + 2 * H, g, mask=mask)
            tl.store(gates_ptr + at_gate + 3 * H, o, mask=mask)
            tl.store(cells_ptr + row[:, None] * H + col[None, :], c, mask=mask)
    tl.store(h_n_ptr + at_state, h, mask=mask_state)
    tl.store(c_ptr + at_state, c, mask=mask_state)


@triton.jit(do_not_specialize=["T", "B", "N", "reverse"])
def _lstm_sequence_backward_kernel(
    dy_ptr,  # (N, D·H), any stride over rows
    dcells_ptr,  # (D, N, H), if DCELLS
    dh_ptr,  # (D, B, H), dtype of accumulation: dh_n in, dh0 out
    dc_ptr,  # (D, B, H), dtype of accumulation: dc_n in, dc0 out
    c0_ptr,  # (D, B, H)
    weight_hh_ptr,  # (D, 4H, H)
    weight_ci_ptr,  # (D, H), also cf and co
    weight_cf_ptr,
    weight_co_ptr,
    starts_ptr,  # (T + 3,): see step_rows
    gates_ptr,  # (D, N, 4H)
    cells_ptr,  # (D, N, H)
    dpre_ptr,  # (D, N, 4H)
    T,
    B,
    N,
    H,
    stride_dy_n,
    reverse,  # 1: the first direction runs from the last step to the first, too
    PEEPHOLES: tl.constexpr,
    DCELLS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    d = tl.program_id(1).to(tl.int64)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    col = tl.arange(0, BLOCK_H)
    mask_h = col < H
    dtype: tl.constexpr = dc_ptr.dtype.element_ty
    weight_hh = _load_weight_hh(weight_hh_ptr + d * 4 * H * H, H, BLOCK_H)
    w_ci, w_cf, w_co = load_peepholes(
        weight_ci_ptr, weight_cf_ptr, weight_co_ptr, d * H + col, mask_h, dtype, PEEPHOLES
    )
    mask_state = (b < B)[:, None] & mask_h[None, :]
    at_state = (d * B + b)[:, None] * H + col[None, :]
    dh_next = tl.load(dh_ptr + at_state, mask=mask_state, other=0.0)
    dc_next = tl.load(dc_ptr + at_state, mask=mask_state, other=0.0)
    for s in range(T):
        t = tl.where(d + reverse == 0, T - 1 - s, s)
        start, n = step_rows(starts_ptr, t)
        start_prev, n_prev = step_rows(starts_ptr, tl.where(d + reverse == 0, t - 1, t + 1))
        alive = (b < n)[:, None]
        mask = alive & mask_h[None, :]
        row = d * N + start + b
        at_gate = row[:, None] * (4 * H) + col[None, :]
        i = tl.load(gates_ptr + at_gate, mask=mask, other=0.0).to(dtype)
        f = tl.load(gates_ptr + at_gate + H, mask=mask, other=0.0).to(dtype)
        g = tl.load(gates_ptr + at_gate + 2 * H, mask=mask, other=0.0).to(dtype)
        o = tl.load(gates_ptr + at_gate + 3 * H, mask=mask, other=0.0).to(dtype)
        at_unit = row[:, None] * H + col[None, :]
        c = tl.load(cells_ptr + at_unit, mask=mask, other=0.0).to(dtype)
        c_prev_row = tl.where(
            b < n_prev, cells_ptr + (d * N + start_prev + b) * H, c0_ptr + (d * B + b) * H
        )
        c_prev = tl.load(c_prev_row[:, None] + col[None, :], mask=mask, other=0.0).to(dtype)
        at_dy = (start + b)[:, None] * stride_dy_n + (d * H + col)[None, :]
        dh = tl.load(dy_ptr + at_dy, mask=mask, other=0.0).to(dtype) + dh_next  # B1
        dc = dc_next
        if DCELLS:
            dc += tl.load(dcells_ptr + at_unit, mask=mask, other=0.0).to(dtype)
        dm = dh  # B2: no projection here
        dpre_o = output_backward(dm, o, c)
        dpre_i, dpre_f, dpre_g, dc_prev = cell_backward(
            dm, dpre_o, dc, i, f, g, o, c, c_prev, w_ci, w_cf, w_co, PEEPHOLES
        )
        tl.store(dpre_ptr + at_gate, dpre_i, mask=mask)
        tl.store(dpre_ptr + at_gate + H, dpre_f, mask=mask)
        tl.store(dpre_ptr + at_gate + 2 * H, dpre_g, mask=mask)
        tl.store(dpre_ptr + at_gate + 3 * H, dpre_o, mask=mask)
        dpre = join_gates(dpre_i, dpre_f, dpre_g, dpre_o).to(weight_hh.dtype)
        dh_prev = tl.dot(dpre, weight_hh, input_precision=PRECISION, out_dtype=dtype)  # B9
        dh_next = tl.where(alive, dh_prev, dh_next)
        dc_next = tl.where(alive, dc_prev, dc_next)
    tl.store(dh_ptr + at_state, dh_next, mask=mask_state)
    tl.store(dc_ptr + at_state, dc_next, mask=mask_state)


def forward(
    gx: Tensor,
    weight_hh: Tensor,
    peepholes: tuple[Tensor | None, ...],
    h0: Tensor,
    c: Tensor,
    starts: Tensor,
    y: Tensor,
    gates: Tensor | None,
    cells: Tensor | None,
    reverse: bool,
    *,
    block: tuple[int, int],
    precision: str,
    options: dict[str, int],
) -> Tensor:
    """Write y, gates and cells; c becomes c_n; return h_n. Shapes as the kernel's."""
    (D, B, H), N, T = h0.shape, len(y), len(starts) - 3
    h_n = torch.empty_like(h0)
    block_b, block_h = block
    _lstm_sequence_forward_kernel[(triton.cdiv(B, block_b), D)](
        gx,
        weight_hh,
        *((weight_hh if w is None else w) for w in peepholes),
        h0,
        c,
        starts,
        y,
        h_n,
        gx if gates is None else gates,
        gx if cells is None else cells,
        T,
        B,
        N,
        H,
        y.stride(0),
        int(reverse),
        PEEPHOLES=peepholes[0] is not None,
        SAVE=gates is not None,
        PRECISION=precision,
        BLOCK_B=block_b,
        BLOCK_H=block_h,
        **options,
    )
    return h_n


def backward(
    dy: Tensor,
    dcells: Tensor | None,
    dh: Tensor,
    dc: Tensor,
    c0: Tensor,
    weight_hh: Tensor,
    peepholes: tuple[Tensor | None, ...],
    starts: Tensor,
    gates: Tensor,
    cells: Tensor,
    dpre: Tensor,
    reverse: bool,
    *,
    block: tuple[int, int],
    precision: str,
    options: dict[str, int],
) -> None:
    """Write dpre; dh and dc become dh0 and dc0. Shapes as the kernel's."""
    (D, B, H), N, T = dc.shape, len(dy), len(starts) - 3
    block_b, block_h = block
    _lstm_sequence_backward_kernel[(triton.cdiv(B, block_b), D)](
        dy,
        gates if dcells is None else dcells,
        dh,
        dc,
        c0,
        weight_hh,
        *((weight_hh if w is None else w) for w in peepholes),
        starts,
        gates,
        cells,
        dpre,
        T,
        B,
        N,
        H,
        dy.stride(0),
        int(reverse),
        PEEPHOLES=peepholes[0] is not None,
        DCELLS=dcells is not None,
        PRECISION=precision,
        BLOCK_B=block_b,
        BLOCK_H=block_h,
        **options,
    )
