"""The LSTM layer and its hand-derived gradient (equations: docs/derivations/lstm.md).

The recurrence and its reverse are opaque ops (torch_manual/kernels/lstm.py). This file wraps them
in an `autograd.Function`; the gradients that are sums over time are in lstm_gradients.py, a single
step in lstm_cell.py.

T steps, B sequences, N rows (T·B, or Σ batch_sizes when packed), I inputs, H hidden units,
P outputs (proj_size, or H), D directions. Gates stand in the order i, f, g, o.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torch_manual.functions._autocast import autocast_cast, autocast_factors, autocast_off
from torch_manual.functions._function import (
    PositionalFunction,
    is_wrapped,
    keep_signature,
    one_node,
)
from torch_manual.functions.lstm_arguments import check_layer, check_recompute
from torch_manual.functions.lstm_compiled import lstm_gradients_op
from torch_manual.functions.lstm_forward_mode import lstm_forward_mode
from torch_manual.functions.lstm_gradients import Primal, Tensors, lstm_gradients
from torch_manual.functions.lstm_recompute import MOST_STEPS, lstm_recompute
from torch_manual.functions.lstm_second_order import (
    LSTMGradientFunction,
    LSTMTangentFunction,
    fold,
    vmap_by_loop,
)
from torch_manual.kernels.lstm import LSTMWeights, by_direction, lstm_forward
from torch_manual.kernels.rows import as_before, as_rows


def lstm_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[LSTMWeights],
    batch_sizes: Tensor | None = None,
    *,
    return_cells: bool = False,
    recompute: int | None = None,
) -> tuple[Tensor, ...]:
    """Run one LSTM layer, in one direction or two.

    For every step t of each direction (F1 to F8; Hochreiter & Schmidhuber 1997; peepholes: Gers,
    Schraudolph & Schmidhuber 2002 and Graves 2013, equations 7 to 11)::

        pre_i, pre_f, pre_g, pre_o = x_t W_ihᵀ + b_ih + h_{t-1} W_hhᵀ + b_hh
        i = σ(pre_i + c_{t-1} ⊙ w_ci)    f = σ(pre_f + c_{t-1} ⊙ w_cf)    g = tanh(pre_g)
        c_t = f ⊙ c_{t-1} + i ⊙ g        o = σ(pre_o + c_t ⊙ w_co)
        h_t = (o ⊙ tanh(c_t)) W_hrᵀ

    Args:
        x: (T, B, I), or its (N, I) rows; those of a PackedSequence go with its batch_sizes.
        h0: (D, B, P).
        c0: (D, B, H).
        weights: one `LSTMWeights` per direction; the second runs from the last step to the first.
        batch_sizes: (T,) int64 on the CPU, of a PackedSequence; None when `x` is dense.
        return_cells: return every c_t as well.
        recompute: keep h and c of every so many steps only, and run the rest again in the backward
            pass. Gradients are the same to the bit on the CPU kernel (to rounding elsewhere, with
            weight_hr and in half precision); second order and torch.func do not work then.

    Returns:
        y, (T, B, D·P) or (N, D·P); h_n, (D, B, P); c_n, (D, B, H); and with `return_cells` the
        cells, shaped like y with H in place of P. All are differentiable.

    Saved for backward: x, h0, c0, weights, y, the gates (D, N, 4H) and the cells (D, N, H).

    Raises:
        ValueError: a weight's or state's shape does not fit, or `recompute`; the message names it.
        RuntimeError: tensors of different devices or dtypes.
        TypeError: complex tensors.
    """
    flat = [] if type(weights) is LSTMWeights else [t for w in weights for t in w]
    if len(flat) != len(weights) * len(LSTMWeights._fields):
        raise TypeError("lstm: weights must be a list of LSTMWeights, one for each direction")
    autocast = torch._C._is_any_autocast_enabled()
    if autocast:
        projected = any(w.weight_hr is not None for w in weights)
        x, h0, c0, *flat = of_autocast(batch_sizes, projected)(x, h0, c0, *flat)
        weights = by_direction(flat)
    check_layer(x, h0, c0, batch_sizes, weights)
    if recompute is not None:
        check_recompute(recompute, return_cells)
    if torch.compiler.is_exporting():
        op = torch.ops.torch_manual.lstm_layer.default
        y, h_n, c_n, cells = op(as_rows(x), h0, c0, batch_sizes, flat, return_cells)
    elif recompute is not None and torch.is_grad_enabled():
        steps = min(recompute, MOST_STEPS)
        y, h_n, c_n = lstm_recompute(as_rows(x), h0, c0, batch_sizes, steps, *flat)
    elif duals := lstm_forward_mode(x, h0, c0, batch_sizes, flat, return_cells):
        y, h_n, c_n, cells = duals
    elif needs_graph(x, h0, c0, *flat):
        y, h_n, c_n, cells, _ = _apply(as_rows(x), h0, c0, batch_sizes, *flat)
    else:
        with autocast_off(x):
            y, h_n, c_n, _, cells = lstm_forward(
                as_rows(x), h0, c0, batch_sizes, flat, return_cells
            )
        if y.dim() != x.dim() and type(y) is Tensor and not torch.compiler.is_compiling():
            y.resize_(*x.shape[:-1], y.shape[-1])  # a view from no_grad is not to be changed
    y = as_before(y, x)
    if autocast and projected:
        y, h_n = autocast_cast(y, h_n)
    if not return_cells:
        return y, h_n, c_n
    return y, h_n, c_n, as_before(cells.movedim(0, 1).flatten(1), x)


def of_autocast(batch_sizes: Tensor | None, projected: bool) -> Callable[..., tuple]:
    """How autocast casts the arguments of a layer; the y and h_n of a projection it casts as well.

    Stock has one op for the others, all of whose tensors are cast.
    """
    return autocast_cast if batch_sizes is None and not projected else autocast_factors


class LSTMFunction(PositionalFunction):
    """(x, h0, c0, weights) → (y, h_n, c_n, cells, gates)."""

    @staticmethod
    @keep_signature
    def forward(
        x: Tensor,
        h0: Tensor,
        c0: Tensor,
        batch_sizes: Tensor | None,
        *weights: Tensor | None,
    ) -> tuple[Tensor, ...]:
        with autocast_off(x):
            y, h_n, c_n, gates, cells = lstm_forward(x, h0, c0, batch_sizes, weights, True)
        return y, h_n, c_n, cells, gates

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        x, h0, c0, batch_sizes, *weights = inputs
        y, _, _, cells, gates = output
        saved = x, h0, c0, batch_sizes, y, gates, cells, *weights
        ctx.mark_non_differentiable(gates)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = (*ctx.needs_input_grad[:3], *ctx.needs_input_grad[4:])
        dx, dh0, dc0, *dweights = gradients_of(needs, outer[:4], ctx.saved_tensors)
        return dx, dh0, dc0, None, *dweights

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        tx, th0, tc0, _, *tweights = tangents
        ty, th_n, tc_n, tcells, _ = LSTMTangentFunction.apply(
            tx, th0, tc0, *tweights, *ctx.saved_tensors
        )
        return ty, th_n, tc_n, tcells, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple:
        if any(dim is not None for dim in in_dims[3:]):
            return vmap_by_loop(LSTMFunction, info, in_dims, *args)
        x, h0, c0, batch_sizes, *weights = args
        n = info.batch_size
        if batch_sizes is not None:
            batch_sizes = batch_sizes * n
        y, h_n, c_n, cells, gates = LSTMFunction.apply(
            fold(x, in_dims[0], 1, n),
            fold(h0, in_dims[1], 2, n),
            fold(c0, in_dims[2], 2, n),
            batch_sizes,
            *weights,
        )
        return (
            y.unflatten(0, (-1, n)),
            *(t.unflatten(1, (-1, n)) for t in (h_n, c_n, cells, gates)),
        ), (1, 2, 2, 2, 2)


def gradients_of(
    needs: Sequence[bool], outer: Tensors, saved: Tensors
) -> tuple[Tensor | None, ...]:
    """dx, dh0, dc0 and the weights' gradients, in a form that can be differentiated if asked to."""
    if all(t is None for t in outer):
        return (None,) * len(needs)
    if torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
        gradients = lstm_gradients_op(needs, outer, Primal.of(saved))
    elif (
        torch.is_grad_enabled()
        or transforms_are_active()
        or any(map(is_wrapped, (*outer, Primal.of(saved).y)))
    ):
        gradients = LSTMGradientFunction.apply(needs, *outer, *saved)
    else:
        gradients = lstm_gradients(needs, outer, Primal.of(saved), keep_dpre=False)
    return *gradients[:3], *gradients[5:]


@one_node
def _apply(*args: Any) -> tuple[Tensor, ...]:
    return LSTMFunction.apply(*args)


def needs_graph(*tensors: Tensor | None) -> bool:
    """Whether what backward, forward mode or a transform of torch.func needs must be kept."""
    if transforms_are_active():
        return True
    return torch.is_grad_enabled() and any_requires_grad(*tensors)


def any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def transforms_are_active() -> bool:
    """Whether a transform is at work that differentiates or batches: functionalization does not."""
    active = torch._C._are_functorch_transforms_active()
    if not active or torch.compiler.is_compiling():
        return active or forward_ad._current_level >= 0
    functorch = torch._C._functorch
    stack = functorch.get_interpreter_stack() or ()
    return any(layer.key() != functorch.TransformType.Functionalize for layer in stack)
