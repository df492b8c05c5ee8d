"""L2 and L3 forwards: a recurrent product and its gate mathematics in one fused step.

L2 launches the step once for every t and reads W_hh anew; torch_manual/triton_kernels/_graph.py
turns the launches into one CUDA graph. L3 runs the same `_step` for all t in one cooperative
launch: every program keeps its slice of W_hh and a barrier over the grid separates the steps.
Neither serves a projection or full peepholes. Reference in plain torch: `_forward_direction` of
torch_manual/kernels/lstm.py.

A program owns BLOCK_N units of BLOCK_B sequences of one direction. The sum over k of the product is
cut into SLICES, one for each warp, and added up at the end: with so few rows and columns the warps
would otherwise repeat each other's work. Shapes: T steps, B sequences, N rows, H units, D
directions, the second running from the last step to the first.
"""

import triton
import triton.language as tl
from torch import Tensor
from torch_manual.triton_kernels._barrier import barrier, check, grid_barrier
from torch_manual.triton_kernels._graph import replay
from torch_manual.triton_kernels._math import split_gates, step_rows
from torch_manual.triton_kernels.lstm.gates import cell, load_peepholes, output


@triton.jit
def k_slices(SLICES: tl.constexpr, BLOCK_K: tl.constexpr):
    """k = 0 … BLOCK_K - 1 as (SLICES, BLOCK_K / SLICES)."""
    WIDTH: tl.constexpr = BLOCK_K // SLICES
    return tl.arange(0, SLICES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _load_weight_hh(weight_hh_ptr, k, unit, gate, H):
    """W_hh[gate·H + unit, k]ᵀ as (SLICES, K, 4·BLOCK_N)."""
    row = gate.to(tl.int64) * H + unit
    mask = (unit < H)[None, None, :] & (k < H)[:, :, None]
    return tl.load(weight_hh_ptr + (row * H)[None, None, :] + k[:, :, None], mask=mask, other=0.0)


@triton.jit
def _product(h_row, weight_hh, k, mask_b, H, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """(BLOCK_B,) pointers to rows of h times (SLICES, K, M) → (BLOCK_B, M)."""
    mask = mask_b[None, :, None] & (k < H)[:, None, :]
    h = tl.load(
        h_row[None, :, None] + k[:, None, :],
        mask=mask,
        other=0.0,
        cache_modifier=".cg",  # written by another multiprocessor: not from this one's L1
    )
    return tl.sum(tl.dot(h, weight_hh, input_precision=PRECISION, out_dtype=dtype), 0)


@triton.jit
def _step(
    s,
    c,
    weight_hh,
    gx_ptr,
    weight_hh_ptr,
    h0_ptr,
    starts_ptr,
    y_ptr,
    gates_ptr,
    cells_ptr,
    w_ci,
    w_cf,
    w_co,
    T,
    B,
    N,
    H,
    stride_y_n,
    reverse,
    d,
    b,
    col,
    PEEPHOLES: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    RESIDENT: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One step of one block; `weight_hh` is its slice if RESIDENT, else read here. Returns c."""
    BLOCK_B: tl.constexpr = b.shape[0]
    BLOCK_N: tl.constexpr = col.shape[0]
    dtype: tl.constexpr = c.dtype
    t = tl.where(d + reverse == 0, s, T - 1 - s)
    start, n = step_rows(starts_ptr, t)
    start_prev, n_prev = step_rows(starts_ptr, tl.where(d + reverse == 0, t - 1, t + 1))
    alive = b < n
    mask = alive[:, None] & (col < H)[None, :]
    row = d * N + start + b
    at_gate = row[:, None] * (4 * H) + col[None, :]
    gx_i = tl.load(gx_ptr + at_gate, mask=mask, other=0.0)
    gx_f = tl.load(gx_ptr + at_gate + H, mask=mask, other=0.0)
    gx_g = tl.load(gx_ptr + at_gate + 2 * H, mask=mask, other=0.0)
    gx_o = tl.load(gx_ptr + at_gate + 3 * H, mask=mask, other=0.0)

    h_row = tl.where(
        b < n_prev, y_ptr + (start_prev + b) * stride_y_n + d * H, h0_ptr + (d * B + b) * H
    )
    k = k_slices(SLICES, BLOCK_K)
    if RESIDENT:
        product = _product(h_row, weight_hh, k, alive, H, dtype, PRECISION)
    else:
        column = tl.arange(0, 4 * BLOCK_N)
        unit, gate = tl.program_id(0) * BLOCK_N + column // 4, column % 4
        product = tl.zeros((BLOCK_B, 4 * BLOCK_N), dtype)
        for k_start in range(0, H, BLOCK_K):
            chunk = _load_weight_hh(weight_hh_ptr, k_start + k, unit, gate, H)
            product += _product(h_row, chunk, k_start + k, alive, H, dtype, PRECISION)
    pre_i, pre_f, pre_g, pre_o = split_gates(product)
    pre_i, pre_f, pre_g, pre_o = pre_i + gx_i, pre_f + gx_f, pre_g + gx_g, pre_o + gx_o  # F1
    i, f, g, c_new = cell(pre_i, pre_f, pre_g, c, w_ci, w_cf, PEEPHOLES)
    o, m = output(pre_o, c_new, w_co, PEEPHOLES)
    tl.store(y_ptr + (start + b)[:, None] * stride_y_n + (d * H + col)[None, :], m, mask=mask)  # F8
    if SAVE:
        tl.store(gates_ptr + at_gate, i, mask=mask)
        tl.store(gates_ptr + at_gate + H, f, mask=mask)
        tl.store(gates_ptr + at_gate + 2 * H, g, mask=mask)
        tl.store(gates_ptr + at_gate + 3 * H, o, mask=mask)
        tl.store(cells_ptr + row[:, None] * H + col[None, :], c_new, mask=mask)
    return tl.where(alive[:, None], c_new, c)


@triton.jit(do_not_specialize=["first", "last", "T", "B", "N", "reverse"])
def _lstm_step_forward_kernel(
    gx_ptr,  # (D, N, 4H): the input part of F1
    weight_hh_ptr,  # (D, 4H, H)
    weight_ci_ptr,  # (D, H), also cf and co
    weight_cf_ptr,
    weight_co_ptr,
    h0_ptr,  # (D, B, H)
    c_ptr,  # (D, B, H), dtype of accumulation: c before step `first` in, c after step last - 1 out
    starts_ptr,  # (T + 3,): see step_rows
    y_ptr,  # (N, D·H)
    gates_ptr,  # (D, N, 4H), if SAVE
    cells_ptr,  # (D, N, H), if SAVE
    barrier_ptr,  # (1 + programs of axes 1 and 2,) int32 zeros: an error flag and the counters
    first,
    last,
    T,
    B,
    N,
    H,
    stride_y_n,
    reverse,  # 1: the first direction runs from the last step to the first, too
    PEEPHOLES: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    PERSISTENT: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Steps `first` to `last` - 1: one of them in L2, all in L3 (PERSISTENT, and BLOCK_K ≥ H)."""
    d = tl.program_id(2).to(tl.int64)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = c_ptr.dtype.element_ty
    w_ci, w_cf, w_co = load_peepholes(
        weight_ci_ptr, weight_cf_ptr, weight_co_ptr, d * H + col, col < H, dtype, PEEPHOLES
    )
    weight_hh_ptr += d * 4 * H * H
    weight_hh = 0.0
    if PERSISTENT:
        column = tl.arange(0, 4 * BLOCK_N)
        unit, gate = tl.program_id(0) * BLOCK_N + column // 4, column % 4
        weight_hh = _load_weight_hh(weight_hh_ptr, k_slices(SLICES, BLOCK_K), unit, gate, H)
    mask_state = (b < B)[:, None] & (col < H)[None, :]
    at_state = (d * B + b)[:, None] * H + col[None, :]
    c = tl.load(c_ptr + at_state, mask=mask_state, other=0.0)
    counter = barrier_ptr + 1 + tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    for s in range(first, last):
        c = _step(
            *(s, c, weight_hh, gx_ptr, weight_hh_ptr, h0_ptr, starts_ptr),
            *(y_ptr, gates_ptr, cells_ptr, w_ci, w_cf, w_co),
            *(T, B, N, H, stride_y_n, reverse, d, b, col),
            *(PEEPHOLES, SAVE, PRECISION, PERSISTENT, SLICES, BLOCK_K),
        )
        if PERSISTENT:
            grid_barrier(counter, (s + 1) * tl.num_programs(0), barrier_ptr)
    tl.store(c_ptr + at_state, c, mask=mask_state)


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
    persistent: bool,
    block: tuple[int, int, int],
    slices: int,
    precision: str,
    options: dict[str, int],
) -> None:
    """Write y, gates and cells; c becomes c_n. Shapes as the kernel's."""
    (D, B, H), N, T = h0.shape, len(y), len(starts) - 3
    block_b, block_n, block_k = block
    grid = (triton.cdiv(H, block_n), triton.cdiv(B, block_b), D)
    tensors = (
        *(gx, weight_hh, *((weight_hh if w is None else w) for w in peepholes)),
        *(h0, c, starts, y, gx if gates is None else gates, gx if cells is None else cells),
        barrier(grid, gx.device) if persistent else starts,
    )

    def launch(first: int, last: int) -> None:
        _lstm_step_forward_kernel[grid](
            *tensors,
            *(first, last, T, B, N, H, y.stride(0), int(reverse)),
            PEEPHOLES=peepholes[0] is not None,
            SAVE=gates is not None,
            PRECISION=precision,
            PERSISTENT=persistent,
            SLICES=slices,
            BLOCK_B=block_b,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            launch_cooperative_grid=persistent,
            **options,
        )

    def steps() -> None:
        for s in range(T):
            launch(s, s + 1)

    if persistent:
        launch(0, T)
        check(tensors[-1])
    else:
        key = (
            *(grid, block, slices, *options.values(), precision),
            *(T, B, N, H, reverse, gates is None),
        )
        replay(steps, tensors, key)
