"""The LSTM's gradient in little memory: run the forward pass again, a segment at a time.

Only h and c at the start of every segment are kept. The backward pass goes through the segments in
reverse, computes the gates and cells of one again and forgets them. Where one call of the kernel
makes a gradient, one makes it here, too (kernels/cpu_gradients.py), bit for bit what it would have
been. Elsewhere this file goes op by op, and takes the sums over time over the blocks of
lstm_gradients.py. Then gradients are the same but for rounding: a segment is computed on the
threads that suit it, and from states that half precision has rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from torch_manual.functions._autocast import autocast_off
from torch_manual.functions.lstm_gradients import (
    NOTHING,
    Primal,
    add_each,
    blocks,
    dx_of,
    factors_of,
    sums_of,
)
from torch_manual.kernels import cpu_gradients
from torch_manual.kernels.lstm import LSTMWeights, by_direction, lstm_backward, lstm_forward
from torch_manual.kernels.rows import Run, runs

MIN_STEPS, MIN_ROWS = 2, 64  # the kernels take fewer in another way, which rounds differently

Plan = list[list[tuple[int, Run]]]


class LSTMRecomputeFunction(torch.autograd.Function):
    """(x, h0, c0, batch_sizes, steps, weights) → (y, h_n, c_n, c and h where segments start).

    Where cpu_gradients.py serves, the kernel does all of it and takes h from y.
    """

    @staticmethod
    def forward(
        x: Tensor,
        h0: Tensor,
        c0: Tensor,
        batch_sizes: Tensor | None,
        steps: int,
        *weights: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        if cpu_gradients.serves(x, weights, h0, c0):
            with autocast_off(x):
                return *cpu_gradients.lstm_forward(x, h0, c0, batch_sizes, weights, steps), None
        segments = [s for block in _plan(x, h0, batch_sizes, steps) for s in block]
        P = h0.shape[2]
        y = x.new_empty(x.shape[0], h0.shape[0] * P)
        h, c = h0.clone(), c0.clone()
        h_starts, c_starts = (t.new_empty(len(segments), *t.shape) for t in (h, c))
        with autocast_off(x):
            for d, w in enumerate(by_direction(weights)):
                for k, segment in reversed(segments) if d else segments:
                    h_starts[k, d], c_starts[k, d] = h[d], c[d]
                    given = _inputs(x, h[d], c[d], batch_sizes, segment)
                    alive = slice(given[1].shape[1])
                    y_s, h_s, c_s, _, _ = lstm_forward(*given, w, False, d == 1)
                    y[segment.rows, d * P : (d + 1) * P] = y_s
                    h[d, alive], c[d, alive] = h_s[0], c_s[0]
        return y, h, c, c_starts, h_starts

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor | None, ...]) -> None:
        *given, ctx.steps = inputs[:5]
        y, _, _, *starts = output
        ctx.mark_non_differentiable(*(t for t in starts if t is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given, y, *starts, *inputs[5:])

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = (*ctx.needs_input_grad[:3], *ctx.needs_input_grad[5:])
        dx, dh0, dc0, *dweights = LSTMRecomputeGradientFunction.apply(
            needs, ctx.steps, *outer[:3], *ctx.saved_tensors
        )
        return dx, dh0, dc0, None, None, *dweights


class LSTMRecomputeGradientFunction(torch.autograd.Function):
    """The backward pass as a node of the graph, so that differentiating it again is refused."""

    @staticmethod
    def forward(
        needs: tuple[bool, ...],
        steps: int,
        dy: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        x: Tensor,
        h0: Tensor,
        c0: Tensor,
        batch_sizes: Tensor | None,
        y: Tensor,
        c_starts: Tensor,
        h_starts: Tensor | None,
        *weights: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        if any(t is not None and is_legacy_batchedtensor(t) for t in (dy, dh_n, dc_n)):
            raise RuntimeError("lstm: with recompute gradients cannot be batched")
        if h_starts is None:
            outer, primal = (dy, dh_n, dc_n, None), (x, h0, c0, batch_sizes, y, None, None, weights)
            with autocast_off(x):
                dx, dh0, dc0, _, _, *dweights = cpu_gradients.lstm_gradients(
                    needs, outer, *primal, recompute=steps, c_kept=c_starts
                )
            return dx, dh0, dc0, *dweights
        P = h_starts.shape[3]
        dx = torch.empty_like(x) if needs[0] else None
        dh = torch.zeros_like(h_starts[0]) if dh_n is None else dh_n.clone()
        dc = torch.zeros_like(c_starts[0]) if dc_n is None else dc_n.clone()
        dweights = []
        with autocast_off(x):
            for d, need in enumerate(by_direction(needs[3:])):
                columns = slice(d * P, (d + 1) * P)
                dweights += _backward_direction(
                    need,
                    None if dy is None else dy[:, columns],
                    dh[d],
                    dc[d],
                    dx,
                    x,
                    y[:, columns],
                    batch_sizes,
                    h_starts[:, d],
                    c_starts[:, d],
                    by_direction(weights)[d],
                    steps,
                    reverse=d == 1,
                )
        return dx, dh if needs[1] else None, dc if needs[2] else None, *dweights

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError("lstm: with recompute there are no second-order gradients")


def _backward_direction(
    need: LSTMWeights,
    dy: Tensor | None,
    dh: Tensor,
    dc: Tensor,
    dx: Tensor | None,
    x: Tensor,
    y: Tensor,
    batch_sizes: Tensor | None,
    h_starts: Tensor,
    c_starts: Tensor,
    w: LSTMWeights,
    steps: int,
    reverse: bool,
) -> LSTMWeights:
    """Return the weights' gradients; turn dh, dc into dh0, dc0, all in place, and set dx.

    In reverse, as the second of two directions, add to dx.
    """
    total = NOTHING
    plan = _plan(x, h_starts, batch_sizes, steps)
    joined = any(need[4:])  # whether a sum takes more than dpre, x and h
    for block in plan if reverse else reversed(plan):
        whole = _span(block)
        dpre = x.new_empty(1, whole.rows.stop - whole.rows.start, 4 * c_starts.shape[-1])
        pieces: list[tuple[Tensor, ...]] = []
        for k, segment in block if reverse else reversed(block):
            given = _inputs(x, h_starts[k], c_starts[k], batch_sizes, segment)
            _, _, _, gates, cells = lstm_forward(*given, w, True, reverse)
            alive = slice(given[1].shape[1])
            dpre_s, dh_rows, dh_s, dc_s = lstm_backward(
                None if dy is None else dy[segment.rows],
                dh[None, alive],
                dc[None, alive],
                None,
                *given[2:],
                w,
                gates,
                cells,
                reverse,
            )
            dh[alive], dc[alive] = dh_s[0], dc_s[0]
            start = whole.rows.start
            dpre[:, segment.rows.start - start : segment.rows.stop - start] = dpre_s
            if joined:
                pieces.append((dh_rows, gates, cells))
        if joined:
            in_time = pieces if reverse else pieces[::-1]
            dh_rows, gates, cells = (torch.cat(t, 1) for t in zip(*in_time, strict=True))
        entry = block[-1 if reverse else 0][0]
        given = _inputs(x, h_starts[entry], c_starts[entry], batch_sizes, whole)
        p = Primal(*given, y[whole.rows], gates, cells, w)
        total = add_each(
            total, sums_of(need, dpre[0], dh_rows[0], factors_of(need, p, 0, reverse), w)
        )
        if dx is not None and reverse:
            dx[whole.rows] += dx_of(dpre, w)
        elif dx is not None:
            dx[whole.rows] = dx_of(dpre, w)
    return total


def _plan(x: Tensor, states: Tensor, batch_sizes: Tensor | None, steps: int) -> Plan:
    """The blocks of lstm_gradients, each as its numbered segments of `steps` steps or more."""
    N, B = x.shape[0], states.shape[-2]
    sizes = [B] * (N // B) if batch_sizes is None else batch_sizes.tolist()
    plan: Plan = []
    k = 0
    for block in blocks(N, B, batch_sizes):
        segments = runs(block, sizes[block.steps], max(steps, MIN_STEPS), MIN_ROWS)
        plan.append(list(enumerate(segments, k)))
        k += len(segments)
    return plan


def _span(block: list[tuple[int, Run]]) -> Run:
    (_, first), (_, last) = block[0], block[-1]
    return Run(slice(first.steps.start, last.steps.stop), slice(first.rows.start, last.rows.stop))


def _inputs(
    x: Tensor, h: Tensor, c: Tensor, batch_sizes: Tensor | None, run: Run
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x, h0, c0 and batch_sizes of a run of one direction, for the sequences alive in it."""
    if batch_sizes is None:
        return x[run.rows], h[None], c[None], None
    sizes = batch_sizes[run.steps]
    alive = int(sizes[0])
    return x[run.rows], h[None, :alive], c[None, :alive], sizes
