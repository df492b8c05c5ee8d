"""The LSTM layer and its hand-derived gradient (equations: docs/derivations/lstm.md).

The recurrence and its reverse are opaque ops (torch_manual/kernels/lstm.py). This file wraps them
in an `autograd.Function`; the gradients that are sums over time are in lstm_gradients.py, a single
step in lstm_cell.py.

T steps, B sequences, N rows (T·B, or Σ batch_sizes when packed), I inputs, H hidden units,
P outputs (proj_size, or H), D directions. Gates stand in the order i, f, g, o.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

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

_SHAPES = {  # those of the peepholes are theirs to choose
    "weight_ih": "(4H, I)",
    "weight_hh": "(4H, P)",
    "bias_ih": "(4H,)",
    "bias_hh": "(4H,)",
    "weight_hr": "(P, H)",
}


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
    flat = [t for w in weights for t in w]
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


def check_recompute(recompute: object, return_cells: bool) -> None:
    if type(recompute) is not int or recompute < 1:
        raise ValueError(f"recompute must be a positive int or None, got {recompute!r}")
    if return_cells:
        raise ValueError("recompute saves nothing when return_cells=True keeps every c_t")


def check_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[LSTMWeights],
) -> None:
    """Refuse what is no layer. batch_sizes are looked at in kernels."""
    of_x, of_h, of_c, n_directions = x.shape, h0.shape, c0.shape, len(weights)
    if n_directions not in (1, 2):
        raise ValueError(f"lstm: weights must be of 1 or 2 directions, got {n_directions}")
    if not len(of_h) == len(of_c) == 3 or not of_h[0] == of_c[0] == n_directions:
        raise ValueError(
            f"lstm: h0 and c0 must be (D, B, ·) with D = {n_directions}, as many as there are "
            f"weights, got {tuple(of_h)} and {tuple(of_c)}"
        )
    B = of_c[1]
    if len(of_x) == 3 and batch_sizes is None:
        fits = of_x[1] == B
    else:
        fits = len(of_x) == 2 and (batch_sizes is not None or (B > 0 and of_x[0] % B == 0))
    if not fits or of_h[1] != B:
        raise ValueError(
            "lstm: x must be (T, B, I), or (N, I) rows of B sequences, h0 and c0 (D, B, ·), got "
            f"{tuple(of_x)}, {tuple(of_h)} and {tuple(of_c)}"
        )
    check_arguments((of_x[-1], of_h[-1], of_c[-1]), x, h0, c0, weights)


def check_arguments(
    sizes: tuple[int, int, int], x: Tensor, h0: Tensor, c0: Tensor, weights: Sequence[LSTMWeights]
) -> None:
    """Refuse what does not fit together, given I, P and H."""
    (I, P, H), dtype, device = sizes, x.dtype, x.device
    for state in (h0, c0):
        if state.dtype is not dtype or state.device != device:
            _refuse(x, state, "hidden")
    gates = (4 * H,)
    for w in weights:
        ih, hh, b_ih, b_hh, hr, ci, cf, co = w
        if (  # spelled out: in a loop it would be 3 % of a small cell's step
            not hr is ci is cf is co is None
            or P != H
            or ih.shape != (*gates, I)
            or hh.shape != (*gates, P)
            or (b_ih is not None and b_ih.shape != gates)
            or (b_hh is not None and b_hh.shape != gates)
        ):
            _check_shapes(w, I, P, H)
        for t in w:
            if t is not None and (t.dtype is not dtype or t.device != device):
                _refuse(x, t, "parameter")


def _check_shapes(w: LSTMWeights, I: int, P: int, H: int) -> None:
    full = w.weight_ci is not None and w.weight_ci.dim() == 2
    peephole = (H, H) if full else (H,)
    shapes = (4 * H, I), (4 * H, P), (4 * H,), (4 * H,), (P, H), peephole, peephole, peephole
    for name, t, shape in zip(w._fields, w, shapes, strict=True):
        if t is not None and t.shape != shape:
            symbol = _SHAPES.get(name, "(H, H)" if full else "(H,)")
            raise ValueError(f"lstm: {name} must be {symbol} = {shape}, got {tuple(t.shape)}")
    if w.weight_hr is None and P != H:
        raise ValueError(f"lstm: without weight_hr, h0 must be as wide as c0, {H}, got {P}")


def _refuse(x: Tensor, other: Tensor, kind: str) -> NoReturn:
    if other.device != x.device:
        raise RuntimeError(
            f"Input and {kind} tensors are not at the same device, "
            f"found input tensor at {x.device} and {kind} tensor at {other.device}"
        )
    raise RuntimeError(
        f"Input and {kind} tensors are not the same dtype, "
        f"found input tensor with {x.dtype} and {kind} tensor with {other.dtype}"
    )
