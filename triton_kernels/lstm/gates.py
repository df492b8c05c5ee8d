"""The gate mathematics of one LSTM step, element by element (docs/derivations/lstm.md).

Every level calls these functions, so each equation stands in the Triton kernels once. Their
reference in plain torch is torch_manual/kernels/lstm.py (F, B) and lstm_tangent.py (R), line by
line under the same tags. PEEPHOLES: diagonal peepholes w_ci, w_cf, w_co, (H,) broadcast over the
batch; without them they are not read.
"""

import triton
import triton.language as tl
from torch_manual.triton_kernels._math import sigmoid, tanh


@triton.jit
def load_peepholes(
    weight_ci_ptr, weight_cf_ptr, weight_co_ptr, offs, mask, dtype, PEEPHOLES: tl.constexpr
):
    """w_ci, w_cf, w_co at `offs`; zeros that nobody reads without peepholes."""
    w_ci, w_cf, w_co = 0.0, 0.0, 0.0
    if PEEPHOLES:
        w_ci = tl.load(weight_ci_ptr + offs, mask=mask, other=0.0).to(dtype)
        w_cf = tl.load(weight_cf_ptr + offs, mask=mask, other=0.0).to(dtype)
        w_co = tl.load(weight_co_ptr + offs, mask=mask, other=0.0).to(dtype)
    return w_ci, w_cf, w_co


@triton.jit
def cell(pre_i, pre_f, pre_g, c_prev, w_ci, w_cf, PEEPHOLES: tl.constexpr):
    if PEEPHOLES:
        pre_i += c_prev * w_ci
        pre_f += c_prev * w_cf
    i = sigmoid(pre_i)  # F2
    f = sigmoid(pre_f)  # F3
    g = tanh(pre_g)  # F4
    c = f * c_prev + i * g  # F5
    return i, f, g, c


@triton.jit
def output(pre_o, c, w_co, PEEPHOLES: tl.constexpr):
    if PEEPHOLES:
        pre_o += c * w_co
    o = sigmoid(pre_o)  # F6
    m = o * tanh(c)  # F7
    return o, m


@triton.jit
def output_backward(dm, o, c):
    return dm * tanh(c) * o * (1 - o)  # B3


@triton.jit
def cell_backward(
    dm, dpre_o, dc_next, i, f, g, o, c, c_prev, w_ci, w_cf, w_co, PEEPHOLES: tl.constexpr
):
    """`dc_next` holds what the loss asks of the cell itself, dcells, already."""
    tanh_c = tanh(c)
    dc = dc_next + dm * o * (1 - tanh_c * tanh_c)  # B4
    if PEEPHOLES:
        dc += dpre_o * w_co
    dpre_i = dc * g * i * (1 - i)  # B5
    dpre_f = dc * c_prev * f * (1 - f)  # B6
    dpre_g = dc * i * (1 - g * g)  # B7
    dc_prev = dc * f  # B8
    if PEEPHOLES:
        dc_prev += dpre_i * w_ci + dpre_f * w_cf
    return dpre_i, dpre_f, dpre_g, dc_prev


@triton.jit
def tangent(
    tpre_i,
    tpre_f,
    tpre_g,
    tpre_o,
    tc_prev,
    i,
    f,
    g,
    o,
    c,
    c_prev,
    w_ci,
    w_cf,
    w_co,
    tw_ci,
    tw_cf,
    tw_co,
    PEEPHOLES: tl.constexpr,
):
    if PEEPHOLES:
        tpre_i += tc_prev * w_ci + c_prev * tw_ci
        tpre_f += tc_prev * w_cf + c_prev * tw_cf
    ti = i * (1 - i) * tpre_i  # R2
    tf = f * (1 - f) * tpre_f  # R3
    tg = (1 - g * g) * tpre_g  # R4
    tc = tf * c_prev + f * tc_prev + ti * g + i * tg  # R5
    if PEEPHOLES:
        tpre_o += tc * w_co + c * tw_co
    to = o * (1 - o) * tpre_o  # R6
    tanh_c = tanh(c)
    tm = to * tanh_c + o * (1 - tanh_c * tanh_c) * tc  # R7
    return ti, tf, tg, to, tc, tm


@triton.jit
def backward_tangent(
    dm,
    tdm,
    dpre_i,
    dpre_f,
    dpre_o,
    dc_next,
    tdc_next,
    i,
    f,
    g,
    o,
    ti,
    tf,
    tg,
    to,
    c,
    tc,
    c_prev,
    tc_prev,
    w_ci,
    w_cf,
    w_co,
    tw_ci,
    tw_cf,
    tw_co,
    PEEPHOLES: tl.constexpr,
):
    """`dc_next`, `tdc_next` hold dcells and tdcells already. Returns tdpre, tdc_prev, dc_prev."""
    tanh_c = tanh(c)
    slope = 1 - tanh_c * tanh_c
    dc = dc_next + dm * o * slope  # B4
    tdpre_o = (tdm * tanh_c + dm * slope * tc) * o * (1 - o) + dm * tanh_c * (1 - 2 * o) * to  # R11
    tdc = tdc_next + (tdm * o + dm * to - 2 * dm * o * tanh_c * tc) * slope  # R12
    if PEEPHOLES:
        dc += dpre_o * w_co
        tdc += tdpre_o * w_co + dpre_o * tw_co
    tdpre_i = (tdc * g + dc * tg) * i * (1 - i) + dc * g * (1 - 2 * i) * ti  # R13
    tdpre_f = (tdc * c_prev + dc * tc_prev) * f * (1 - f) + dc * c_prev * (1 - 2 * f) * tf  # R14
    tdpre_g = (tdc * i + dc * ti) * (1 - g * g) - 2 * dc * i * g * tg  # R15
    tdc_prev = tdc * f + dc * tf  # R16
    dc_prev = dc * f  # B8
    if PEEPHOLES:
        tdc_prev += tdpre_i * w_ci + dpre_i * tw_ci + tdpre_f * w_cf + dpre_f * tw_cf
        dc_prev += dpre_i * w_ci + dpre_f * w_cf
    return tdpre_i, tdpre_f, tdpre_g, tdpre_o, tdc_prev, dc_prev
