"""L0 of the second order: the gate mathematics of R2 to R7 and R11 to R16, one launch per step.

Reference in plain torch: `_tangent_direction` and `_backward_tangent_direction` of
torch_manual/kernels/lstm_tangent.py, whose loops, with all products, stand in
torch_manual/kernels/triton_tangent.py. Every tensor is contiguous and in the dtype of accumulation;
n sequences are alive, H units. tX is the tangent of X and has its shape.
"""

import triton
import triton.language as tl
from torch import Tensor
from torch_manual.triton_kernels.lstm.gates import backward_tangent, load_peepholes, tangent
from torch_manual.triton_kernels.lstm.pointwise import BLOCK


@triton.jit(do_not_specialize=["n"])
def _lstm_tangent_kernel(
    tpre_ptr,  # (n, 4H): R1
    tc_ptr,  # (n, H): tc_{t-1} in, tc_t out
    gates_ptr,  # (n, 4H)
    cells_ptr,  # (n, H)
    c_prev_ptr,  # (n, H)
    weight_ci_ptr,  # (H,), also cf and co, and their tangents
    weight_cf_ptr,
    weight_co_ptr,
    tweight_ci_ptr,
    tweight_cf_ptr,
    tweight_co_ptr,
    tgates_ptr,  # (n, 4H)
    tcells_ptr,  # (n, H)
    tm_ptr,  # (n, H)
    n,
    H,
    PEEPHOLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n.to(tl.int64) * H
    col = offs % H
    at_gate = offs // H * 4 * H + col
    dtype: tl.constexpr = tc_ptr.dtype.element_ty
    w_ci, w_cf, w_co = load_peepholes(
        weight_ci_ptr, weight_cf_ptr, weight_co_ptr, col, mask, dtype, PEEPHOLES
    )
    tw_ci, tw_cf, tw_co = load_peepholes(
        tweight_ci_ptr, tweight_cf_ptr, tweight_co_ptr, col, mask, dtype, PEEPHOLES
    )
    ti, tf, tg, to, tc, tm = tangent(
        tl.load(tpre_ptr + at_gate, mask=mask, other=0.0),
        tl.load(tpre_ptr + at_gate + H, mask=mask, other=0.0),
        tl.load(tpre_ptr + at_gate + 2 * H, mask=mask, other=0.0),
        tl.load(tpre_ptr + at_gate + 3 * H, mask=mask, other=0.0),
        tl.load(tc_ptr + offs, mask=mask, other=0.0),
        tl.load(gates_ptr + at_gate, mask=mask, other=0.0),
        tl.load(gates_ptr + at_gate + H, mask=mask, other=0.0),
        tl.load(gates_ptr + at_gate + 2 * H, mask=mask, other=0.0),
        tl.load(gates_ptr + at_gate + 3 * H, mask=mask, other=0.0),
        tl.load(cells_ptr + offs, mask=mask, other=0.0),
        tl.load(c_prev_ptr + offs, mask=mask, other=0.0),
        *(w_ci, w_cf, w_co, tw_ci, tw_cf, tw_co),
        PEEPHOLES,
    )
    tl.store(tgates_ptr + at_gate, ti, mask=mask)
    tl.store(tgates_ptr + at_gate + H, tf, mask=mask)
    tl.store(tgates_ptr + at_gate + 2 * H, tg, mask=mask)
    tl.store(tgates_ptr + at_gate + 3 * H, to, mask=mask)
    tl.store(tc_ptr + offs, tc, mask=mask)
    tl.store(tcells_ptr + offs, tc, mask=mask)
    tl.store(tm_ptr + offs, tm, mask=mask)


@triton.jit(do_not_specialize=["n"])
def _lstm_backward_tangent_kernel(
    dm_ptr,  # (n, H)
    tdm_ptr,  # (n, H)
    dpre_ptr,  # (n, 4H)
    dc_ptr,  # (n, H): dc_next in, dc_prev out
    tdc_ptr,  # (n, H): tdc_next in, tdc_prev out
    gates_ptr,  # (n, 4H)
    tgates_ptr,  # (n, 4H)
    cells_ptr,  # (n, H)
    tcells_ptr,  # (n, H)
    c_prev_ptr,  # (n, H)
    tc_prev_ptr,  # (n, H)
    weight_ci_ptr,  # (H,), also cf and co, and their tangents
    weight_cf_ptr,
    weight_co_ptr,
    tweight_ci_ptr,
    tweight_cf_ptr,
    tweight_co_ptr,
    tdpre_ptr,  # (n, 4H)
    n,
    H,
    PEEPHOLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n.to(tl.int64) * H
    col = offs % H
    at_gate = offs // H * 4 * H + col
    dtype: tl.constexpr = dc_ptr.dtype.element_ty
    w_ci, w_cf, w_co = load_peepholes(
        weight_ci_ptr, weight_cf_ptr, weight_co_ptr, col, mask, dtype, PEEPHOLES
    )
    tw_ci, tw_cf, tw_co = load_peepholes(
        tweight_ci_ptr, tweight_cf_ptr, tweight_co_ptr, col, mask, dtype, PEEPHOLES
    )
    tdpre_i, tdpre_f, tdpre_g, tdpre_o, tdc_prev, dc_prev = backward_tangent(
        tl.load(dm_ptr + offs, mask=mask, other=0.0),
        tl.load(tdm_ptr + offs, mask=mask, other=0.0),
        tl.load(dpre_ptr + at_gate, mask=mask, other=0.0),
        tl.load(dpre_ptr + at_gate + H, mask=mask, other=0.0),
        tl.load(dpre_ptr + at_gate + 3 * H, mask=mask, other=0.0),
        tl.load(dc_ptr + offs, mask=mask, other=0.0),
        tl.load(tdc_ptr + offs, mask=mask, other=0.0),
        tl.load(gates_ptr + at_gate, mask=mask, other=0.0),
        tl.load(gates_ptr + at_gate + H, mask=mask, other=0.0),
        tl.load(gates_ptr + at_gate + 2 * H, mask=mask, other=0.0),
        tl.load(gates_ptr + at_gate + 3 * H, mask=mask, other=0.0),
        tl.load(tgates_ptr + at_gate, mask=mask, other=0.0),
        tl.load(tgates_ptr + at_gate + H, mask=mask, other=0.0),
        tl.load(tgates_ptr + at_gate + 2 * H, mask=mask, other=0.0),
        tl.load(tgates_ptr + at_gate + 3 * H, mask=mask, other=0.0),
        tl.load(cells_ptr + offs, mask=mask, other=0.0),
        tl.load(tcells_ptr + offs, mask=mask, other=0.0),
        tl.load(c_prev_ptr + offs, mask=mask, other=0.0),
        tl.load(tc_prev_ptr + offs, mask=mask, other=0.0),
        *(w_ci, w_cf, w_co, tw_ci, tw_cf, tw_co),
        PEEPHOLES,
    )
    tl.store(tdpre_ptr + at_gate, tdpre_i, mask=mask)
    tl.store(tdpre_ptr + at_gate + H, tdpre_f, mask=mask)
    tl.store(tdpre_ptr + at_gate + 2 * H, tdpre_g, mask=mask)
    tl.store(tdpre_ptr + at_gate + 3 * H, tdpre_o, mask=mask)
    tl.store(dc_ptr + offs, dc_prev, mask=mask)
    tl.store(tdc_ptr + offs, tdc_prev, mask=mask)


def step_tangent(
    tpre: Tensor,
    tc: Tensor,
    gates: Tensor,
    cells: Tensor,
    c_prev: Tensor,
    peepholes: tuple[Tensor | None, ...],
    tgates: Tensor,
    tcells: Tensor,
    tm: Tensor,
) -> None:
    """R2 to R7 of one step; `tc` becomes tc_t. `peepholes`: three weights, then their tangents."""
    (n, H) = cells.shape
    _lstm_tangent_kernel[(triton.cdiv(n * H, BLOCK),)](
        *(tpre, tc, gates, cells, c_prev),
        *((tpre if w is None else w) for w in peepholes),
        *(tgates, tcells, tm, n, H),
        PEEPHOLES=peepholes[0] is not None,
        BLOCK=BLOCK,
    )


def step_backward_tangent(
    dm: Tensor,
    tdm: Tensor,
    dpre: Tensor,
    dc: Tensor,
    tdc: Tensor,
    gates: Tensor,
    tgates: Tensor,
    cells: Tensor,
    tcells: Tensor,
    c_prev: Tensor,
    tc_prev: Tensor,
    peepholes: tuple[Tensor | None, ...],
    tdpre: Tensor,
) -> None:
    """R11 to R16 of one step; `dc` and `tdc` become dc_prev and tdc_prev."""
    (n, H) = cells.shape
    _lstm_backward_tangent_kernel[(triton.cdiv(n * H, BLOCK),)](
        *(dm, tdm, dpre, dc, tdc, gates, tgates, cells, tcells, c_prev, tc_prev),
        *((dm if w is None else w) for w in peepholes),
        *(tdpre, n, H),
        PEEPHOLES=peepholes[0] is not None,
        BLOCK=BLOCK,
    )
