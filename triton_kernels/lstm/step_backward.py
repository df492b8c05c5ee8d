"""L2 and L3 backwards: the recurrent product of step t + 1's dpre, fused with step t's gradients.

The mirror image of step.py. A program owns BLOCK_N units; their dh_next needs all 4H columns of the
dpre of the step before (in the order of the recurrence run backwards), which other programs wrote.
It streams them gate by gate, so that no more than (BLOCK_B, BLOCK_K) are held at a time. In L3 the
matching four slices of W_hh are resident. B9 of the first step, dh0, is left to the caller, as one
product. Reference in plain torch: `_backward_direction` of torch_manual/kernels/lstm.py.
"""

import triton
import triton.language as tl
from torch import Tensor
from torch_manual.triton_kernels._barrier import barrier, check, grid_barrier
from torch_manual.triton_kernels._graph import replay
from torch_manual.triton_kernels._math import step_rows
from torch_manual.triton_kernels.lstm.gates import cell_backward, load_peepholes, output_backward
from torch_manual.triton_kernels.lstm.step import k_slices


@triton.jit
def _load_weight_hh(weight_hh_ptr, k, col, H):
    """W_hh[k, col] of one gate as (SLICES, K, BLOCK_N)."""
    mask = (k < H)[:, :, None] & (col < H)[None, None, :]
    offs = (k.to(tl.int64) * H)[:, :, None] + col[None, None, :]
    return tl.load(weight_hh_ptr + offs, mask=mask, other=0.0)


@triton.jit
def _product(dpre_row, weight_hh, k, mask_b, H, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """(BLOCK_B,) pointers to one gate's rows of dpre times (SLICES, K, BLOCK_N)."""
    dpre = tl.load(
        dpre_row[None, :, None] + k[:, None, :],
        mask=mask_b[None, :, None] & (k < H)[:, None, :],
        other=0.0,
        cache_modifier=".cg",  # written by another multiprocessor: not from this one's L1
    )
    return tl.sum(tl.dot(dpre, weight_hh, input_precision=PRECISION, out_dtype=dtype), 0)


@triton.jit
def _step(
    s,
    dc_next,
    w_i,
    w_f,
    w_g,
    w_o,
    dy_ptr,
    dcells_ptr,
    dh_n_ptr,
    c0_ptr,
    weight_hh_ptr,
    starts_ptr,
    gates_ptr,
    cells_ptr,
    dpre_ptr,
    w_ci,
    w_cf,
    w_co,
    T,
    B,
    N,
    H,
    stride_dy_n,
    reverse,
    d,
    b,
    col,
    PEEPHOLES: tl.constexpr,
    DCELLS: tl.constexpr,
    PRECISION: tl.constexpr,
    RESIDENT: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One step of one block; w_i … w_o are its slices of W_hh if RESIDENT. Returns dc_prev."""
    dtype: tl.constexpr = dc_next.dtype
    t = tl.where(d + reverse == 0, T - 1 - s, s)
    start, n = step_rows(starts_ptr, t)
    start_next, n_next = step_rows(starts_ptr, tl.where(d + reverse == 0, t + 1, t - 1))
    start_prev, n_prev = step_rows(starts_ptr, tl.where(d + reverse == 0, t - 1, t + 1))
    alive, came_before = b < n, b < n_next
    mask_n = (col < H)[None, :]
    mask = alive[:, None] & mask_n
    row = d * N + start + b
    at_gate = row[:, None] * (4 * H) + col[None, :]
    at_unit = row[:, None] * H + col[None, :]
    i = tl.load(gates_ptr + at_gate, mask=mask, other=0.0).to(dtype)
    f = tl.load(gates_ptr + at_gate + H, mask=mask, other=0.0).to(dtype)
    g = tl.load(gates_ptr + at_gate + 2 * H, mask=mask, other=0.0).to(dtype)
    o = tl.load(gates_ptr + at_gate + 3 * H, mask=mask, other=0.0).to(dtype)
    c = tl.load(cells_ptr + at_unit, mask=mask, other=0.0).to(dtype)
    c_prev_row = tl.where(
        b < n_prev, cells_ptr + (d * N + start_prev + b) * H, c0_ptr + (d * B + b) * H
    )
    c_prev = tl.load(c_prev_row[:, None] + col[None, :], mask=mask, other=0.0).to(dtype)
    at_dy = (start + b)[:, None] * stride_dy_n + (d * H + col)[None, :]
    dy = tl.load(dy_ptr + at_dy, mask=mask, other=0.0).to(dtype)
    at_state = (d * B + b)[:, None] * H + col[None, :]
    mask_first = mask & ~came_before[:, None]
    dh_next = tl.load(dh_n_ptr + at_state, mask=mask_first, other=0.0).to(dtype)

    dpre_row = dpre_ptr + (d * N + start_next + b) * 4 * H
    needed = alive & came_before
    k = k_slices(SLICES, BLOCK_K)
    if RESIDENT:  # B9, of the step before
        dh_next += _product(dpre_row, w_i, k, needed, H, dtype, PRECISION)
        dh_next += _product(dpre_row + H, w_f, k, needed, H, dtype, PRECISION)
        dh_next += _product(dpre_row + 2 * H, w_g, k, needed, H, dtype, PRECISION)
        dh_next += _product(dpre_row + 3 * H, w_o, k, needed, H, dtype, PRECISION)
    else:
        for gate in range(4):
            at_weight = weight_hh_ptr + tl.cast(gate, tl.int64) * H * H
            for k_start in range(0, H, BLOCK_K):
                chunk = _load_weight_hh(at_weight, k_start + k, col, H)
                dpre_chunk = dpre_row + gate * H
                dh_next += _product(dpre_chunk, chunk, k_start + k, needed, H, dtype, PRECISION)

    dh = dy + dh_next  # B1
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
    return tl.where(alive[:, None], dc_prev, dc_next)


@triton.jit(do_not_specialize=["first", "last", "T", "B", "N", "reverse"])
def _lstm_step_backward_kernel(
    dy_ptr,  # (N, D·H), any stride over rows
    dcells_ptr,  # (D, N, H), if DCELLS
    dh_n_ptr,  # (D, B, H)
    dc_ptr,  # (D, B, H), dtype of accumulation: dc_next of step `first` in, dc_prev of the last out
    c0_ptr,  # (D, B, H)
    weight_hh_ptr,  # (D, 4H, H)
    weight_ci_ptr,  # (D, H), also cf and co
    weight_cf_ptr,
    weight_co_ptr,
    starts_ptr,  # (T + 3,): see step_rows
    gates_ptr,  # (D, N, 4H)
    cells_ptr,  # (D, N, H)
    dpre_ptr,  # (D, N, 4H)
    barrier_ptr,  # (1 + programs of axes 1 and 2,) int32 zeros: an error flag and the counters
    first,
    last,
    T,
    B,
    N,
    H,
    stride_dy_n,
    reverse,  # 1: the first direction runs from the last step to the first, too
    PEEPHOLES: tl.constexpr,
    DCELLS: tl.constexpr,
    PRECISION: tl.constexpr,
    PERSISTENT: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Steps `first` to `last` - 1, counted from the end of the recurrence: one in L2, all in
    L3 (PERSISTENT, and BLOCK_K ≥ H)."""
    d = tl.program_id(2).to(tl.int64)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = dc_ptr.dtype.element_ty
    w_ci, w_cf, w_co = load_peepholes(
        weight_ci_ptr, weight_cf_ptr, weight_co_ptr, d * H + col, col < H, dtype, PEEPHOLES
    )
    weight_hh_ptr += d * 4 * H * H
    w_i, w_f, w_g, w_o = 0.0, 0.0, 0.0, 0.0
    if PERSISTENT:
        k = k_slices(SLICES, BLOCK_K)
        gate_size = tl.cast(H, tl.int64) * H
        w_i = _load_weight_hh(weight_hh_ptr, k, col, H)
        w_f = _load_weight_hh(weight_hh_ptr + gate_size, k, col, H)
        w_g = _load_weight_hh(weight_hh_ptr + 2 * gate_size, k, col, H)
        w_o = _load_weight_hh(weight_hh_ptr + 3 * gate_size, k, col, H)
    mask_state = (b < B)[:, None] & (col < H)[None, :]
    at_state = (d * B + b)[:, None] * H + col[None, :]
    dc = tl.load(dc_ptr + at_state, mask=mask_state, other=0.0)
    counter = barrier_ptr + 1 + tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    for s in range(first, last):
        dc = _step(
            *(s, dc, w_i, w_f, w_g, w_o, dy_ptr, dcells_ptr, dh_n_ptr, c0_ptr),
            *(weight_hh_ptr, starts_ptr, gates_ptr, cells_ptr, dpre_ptr, w_ci, w_cf, w_co),
            *(T, B, N, H, stride_dy_n, reverse, d, b, col),
            *(PEEPHOLES, DCELLS, PRECISION, PERSISTENT, SLICES, BLOCK_K),
        )
        if PERSISTENT:
            grid_barrier(counter, (s + 1) * tl.num_programs(0), barrier_ptr)
    tl.store(dc_ptr + at_state, dc, mask=mask_state)


def backward(
    dy: Tensor,
    dcells: Tensor | None,
    dh_n: Tensor,
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
    persistent: bool,
    block: tuple[int, int, int],
    slices: int,
    precision: str,
    options: dict[str, int],
) -> None:
    """Write dpre; dc becomes dc0. Shapes as the kernel's."""
    (D, B, H), N, T = c0.shape, len(dy), len(starts) - 3
    block_b, block_n, block_k = block
    grid = (triton.cdiv(H, block_n), triton.cdiv(B, block_b), D)
    tensors = (
        *(dy, gates if dcells is None else dcells, dh_n, dc, c0, weight_hh),
        *((weight_hh if w is None else w) for w in peepholes),
        *(starts, gates, cells, dpre),
        barrier(grid, dy.device) if persistent else starts,
    )

    def launch(first: int, last: int) -> None:
        _lstm_step_backward_kernel[grid](
            *tensors,
            *(first, last, T, B, N, H, dy.stride(0), int(reverse)),
            PEEPHOLES=peepholes[0] is not None,
            DCELLS=dcells is not None,
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
            *(T, B, N, H, dy.stride(0), reverse, dcells is None),
        )
        replay(steps, tensors, key)
