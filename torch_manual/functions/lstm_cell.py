"""One step of the LSTM, alone or in a loop over time (equations: docs/derivations/lstm.md).

The steps of a loop have the same weights, whose gradients are sums over the steps, B11 to B15. Were
each step to return its term, autograd would add up as many matrices as there are steps. So a step
after the first sends its gradient through `LoopSumsFunction`, a node of the loop: there it leaves
the factors of its term, and when all steps have, their products are taken at once, as a layer does.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_manual.functions._autocast import autocast_factors, autocast_off
from torch_manual.functions._function import PositionalFunction, in_compiled_autograd
from torch_manual.functions.lstm import (
    any_requires_grad,
    gradients_of,
    lstm_layer,
    transforms_are_active,
)
from torch_manual.functions.lstm_arguments import check_arguments
from torch_manual.functions.lstm_gradients import (
    NOTHING,
    Factors,
    Primal,
    add_each,
    check_saved,
    joined,
    sums_of,
)
from torch_manual.kernels import cpu_gradients
from torch_manual.kernels.lstm import LSTMWeights, by_direction, lstm_step

_BLOCK_ROWS = 1024  # of which a loop keeps the factors, before it takes their products
_WORTH = 1 << 16  # numbers of a term: below, adding them up costs less
_NEAR = 3  # nodes to go back for the step before: past a mask, a dropout or two views


def lstm_cell(x: Tensor, hx: tuple[Tensor, Tensor], weights: LSTMWeights) -> tuple[Tensor, Tensor]:
    """Run one LSTM step: `lstm_layer` with T = 1 and one direction.

    Args:
        x: (B, I).
        hx: h_{t-1} and c_{t-1}, (B, H) each.
        weights: the cell's parameters.

    Returns:
        h_t and c_t, (B, H) each.

    Saved for backward: x, h_{t-1}, c_{t-1}, weights, the gates (1, B, 4H) and c_t (1, B, H).

    Raises:
        ValueError: a shape does not fit; the message names it.
        RuntimeError: tensors of different devices or dtypes.
        TypeError: complex tensors.
    """
    h, c = hx
    of_x, of_h, of_c = x.shape, h.shape, c.shape
    if not len(of_x) == len(of_h) == len(of_c) == 2 or not of_x[0] == of_h[0] == of_c[0]:
        raise ValueError(
            "lstm: x must be (B, I), h and c (B, ·), got "
            f"{tuple(of_x)}, {tuple(of_h)} and {tuple(of_c)}"
        )
    cast = torch._C._is_any_autocast_enabled()
    if cast or torch.compiler.is_compiling() or transforms_are_active():
        if cast:
            x, h, c, *cast_weights = autocast_factors(x, h, c, *weights)
            weights = LSTMWeights(*cast_weights)
        with autocast_off(x):
            h, _, c_n = lstm_layer(x, h.unsqueeze(0), c.unsqueeze(0), [weights])
        return h, c_n.squeeze(0)
    check_arguments((of_x[1], of_h[1], of_c[1]), x, h, c, [weights])
    if torch.is_grad_enabled() and any_requires_grad(x, h, c, *weights):
        return LSTMCellFunction.apply(x, h, c, _of_loop(x, h, c, weights), *weights)
    h, c = lstm_step(x, h, c, weights, save=False)
    return h, c


class LSTMCellFunction(PositionalFunction):
    """(x, h, c, of_loop, weights) → (h', c'): one step, without transforms.

    `LSTMFunction` would do, but for the time that the views around it and their nodes take.
    `of_loop` is what `LoopSumsFunction` returns, or None in a loop's first step.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor, c: Tensor, of_loop: Tensor | None, *weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        h_n, c_n, gates, cells = lstm_step(x, h, c, weights, save=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h, c, gates, cells, *weights)
        ctx.of_loop = of_loop
        ctx.weights = weights
        return h_n, c_n

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, dc: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3] + ctx.needs_input_grad[4:]
        if dh is None and dc is None:
            return (None,) * (len(needs) + 1)
        x, h, c, gates, cells, *weights = ctx.saved_tensors
        y = h  # of its shape: no step comes after that would look at y
        if not _are_as_kept(dh, dc, x, h, c, gates, cells, weights):
            check_saved((dh, dc), Primal(x, h, c, None, y, gates, cells, weights))
        others = dh, dc, h, c, gates, cells
        alone = not torch.is_grad_enabled() and not transforms_are_active()
        if alone and cpu_gradients.serves(x, weights, *others):
            sums = _sums_of_loop(ctx.of_loop, needs[3:])
            if sums is not None:
                needs = (*needs[:3], *(False,) * len(weights))
            dx, dh0, dc0, dpre, _, *dweights = cpu_gradients.lstm_gradients(
                needs,
                (dh, None, dc, None),
                *(x, h, c, None, y, gates, cells, weights),
                keep_dpre=sums is not None,
            )
            if sums is not None:
                assert dpre is not None
                sums.add(dpre[0], x, h, c, cells[0])
            return dx, dh0, dc0, _zeros(ctx.of_loop), *dweights
        saved = x, h.unsqueeze(0), c.unsqueeze(0), None, y, gates, cells, *weights
        outer = dh, None, None if dc is None else dc.unsqueeze(0), None
        dx, dh0, dc0, *dweights = gradients_of(needs, outer, saved)
        dh0, dc0 = (None if t is None else t.squeeze(0) for t in (dh0, dc0))
        return dx, dh0, dc0, _zeros(ctx.of_loop), *dweights


def _are_as_kept(
    dh: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    h: Tensor,
    c: Tensor,
    gates: Tensor,
    cells: Tensor,
    weights: Sequence[Any],
) -> bool:
    """What `check_saved` looks at, at a glance: it would be 4 % of a small cell's training."""
    (B, I), H, dtype = x.shape, h.shape[1], x.dtype
    ih, hh, _, _, _, ci, cf, co = weights
    return (
        ih.shape == (4 * H, I)
        and hh.shape == (4 * H, H)
        and h.shape == c.shape == (B, H)
        and gates.shape == (1, B, 4 * H)
        and cells.shape == (1, B, H)
        and ih.dtype is hh.dtype is h.dtype is c.dtype is gates.dtype is cells.dtype is dtype
        and ci is cf is co is None
        and ih.is_cpu
        and hh.is_cpu
        and (dh is None or dh.dtype is dtype)
        and (dc is None or dc.dtype is dtype)
    )


_StepNode: Any = LSTMCellFunction._backward_cls


class LoopSumsFunction(torch.autograd.Function):
    """weights → an empty tensor, for the steps of a loop in place of the weights.

    Its backward comes after that of all these steps, and returns the sums of their terms.
    """

    @staticmethod
    def forward(ctx: Any, *weights: Tensor | None) -> Tensor:
        (ctx.weights,) = by_direction(weights)
        ctx.sums = {}  # of each backward pass: there may be several, even side by side
        return ctx.weights.weight_ih.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        if in_compiled_autograd():
            return tuple(map(_zeros, ctx.weights))
        sums = ctx.sums.pop(torch._C._current_graph_task_id(), None)
        return NOTHING if sums is None else sums.total()


class _LoopSums:
    """The sums over the steps of a loop in one backward pass."""

    def __init__(self, weights: LSTMWeights, needs: Sequence[bool]) -> None:
        self.weights = weights
        (self.needs,) = by_direction(needs)
        self._total = NOTHING
        self._terms: list[tuple[Tensor, Factors]] = []

    def add(self, dpre: Tensor, x: Tensor, h_prev: Tensor, c_prev: Tensor, c: Tensor) -> None:
        """Add a step's term, of dpre (B, 4H)."""
        need = self.needs
        factors = Factors(
            x if need.weight_ih else None,
            h_prev if need.weight_hh else None,
            None,
            c_prev if need.weight_ci or need.weight_cf else None,
            c if need.weight_co else None,
        )
        self._terms.append((dpre, factors))
        if len(self._terms) * dpre.shape[0] >= _BLOCK_ROWS:
            self.total()

    def total(self) -> LSTMWeights:
        """Return the sums of all terms so far."""
        if self._terms:
            dpre = joined([dpre for dpre, _ in self._terms])
            each = zip(*(factors for _, factors in self._terms), strict=True)
            factors = Factors(*(None if ts[0] is None else joined(ts) for ts in each))
            self._terms.clear()
            no_dh = dpre.new_empty(0)  # of a projection, which cells have not
            sums = sums_of(self.needs, dpre, no_dh, factors, self.weights)
            self._total = add_each(self._total, sums)
        return self._total


def _of_loop(x: Tensor, h: Tensor, c: Tensor, weights: LSTMWeights) -> Tensor | None:
    """What stands for the weights in a loop, made in its second step; None in the first.

    A step finds the one before where c or h came from, so that nothing outlives the graph.
    """
    n_term = weights.weight_ih.numel() + weights.weight_hh.numel()
    n_factors = x.numel() + 5 * h.numel()
    if n_term < _WORTH + 8 * n_factors or not x.is_cpu:
        return None
    before = _step_before(c, weights) or _step_before(h, weights)
    if before is None:
        return None
    return LoopSumsFunction.apply(*weights) if before.of_loop is None else before.of_loop


def _step_before(state: Tensor, weights: LSTMWeights) -> Any:
    """The node of the step with these weights that made `state`, or None."""
    node: Any = state.grad_fn
    for _ in range(_NEAR):
        if node is None or type(node) is _StepNode:
            break
        node = next((n for n, _ in node.next_functions if n is not None), None)
    if type(node) is not _StepNode or not all(map(operator.is_, node.weights, weights)):
        return None
    return node


def _zeros(like: Tensor | None) -> Tensor | None:
    """None, but in compiled autograd, which adds up gradients whether or not they are None."""
    if like is None or not in_compiled_autograd():
        return None
    return torch.zeros_like(like)


def _sums_of_loop(of_loop: Tensor | None, needs: Sequence[bool]) -> _LoopSums | None:
    """Where a step leaves its term, or None if it is to return it."""
    task = torch._C._current_graph_task_id()
    node: Any = None if of_loop is None else of_loop.grad_fn
    if node is None or task == -1 or in_compiled_autograd():
        return None
    if not torch._C._will_engine_execute_node(node):
        return None
    if task not in node.sums:
        node.sums[task] = _LoopSums(node.weights, node.needs_input_grad)
    return node.sums[task] if node.needs_input_grad == needs else None
