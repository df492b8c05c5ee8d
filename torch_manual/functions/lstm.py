"""The LSTM layer and its hand-derived gradient (equations: docs/derivations/lstm.md).

The recurrence and its reverse are opaque ops (torch_manual/kernels/lstm.py). This file holds what
surrounds them: the `autograd.Function`, and the gradients that are sums over time, B10 to B15.

T steps, B sequences, N rows (T·B, or Σ batch_sizes when packed), I inputs, H hidden units,
P outputs (proj_size, or H), D directions. Gates stand in the order i, f, g, o.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_manual.functions._autocast import autocast_cast, autocast_off
from torch_manual.kernels.lstm import LSTMWeights, by_direction, lstm_backward, lstm_forward
from torch_manual.kernels.rows import previous

__all__ = ["LSTMWeights", "lstm_cell", "lstm_layer"]


def lstm_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[LSTMWeights],
    batch_sizes: Tensor | None = None,
    *,
    return_cells: bool = False,
) -> tuple[Tensor, ...]:
    """Run one LSTM layer, in one direction or two.

    For every step t of each direction (F1 to F8; Hochreiter & Schmidhuber 1997; peepholes: Gers,
    Schraudolph & Schmidhuber 2002 and Graves 2013, equations 7 to 11)::

        pre_i, pre_f, pre_g, pre_o = x_t W_ihᵀ + b_ih + h_{t-1} W_hhᵀ + b_hh
        i = σ(pre_i + c_{t-1} ⊙ w_ci)    f = σ(pre_f + c_{t-1} ⊙ w_cf)    g = tanh(pre_g)
        c_t = f ⊙ c_{t-1} + i ⊙ g        o = σ(pre_o + c_t ⊙ w_co)
        h_t = (o ⊙ tanh(c_t)) W_hrᵀ

    Args:
        x: (T, B, I), or (N, I) rows of a packed batch.
        h0: (D, B, P).
        c0: (D, B, H).
        weights: one `LSTMWeights` per direction; the second runs from the last step to the first.
        batch_sizes: (T,) int64 on the CPU, of a PackedSequence; None when `x` is dense.
        return_cells: return every c_t as well.

    Returns:
        y, (T, B, D·P) or (N, D·P); h_n, (D, B, P); c_n, (D, B, H); and with `return_cells` the
        cells, shaped like y with H in place of P. All are differentiable.

    Saved for backward: x, h0, c0, weights, y, the gates (D, N, 4H) and the cells (D, N, H).

    Raises:
        ValueError: a weight's shape does not fit; the message names it.
        RuntimeError: tensors of different devices or dtypes.
    """
    x, h0, c0, *flat = autocast_cast(x, h0, c0, *(t for w in weights for t in w))
    weights = by_direction(flat)
    _check(x, h0, c0, weights)
    if torch.compiler.is_compiling() and h0 is c0:
        c0 = c0.clone()
    save = return_cells or _needs_graph(x, h0, c0, *flat)
    rows = x if batch_sizes is not None else x.reshape(-1, x.shape[-1])
    y, h_n, c_n, cells, _ = LSTMFunction.apply(rows, h0, c0, batch_sizes, save, *flat)
    y = y.view(*x.shape[:-1], y.shape[-1])
    if not return_cells:
        return y, h_n, c_n
    return y, h_n, c_n, cells.movedim(0, 1).reshape(*x.shape[:-1], -1)


def lstm_cell(x: Tensor, hx: tuple[Tensor, Tensor], weights: LSTMWeights) -> tuple[Tensor, Tensor]:
    """Run one LSTM step: `lstm_layer` with T = 1 and one direction.

    Args:
        x: (B, I).
        hx: h_{t-1} and c_{t-1}, (B, H) each.
        weights: the cell's parameters.

    Returns:
        h_t and c_t, (B, H) each.
    """
    _, h_n, c_n = lstm_layer(x.unsqueeze(0), hx[0].unsqueeze(0), hx[1].unsqueeze(0), [weights])
    return h_n.squeeze(0), c_n.squeeze(0)


class LSTMFunction(torch.autograd.Function):
    """(x, h0, c0, weights) → (y, h_n, c_n, cells, gates), with the backward of lstm.md."""

    @staticmethod
    def forward(
        x: Tensor,
        h0: Tensor,
        c0: Tensor,
        batch_sizes: Tensor | None,
        save: bool,
        *weights: Tensor | None,
    ) -> tuple[Tensor, ...]:
        with autocast_off(x):
            y, h_n, c_n, gates, cells = lstm_forward(x, h0, c0, batch_sizes, weights, save)
        return y, h_n, c_n, cells, gates

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        x, h0, c0, batch_sizes, _, *weights = inputs
        y, _, _, cells, gates = output
        ctx.mark_non_differentiable(gates)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h0, c0, batch_sizes, y, gates, cells, *weights)

    @staticmethod
    def backward(
        ctx: Any,
        dy: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        dcells: Tensor | None,
        _: None,
    ) -> tuple[Tensor | None, ...]:
        outer = (dy, dh_n, dc_n, dcells)
        if all(t is None for t in outer):
            return (None,) * len(ctx.needs_input_grad)
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            dx, dh0, dc0, *dweights = LSTMBackwardFunction.apply(needs, *outer, *ctx.saved_tensors)
        else:
            dx, dh0, dc0, *dweights = lstm_gradients(needs, *outer, *ctx.saved_tensors)
        return dx, dh0, dc0, None, None, *dweights


class LSTMBackwardFunction(torch.autograd.Function):
    """`lstm_gradients` as a node of the graph that `create_graph=True` asks for."""

    @staticmethod
    def forward(needs: tuple[bool, ...], *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return lstm_gradients(needs, *tensors)  # type: ignore[arg-type]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "lstm: this version has no second-order gradient: the graph made by create_graph=True "
            "can not be differentiated through an LSTM; torch_manual.restore(model) gives back "
            "torch.nn's"
        )


def lstm_gradients(
    needs: tuple[bool, ...],
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    *weights: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """dx, dh0, dc0 and the gradient of every weight, each None unless `needs` asks for it.

    `needs` is `ctx.needs_input_grad` of `LSTMFunction`: x, h0, c0, two that have none, weights.
    """
    with autocast_off(gates):
        dpre, dh, dh0, dc0 = lstm_backward(
            dy, dh_n, dc_n, dcells, c0, batch_sizes, weights, gates, cells
        )
        directions = by_direction(weights)
        dx = None
        if needs[0]:
            dx = dpre[0] @ directions[0].weight_ih  # B10
            for d, w in enumerate(directions[1:], 1):
                dx = torch.addmm(dx, dpre[d], w.weight_ih)
        P = h0.shape[2]
        dweights: list[Tensor | None] = []
        for d, (w, need) in enumerate(zip(directions, by_direction(needs[5:]), strict=True)):
            y_d = y[:, d * P : (d + 1) * P]
            dweights += _weight_gradients(
                need, w, dpre[d], dh[d], x, y_d, h0[d], c0[d], gates[d], cells[d], batch_sizes, d
            )
        return dx, dh0 if needs[1] else None, dc0 if needs[2] else None, *dweights


def _weight_gradients(
    need: LSTMWeights,
    w: LSTMWeights,
    dpre: Tensor,
    dh: Tensor,
    x: Tensor,
    y: Tensor,
    h0: Tensor,
    c0: Tensor,
    gates: Tensor,
    cells: Tensor,
    batch_sizes: Tensor | None,
    reverse: int,
) -> LSTMWeights:
    """Sums over all rows, taken once, as matrix products."""
    dweight_ih = dweight_hh = dbias_ih = dbias_hh = dweight_hr = None
    if need.weight_ih:
        dweight_ih = dpre.T @ x  # B11
    if need.weight_hh:
        dweight_hh = dpre.T @ previous(y, h0, batch_sizes, bool(reverse))  # B12
    if need.bias_ih:
        dbias_ih = dpre.sum(0)  # B13
    if need.bias_hh:
        dbias_hh = dpre.sum(0) if dbias_ih is None else dbias_ih.clone()
    if need.weight_hr:
        o = gates.chunk(4, -1)[3]
        dweight_hr = dh.T @ (o * torch.tanh(cells))  # B14
    dpeepholes: list[Tensor | None] = [None, None, None]
    if need.weight_ci or need.weight_cf or need.weight_co:
        c_prev = previous(cells, c0, batch_sizes, bool(reverse))
        dpre_i, dpre_f, _, dpre_o = dpre.chunk(4, -1)
        dpeepholes = [  # B15
            _peephole_gradient(dpre_k, c, weight) if weight is not None and wanted else None
            for dpre_k, c, weight, wanted in zip(
                (dpre_i, dpre_f, dpre_o), (c_prev, c_prev, cells), w[5:], need[5:], strict=True
            )
        ]
    return LSTMWeights(dweight_ih, dweight_hh, dbias_ih, dbias_hh, dweight_hr, *dpeepholes)  # type: ignore[arg-type]


def _peephole_gradient(dpre: Tensor, c: Tensor, weight: Tensor) -> Tensor:
    return (dpre * c).sum(0) if weight.dim() == 1 else dpre.T @ c


def _needs_graph(*tensors: Tensor | None) -> bool:
    """Whether anything but the outputs must be kept: gradients, or a transform of torch.func."""
    if torch._C._are_functorch_transforms_active():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _check(x: Tensor, h0: Tensor, c0: Tensor, weights: Sequence[LSTMWeights]) -> None:
    I, P, H = x.shape[-1], h0.shape[-1], c0.shape[-1]
    for state in (h0, c0):
        _check_same(x, state, "hidden")
    for w in weights:
        full = w.weight_ci is not None and w.weight_ci.dim() == 2
        expected: list[tuple[str, tuple[int, ...]]] = [
            ("(4H, I)", (4 * H, I)),
            ("(4H, P)", (4 * H, P)),
        ]
        expected += [("(4H,)", (4 * H,))] * 2 + [("(P, H)", (P, H))]
        expected += [("(H, H)", (H, H)) if full else ("(H,)", (H,))] * 3
        for name, t, (symbols, shape) in zip(w._fields, w, expected, strict=True):
            if t is None:
                continue
            if t.shape != shape:
                got = tuple(t.shape)
                raise ValueError(f"lstm: {name} must be {symbols} = {shape}, got {got}")
            _check_same(x, t, "parameter")
        if w.weight_hr is None and P != H:
            raise ValueError(f"lstm: without weight_hr, h0 must be as wide as c0, {H}, got {P}")


def _check_same(x: Tensor, other: Tensor, kind: str) -> None:
    if other.device != x.device:
        raise RuntimeError(
            f"Input and {kind} tensors are not at the same device, "
            f"found input tensor at {x.device} and {kind} tensor at {other.device}"
        )
    if other.dtype != x.dtype:
        raise RuntimeError(
            f"Input and {kind} tensors are not the same dtype, "
            f"found input tensor with {x.dtype} and {kind} tensor with {other.dtype}"
        )
