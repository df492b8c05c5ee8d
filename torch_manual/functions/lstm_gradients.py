"""The LSTM's gradients as functions of their own, to be differentiated again (lstm.md).

    lstm_gradients            Jᵀ d: the backward pass             B1 to B15
    lstm_tangents             J u:  the forward pass' tangent      R1 to R8
    lstm_gradient_tangents    the tangent of Jᵀ d along u          R9 to R21

d are the gradients of the outputs, u tangents of the inputs. Because Jᵀ d is ∇⟨J u, d⟩ with respect
to u, each is the others' derivative: the backward of Jᵀ d is J u for d and R{Jᵀ d} for the inputs;
so is, with the roles exchanged, the backward of J u.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_manual.functions._autocast import autocast_off
from torch_manual.functions.lstm_arguments import check_arguments
from torch_manual.kernels import cpu_gradients
from torch_manual.kernels.lstm import LSTMWeights, by_direction, lstm_backward
from torch_manual.kernels.lstm_sums import (
    apart,
    lstm_input_sums,
    lstm_peephole_sums,
    lstm_weight_sums,
)
from torch_manual.kernels.lstm_tangent import lstm_backward_tangent, lstm_tangent
from torch_manual.kernels.rows import Run, n_steps, previous, runs

Tensors = Sequence[Tensor | None]


NOTHING = LSTMWeights(*(None,) * len(LSTMWeights._fields))  # type: ignore[arg-type]
BLOCK_ROWS = 4096
_CHANGED = "changed since the forward pass, through .data, Module.to or a hook of saved tensors"


class Primal(NamedTuple):
    """A forward pass: what went in, and what was kept of what came out."""

    x: Tensor
    h0: Tensor
    c0: Tensor
    batch_sizes: Tensor | None
    y: Tensor
    gates: Tensor
    cells: Tensor
    weights: Tensors

    @classmethod
    def of(cls, tensors: Tensors) -> Primal:
        return cls(*tensors[:7], tensors[7:])  # type: ignore[arg-type, call-arg]


def check_saved(outer: Tensors, p: Primal) -> None:
    """Refuse tensors that are no longer what a forward pass has kept for its derivatives.

    Module.to, `.data` and the hooks of saved tensors change them without autograd's notice.

    Args:
        outer: gradients, whose dtypes autograd has checked; dy first.
        p: gates and cells may be None, h0 and c0 without directions.
    """
    if torch.compiler.is_compiling():  # of traced tensors, which are as they were
        return
    x, h0, c0, batch_sizes, y, gates, cells, weights = p
    (N, I), (*_, B, P), H, dtype = x.shape, h0.shape, c0.shape[-1], x.dtype
    D = len(weights) // len(NOTHING)
    try:
        check_arguments((I, P, H), x, h0, c0, by_direction(weights))
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(f"{error} ({_CHANGED})") from error
    fits = batch_sizes is not None or N % (B or 1) == 0
    fits &= h0.numel() == D * B * P and c0.numel() == D * B * H
    fits &= y.dtype is dtype and y.shape == (N, D * P)
    if gates is not None:
        fits &= gates.dtype is cells.dtype is dtype
        fits &= gates.shape == (D, N, 4 * H) and cells.shape == (D, N, H)
    for t in outer:
        fits &= t is None or t.dtype is dtype
    fits &= outer[0] is None or outer[0].shape == y.shape
    if not fits:
        raise RuntimeError(
            f"lstm: x {tuple(x.shape)} of {dtype}, states, y, gates, cells and the gradients of "
            f"outputs do not fit together ({_CHANGED})"
        )


class Factors(NamedTuple):
    """What a direction's dpre and dh are multiplied with to give the weights' gradients."""

    x: Tensor | None
    h_prev: Tensor | None
    m: Tensor | None
    c_prev: Tensor | None
    c: Tensor | None


def lstm_gradients(
    needs: Sequence[bool],
    outer: Tensors,
    p: Primal,
    samples: int | None = None,
    keep_dpre: bool = True,
) -> tuple[Tensor | None, ...]:
    """Return dx, dh0, dc0, dpre, dh and the gradient of every weight.

    dh is that of all rows, or (D, 0): `lstm_gradient_tangents` then makes it again.

    Args:
        needs: whether to compute the gradient of x, h0, c0 and each weight; else it is None.
        outer: dy, dh_n, dc_n, dcells; None is zero.
        p: the forward pass.
        samples: if given, rows hold this many samples side by side, (row, sample), whose weights'
            gradients are kept apart: these and dx then have a leading dimension of samples.
        keep_dpre: False if dpre and dh are not looked at; they may then be None.
    """
    check_saved(outer, p)
    in_blocks = samples is None and not torch.compiler.is_compiling()
    with autocast_off(p.gates):
        if in_blocks and cpu_gradients.serves(p.x, p.weights, *outer, *p[1:3], *p[4:7]):
            return cpu_gradients.lstm_gradients(needs, outer, *p, keep_dpre)
        dpre, dh, dh0, dc0 = lstm_backward(*outer, p.c0, p.batch_sizes, p.weights, p.gates, p.cells)
        parts: list[slice | None] = [None]
        if in_blocks:
            found = blocks(p.x.shape[0], p.h0.shape[1], p.batch_sizes)
            parts = [block.rows for block in found] if len(found) > 1 else parts
        dx = None
        if needs[0]:
            dx = apart(joined([dx_of(_rows(dpre, rows), p.weights) for rows in parts]), samples)
        dweights: list[Tensor | None] = []
        for d, (need, w) in enumerate(
            zip(by_direction(needs[3:]), by_direction(p.weights), strict=True)
        ):
            factors = factors_of(need, p, d)
            total = NOTHING
            for rows in parts if d else reversed(parts):
                part = factors
                if rows is not None:
                    part = Factors(*(None if t is None else _rows(t, rows) for t in factors))
                dh_d = _rows(dh[d], rows) if need.weight_hr else dh[d]
                sums = sums_of(need, _rows(dpre[d], rows), dh_d, part, w, samples)
                total = add_each(total, sums)
            dweights += total
        return (
            dx,
            dh0 if needs[1] else None,
            dc0 if needs[2] else None,
            dpre,
            dh,
            *dweights,
        )


def lstm_tangents(u: Tensors, p: Primal) -> tuple[Tensor, ...]:
    """Return the tangents of y, h_n, c_n, cells and gates along `u` = (tx, th0, tc0, *tweights)."""
    tx, th0, tc0, *tweights = u
    check_saved((None,), p)
    with autocast_off(p.x):
        ty, th_n, tc_n, tgates, tcells = lstm_tangent(
            tx, th0, tc0, tweights, *p[:4], p.weights, *p[4:7]
        )
    return ty, th_n, tc_n, tcells, tgates


def lstm_gradient_tangents(
    needs: Sequence[bool],
    outer: Tensors,
    touter: Tensors,
    u: Tensors,
    p: Primal,
    ty: Tensor,
    tgates: Tensor,
    tcells: Tensor,
    dpre: Tensor,
    dh: Tensor,
) -> tuple[Tensor | None, ...]:
    """Return the tangents of dx, dh0, dc0 and the weights' gradients along `u`, in that order.

    ty, tgates and tcells are those of `lstm_tangents` along `u`; dpre and dh of `lstm_gradients`;
    `touter` the tangents of `outer`, None for zero.
    """
    tx, th0, tc0, *tweights = u
    check_saved((*outer, dpre), p)
    with autocast_off(p.gates):
        tdpre, tdh, tdh0, tdc0 = lstm_backward_tangent(
            outer,
            touter,
            dpre,
            dh,
            p.c0,
            tc0,
            p.batch_sizes,
            p.weights,
            tweights,
            p.gates,
            p.cells,
            tgates,
            tcells,
        )
        tdx = None
        if needs[0]:
            tdx = _add(dx_of(tdpre, p.weights), dx_of(dpre, tweights))  # R18
        tdweights: list[Tensor | None] = []
        for d, (need, w) in enumerate(
            zip(by_direction(needs[3:]), by_direction(p.weights), strict=True)
        ):
            factors = factors_of(need, p, d)
            tfactors = _tangent_factors(need, p, d, tx, th0, tc0, ty, tgates, tcells)
            products = need._replace(bias_ih=False, bias_hh=False)  # type: ignore[arg-type]
            first = sums_of(need, tdpre[d], tdh[d], factors, w)  # R19, R21
            second = sums_of(products, dpre[d], dh[d], tfactors, w)  # R20
            tdweights += add_each(first, second)
        return tdx, tdh0 if needs[1] else None, tdc0 if needs[2] else None, *tdweights


def blocks(n_rows: int, batch: int, batch_sizes: Tensor | None) -> list[Run]:
    """The batch in runs of BLOCK_ROWS rows or more, over which sums are taken one after another.

    Long batches are summed block by block, in the order of the backward pass, so that recomputing
    one block at a time (lstm_recompute.py) adds the very same numbers.
    """
    T = n_steps(n_rows, batch, batch_sizes)
    whole = Run(slice(0, T), slice(0, n_rows))
    if n_rows < 2 * BLOCK_ROWS:
        return [whole]
    sizes = [batch] * T if batch_sizes is None else batch_sizes.tolist()
    return runs(whole, sizes, 1, BLOCK_ROWS)


def most_blocks(n_rows: int) -> int:
    """How many `blocks` so many rows make at most."""
    return n_rows // BLOCK_ROWS + 1


def _rows(t: Tensor, rows: slice | None) -> Tensor:
    """Rows of a (…, N, K) tensor; None for all, which leaves `t` as it is."""
    return t if rows is None else t[..., rows, :]


def dx_of(dpre: Tensor, weights: Tensors) -> Any:
    """B10; dpre is (D, N, 4H)."""
    each = [w.weight_ih for w in by_direction(weights)]
    rows = [dpre[d] for d, w in enumerate(each) if w is not None]
    weights_ih = [w for w in each if w is not None]
    return lstm_input_sums(rows, weights_ih) if rows else None


def factors_of(need: LSTMWeights, p: Primal, d: int, reverse: bool = False) -> Factors:
    """The factors that the needed gradients of direction d take.

    `reverse`: a single direction runs from the last step to the first, as a second one does.
    """
    reverse = reverse or bool(d)
    h_prev = m = c_prev = None
    gates, cells = p.gates[d], p.cells[d]
    if need.weight_hh:
        h_prev = previous(_direction(p.y, p.h0, d), p.h0[d], p.batch_sizes, reverse)
    if need.weight_hr:
        m = gates.chunk(4, -1)[3] * torch.tanh(cells)
    if need.weight_ci or need.weight_cf:
        c_prev = previous(cells, p.c0[d], p.batch_sizes, reverse)
    return Factors(p.x, h_prev, m, c_prev, cells)


def _tangent_factors(
    need: LSTMWeights,
    p: Primal,
    d: int,
    tx: Tensor | None,
    th0: Tensor | None,
    tc0: Tensor | None,
    ty: Tensor,
    tgates: Tensor,
    tcells: Tensor,
) -> Factors:
    th_prev = tm = tc_prev = None
    if need.weight_hh:
        before = torch.zeros_like(p.h0[d]) if th0 is None else th0[d]
        th_prev = previous(_direction(ty, p.h0, d), before, p.batch_sizes, bool(d))
    if need.weight_hr:
        o, to = p.gates[d].chunk(4, -1)[3], tgates[d].chunk(4, -1)[3]
        tanh_c = torch.tanh(p.cells[d])
        tm = to * tanh_c + o * (1 - tanh_c**2) * tcells[d]
    if need.weight_ci or need.weight_cf:
        before = torch.zeros_like(p.c0[d]) if tc0 is None else tc0[d]
        tc_prev = previous(tcells[d], before, p.batch_sizes, bool(d))
    return Factors(tx, th_prev, tm, tc_prev, tcells[d])


def _direction(y: Tensor, h0: Tensor, d: int) -> Tensor:
    P = h0.shape[2]
    return y[:, d * P : (d + 1) * P]


def sums_of(
    need: LSTMWeights,
    dpre: Tensor,
    dh: Tensor,
    factors: Factors,
    w: LSTMWeights,
    samples: int | None = None,
) -> LSTMWeights:
    """The sums over all rows, or all of each sample; None where not needed or zero."""
    x, h_prev, m, c_prev, c = factors
    x = x if need.weight_ih else None
    bias = bool(need.bias_ih or need.bias_hh)
    dweight_ih, dweight_hh, db = lstm_weight_sums(dpre, x, h_prev, bias, samples)
    dweight_hr = None
    if m is not None:
        dweight_hr, _, _ = lstm_weight_sums(dh, m, None, False, samples)  # B14
    return LSTMWeights(
        dweight_ih if x is not None else None,  # type: ignore[arg-type]
        dweight_hh if h_prev is not None else None,  # type: ignore[arg-type]
        db if need.bias_ih else None,
        (db.clone() if need.bias_ih else db) if need.bias_hh else None,
        dweight_hr,
        *_peephole_sums(need, dpre, factors, w, samples),
    )


def _peephole_sums(
    need: LSTMWeights, dpre: Tensor, factors: Factors, w: LSTMWeights, samples: int | None = None
) -> Tensors:
    if not any(need[5:]):
        return None, None, None
    diagonal = w.weight_ci is not None and w.weight_ci.dim() == 1
    c_prev, c = factors[3:]
    if all(need[5:]) and diagonal and samples is None and c_prev is not None and c is not None:
        sums = lstm_peephole_sums(dpre, c_prev, c)
        if sums is not None:
            return sums
    dpre_i, dpre_f, _, dpre_o = apart(dpre, samples).chunk(4, -1)
    c_prev, c = (None if t is None else apart(t, samples) for t in factors[3:])
    return (
        _peephole_sum(dpre_i, c_prev, w.weight_ci) if need.weight_ci else None,  # B15
        _peephole_sum(dpre_f, c_prev, w.weight_cf) if need.weight_cf else None,
        _peephole_sum(dpre_o, c, w.weight_co) if need.weight_co else None,
    )


def _peephole_sum(dpre: Tensor, c: Tensor | None, weight: Tensor | None) -> Tensor | None:
    if c is None or weight is None:
        return None
    return (dpre * c).sum(-2) if weight.dim() == 1 else dpre.mT @ c


def add_each(a: LSTMWeights, b: LSTMWeights) -> LSTMWeights:
    return LSTMWeights(*(_add(s, t) for s, t in zip(a, b, strict=True)))  # type: ignore[arg-type]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), -2)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
