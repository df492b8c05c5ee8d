"""The LSTM recurrence differentiated once more: Pearlmutter's R-operator as opaque ops.

    torch_manual::lstm_tangent           tangents of the inputs → tangents of the outputs, R1 to R8
    torch_manual::lstm_backward_tangent  the same of lstm_backward's outputs,             R9 to R17

`tX` is the tangent of X and has its shape; a tangent that is None is zero. The equations are those
of docs/derivations/lstm.md, the shapes those of kernels/lstm.py. Together the two ops serve forward
mode, double backward and Hessian-vector products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torch_manual.kernels import backend, cpu_library
from torch_manual.kernels.lstm import (
    LSTMWeights,
    _cast,
    _compute_dtype,
    _peep,
    _peep_back,
    by_direction,
)
from torch_manual.kernels.rows import previous, steps

Products = list[tuple[Tensor, Tensor]]  # (N, K) and (4H, K)


def _tangent(
    tx: Tensor | None,
    th0: Tensor | None,
    tc0: Tensor | None,
    tweights: Sequence[Tensor | None],
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor | None],
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = _compute_dtype(x)
    P = h0.shape[2]
    loop, _ = _loops(x, weights)
    tx, x_d = _to(tx, dtype), x.to(dtype)
    results = []
    for d, (w, tw) in enumerate(zip(by_direction(weights), by_direction(tweights), strict=True)):
        w, tw = _cast(w, dtype), _cast(tw, dtype)
        h, c, y_d = h0[d].to(dtype), c0[d].to(dtype), y[:, d * P : (d + 1) * P].to(dtype)
        h_prev = None if tw.weight_hh is None else previous(y_d, h, batch_sizes, bool(d))
        factors = (tx, w.weight_ih), (x_d, tw.weight_ih), (h_prev, tw.weight_hh)
        results.append(
            loop(
                [(a, b) for a, b in factors if a is not None and b is not None],
                torch.zeros_like(h) if th0 is None else th0[d].to(dtype, copy=True),
                torch.zeros_like(c) if tc0 is None else tc0[d].to(dtype, copy=True),
                c,
                batch_sizes,
                w,
                tw,
                gates[d].to(dtype),
                cells[d].to(dtype),
                reverse=bool(d),
            )
        )
    ty, *states = zip(*results, strict=True)
    out = ty[0] if len(ty) == 1 else torch.cat(ty, -1), *map(_stack, states)
    return tuple(t.to(x.dtype) for t in out)  # type: ignore[return-value]


def _loops(t: Tensor, weights: Sequence[Tensor | None]) -> tuple[Callable, Callable]:
    """The two loops over time: in the compiled kernel, in Triton but for products, or plain."""
    peephole = by_direction(weights)[0].weight_ci
    if backend.triton_serves(t) and (peephole is None or peephole.dim() == 1):
        from torch_manual.kernels import triton_tangent

        return triton_tangent.tangent_direction, triton_tangent.backward_tangent_direction
    if t.is_cpu and not backend.triton_serves(t) and cpu_library.serves(t.dtype):
        from torch_manual.kernels import cpu_tangent

        return cpu_tangent.tangent_direction, cpu_tangent.backward_tangent_direction
    return _tangent_direction, _backward_tangent_direction


def known_tpre(products: Products, biases: Sequence[Tensor | None], gates: Tensor) -> Tensor:
    """R1 but for th_{t-1} W_hhᵀ, of all rows: Σ a bᵀ and the biases."""
    tpre = None
    for a, b in products:
        tpre = a @ b.T if tpre is None else tpre.addmm_(a, b.T)
    if tpre is None:
        tpre = torch.zeros_like(gates)
    for tbias in biases:
        if tbias is not None:
            tpre += tbias
    return tpre


def _tangent_direction(
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
    tpre = known_tpre(products, tw[2:4], gates)
    ty = th.new_empty(len(cells), th.shape[1])
    tgates, tcells = torch.empty_like(gates), torch.empty_like(cells)
    c_before = previous(cells, c0, batch_sizes, reverse)
    order = steps(len(cells), len(th), batch_sizes)
    for rows in reversed(order) if reverse else order:
        alive = slice(rows.stop - rows.start)
        i, f, g, o = gates[rows].chunk(4, -1)
        c_prev, tc_prev, c = c_before[rows], tc[alive], cells[rows]
        tanh_c = torch.tanh(c)
        tpre_i, tpre_f, tpre_g, tpre_o = (tpre[rows] + th[alive] @ w.weight_hh.T).chunk(4, -1)  # R1
        tpre_i = _peep(_peep(tpre_i, tc_prev, w.weight_ci), c_prev, tw.weight_ci)
        tpre_f = _peep(_peep(tpre_f, tc_prev, w.weight_cf), c_prev, tw.weight_cf)
        ti = i * (1 - i) * tpre_i  # R2
        tf = f * (1 - f) * tpre_f  # R3
        tg = (1 - g**2) * tpre_g  # R4
        tc[alive] = tf * c_prev + f * tc_prev + ti * g + i * tg  # R5
        tpre_o = _peep(_peep(tpre_o, tc[alive], w.weight_co), c, tw.weight_co)
        to = o * (1 - o) * tpre_o  # R6
        tm = to * tanh_c + o * (1 - tanh_c**2) * tc[alive]  # R7
        th[alive] = _project(tm, w.weight_hr) + _project_by(o * tanh_c, tw.weight_hr)  # R8
        ty[rows], tcells[rows], tgates[rows] = th[alive], tc[alive], torch.cat([ti, tf, tg, to], -1)
    return ty, th, tc, tgates, tcells


def _backward_tangent(
    outer: Sequence[Tensor | None],
    touter: Sequence[Tensor | None],
    dpre: Tensor,
    dh: Tensor,
    c0: Tensor,
    tc0: Tensor | None,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor | None],
    tweights: Sequence[Tensor | None],
    gates: Tensor,
    cells: Tensor,
    tgates: Tensor,
    tcells: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`outer` is dy, dh_n, dc_n, dcells and `touter` their tangents.

    dpre and dh are lstm_backward's; dh may be (D, 0), and is then made again.
    """
    dtype = _compute_dtype(gates)
    _, loop = _loops(gates, weights)
    P = by_direction(weights)[0].weight_hh.shape[1]
    results = []
    for d, (w, tw) in enumerate(zip(by_direction(weights), by_direction(tweights), strict=True)):
        w, tw = _cast(w, dtype), _cast(tw, dtype)
        dy, dh_n, dc_n, dcells = _of_direction(outer, d, P, dtype)
        dpre_d = dpre[d].to(dtype)
        if dh.dim() == 3:
            dh_d = dh[d].to(dtype)
        else:
            sent = dpre_d @ w.weight_hh
            dh_d = _dh(dy, dh_n, sent, c0.shape[1], batch_sizes, bool(d))
        results.append(
            loop(
                dh_d,
                dc_n,
                dcells,
                _of_direction(touter, d, P, dtype),
                dpre_d,
                c0[d].to(dtype),
                torch.zeros_like(c0[d], dtype=dtype) if tc0 is None else tc0[d].to(dtype),
                batch_sizes,
                w,
                tw,
                gates[d].to(dtype),
                cells[d].to(dtype),
                tgates[d].to(dtype),
                tcells[d].to(dtype),
                reverse=bool(d),
            )
        )
    tdpre, tdh, tdh0, tdc0 = (_stack(t).to(gates.dtype) for t in zip(*results, strict=True))
    return tdpre, tdh, tdh0, tdc0


def _dh(
    dy: Tensor | None,
    dh_n: Tensor | None,
    sent: Tensor,
    batch: int,
    batch_sizes: Tensor | None,
    reverse: bool,
) -> Tensor:
    """B1 of all rows of a direction; `sent` are the products of B9."""
    if len(sent) == 0:
        return sent
    last = filled(dh_n, sent, batch, sent.shape[1])
    dh = previous(sent, last, batch_sizes, not reverse)
    return dh if dy is None else dh + dy


def _backward_tangent_direction(
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
    dc_next, dcells = filled(dc_n, c0, *c0.shape), filled(dcells, cells, *cells.shape)
    tdy, tdh_next, tdc_next, tdcells = filled_outer(touter, c0, w, cells)
    c_before = previous(cells, c0, batch_sizes, reverse)
    tc_before = previous(tcells, tc0, batch_sizes, reverse)
    tdpre = torch.empty_like(dpre)
    tdh_rows = torch.empty_like(dh_rows) if w.weight_hr is not None else dpre.new_empty(0)
    if tw.weight_hh is not None:
        tsent_back = dpre @ tw.weight_hh
    order = steps(len(dpre), len(c0), batch_sizes)
    for rows in order if reverse else reversed(order):
        alive = slice(rows.stop - rows.start)
        (i, f, g, o), (ti, tf, tg, to) = gates[rows].chunk(4, -1), tgates[rows].chunk(4, -1)
        c_prev, tc_prev, tc = c_before[rows], tc_before[rows], tcells[rows]
        tanh_c = torch.tanh(cells[rows])
        dpre_i, dpre_f, _, dpre_o = dpre[rows].chunk(4, -1)
        dh = dh_rows[rows]
        dm = dh if w.weight_hr is None else dh @ w.weight_hr
        dc = dc_next[alive] + dcells[rows] + dm * o * (1 - tanh_c**2)
        dc = dc + _peep_back(dpre_o, w.weight_co)
        tdh = tdy[rows] + tdh_next[alive]  # R9
        tdm = tdh if w.weight_hr is None else tdh @ w.weight_hr + _product(dh, tw.weight_hr)  # R10
        tdpre_o = (  # R11
            (tdm * tanh_c + dm * (1 - tanh_c**2) * tc) * o * (1 - o)
            + dm * tanh_c * (1 - 2 * o) * to
        )
        tdc = (  # R12
            tdc_next[alive]
            + tdcells[rows]
            + (tdm * o + dm * to - 2 * dm * o * tanh_c * tc) * (1 - tanh_c**2)
            + _peep_back(tdpre_o, w.weight_co)
            + _peep_back(dpre_o, tw.weight_co)
        )
        tdpre_i = (tdc * g + dc * tg) * i * (1 - i) + dc * g * (1 - 2 * i) * ti  # R13
        tdpre_f = (tdc * c_prev + dc * tc_prev) * f * (1 - f)  # R14
        tdpre_f += dc * c_prev * (1 - 2 * f) * tf
        tdpre_g = (tdc * i + dc * ti) * (1 - g**2) - 2 * dc * i * g * tg  # R15
        tdc_next[alive] = (  # R16
            tdc * f
            + dc * tf
            + _peep_back(tdpre_i, w.weight_ci)
            + _peep_back(dpre_i, tw.weight_ci)
            + _peep_back(tdpre_f, w.weight_cf)
            + _peep_back(dpre_f, tw.weight_cf)
        )
        tdpre[rows] = torch.cat([tdpre_i, tdpre_f, tdpre_g, tdpre_o], -1)
        tdh_next[alive] = tdpre[rows] @ w.weight_hh  # R17
        if tw.weight_hh is not None:
            tdh_next[alive] += tsent_back[rows]
        dc_next[alive] = dc * f + _peep_back(dpre_i, w.weight_ci) + _peep_back(dpre_f, w.weight_cf)
        if w.weight_hr is not None:
            tdh_rows[rows] = tdh
    return tdpre, tdh_rows, tdh_next, tdc_next


def _of_direction(
    outer: Sequence[Tensor | None], d: int, P: int, dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """dy, dh_n, dc_n and dcells of one direction."""
    dy, *states = outer
    dy = None if dy is None else dy[:, d * P : (d + 1) * P]
    return tuple(_to(t, dtype) for t in (dy, *(None if t is None else t[d] for t in states)))


def filled_outer(
    outer: Sequence[Tensor | None], c0: Tensor, w: LSTMWeights, cells: Tensor
) -> list[Tensor]:
    """dy, dh_n, dc_n and dcells as `filled` has them."""
    (N, H), B, P = cells.shape, len(c0), w.weight_hh.shape[1]
    shapes = (N, P), (B, P), (B, H), (N, H)
    return [filled(t, cells, *shape) for t, shape in zip(outer, shapes, strict=True)]


def filled(t: Tensor | None, like: Tensor, *shape: int) -> Tensor:
    """A copy of `t`, free to be changed, or zeros for None."""
    if t is None:
        return like.new_zeros(shape)
    return t.clone(memory_format=torch.contiguous_format)


def _project(m: Tensor, weight_hr: Tensor | None) -> Tensor:
    return m if weight_hr is None else m @ weight_hr.T


def _project_by(m: Tensor, tweight_hr: Tensor | None) -> Tensor | int:
    return 0 if tweight_hr is None else m @ tweight_hr.T


def _product(a: Tensor, b: Tensor | None) -> Tensor | int:
    return 0 if b is None else a @ b


def _stack(tensors: tuple[Tensor, ...]) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def _to(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)


def _fake_tangent(
    tx: Tensor | None,
    th0: Tensor | None,
    tc0: Tensor | None,
    tweights: Sequence[Tensor | None],
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor | None],
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (y, h0, c0, gates, cells))


def _fake_backward_tangent(
    outer: Sequence[Tensor | None],
    touter: Sequence[Tensor | None],
    dpre: Tensor,
    dh: Tensor,
    c0: Tensor,
    tc0: Tensor | None,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor | None],
    tweights: Sequence[Tensor | None],
    gates: Tensor,
    cells: Tensor,
    tgates: Tensor,
    tcells: Tensor,
) -> tuple[Tensor, ...]:
    w = by_direction(weights)[0]
    (D, N, _), B, P = gates.shape, c0.shape[1], w.weight_hh.shape[1]
    shapes = gates.shape, (D, 0) if w.weight_hr is None else (D, N, P), (D, B, P), c0.shape
    return tuple(gates.new_empty(shape) for shape in shapes)


for _name, _schema, _plain, _fake in (
    (
        "torch_manual::lstm_tangent",
        "(Tensor? tx, Tensor? th0, Tensor? tc0, Tensor?[] tweights, Tensor x, Tensor h0, Tensor c0,"
        " Tensor? batch_sizes, Tensor?[] weights, Tensor y, Tensor gates, Tensor cells)"
        " -> (Tensor ty, Tensor th_n, Tensor tc_n, Tensor tgates, Tensor tcells)",
        _tangent,
        _fake_tangent,
    ),
    (
        "torch_manual::lstm_backward_tangent",
        "(Tensor?[] outer, Tensor?[] touter, Tensor dpre, Tensor dh, Tensor c0, Tensor? tc0,"
        " Tensor? batch_sizes, Tensor?[] weights, Tensor?[] tweights, Tensor gates, Tensor cells,"
        " Tensor tgates, Tensor tcells)"
        " -> (Tensor tdpre, Tensor tdh, Tensor tdh0, Tensor tdc0)",
        _backward_tangent,
        _fake_backward_tangent,
    ),
):
    torch.library.define(_name, _schema)
    torch.library.impl(_name, "default", _plain)
    torch.library.register_fake(_name, _fake)

lstm_tangent = torch.ops.torch_manual.lstm_tangent.default
lstm_backward_tangent = torch.ops.torch_manual.lstm_backward_tangent.default
