"""A layer's two passes op by op, segment by segment, keeping only c where a segment starts.

What lstm_recompute.py does where no single call of the kernel does it. Sums over time are taken
over the blocks of lstm_gradients.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_manual.functions.lstm_gradients import (
    NOTHING,
    Primal,
    add_each,
    blocks,
    dx_of,
    factors_of,
    most_blocks,
    sums_of,
)
from torch_manual.kernels.lstm import LSTMWeights, by_direction, lstm_backward, lstm_forward
from torch_manual.kernels.rows import Run, n_steps, runs

MIN_STEPS, MIN_ROWS = 2, 64  # the kernels take fewer in another way, which rounds differently

Plan = list[list[tuple[int, Run]]]


def forward_by_segments(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor | None],
    steps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, h_n, c_n and c where segments of at least so many steps start."""
    segments = [s for block in _plan(x, h0, batch_sizes, steps) for s in block]
    (_, B, P), N = h0.shape, x.shape[0]
    y = x.new_empty(N, h0.shape[0] * P)
    h, c = _copy(h0), _copy(c0)
    c_starts = c.new_empty(most_segments(N, n_steps(N, B, batch_sizes), steps), *c.shape)
    for d, w in enumerate(by_direction(weights)):
        for k, segment in reversed(segments) if d else segments:
            c_starts[k, d] = c[d]
            given = _inputs(x, h[d], c[d], batch_sizes, segment)
            alive = slice(given[1].shape[1])
            y_s, h_s, c_s, _, _ = lstm_forward(*given, w, False, d == 1)
            y[segment.rows, d * P : (d + 1) * P] = y_s
            h[d, alive], c[d, alive] = h_s[0], c_s[0]
    return y, h, c, c_starts


def gradients_by_segments(
    needs: Sequence[bool],
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    y: Tensor,
    c_starts: Tensor,
    weights: Sequence[Tensor | None],
    steps: int,
) -> tuple[Tensor | None, ...]:
    """Return dx, dh0, dc0 and the weights' gradients; what is not needed is None."""
    P = h0.shape[2]
    dx = x.new_empty(x.shape) if needs[0] else None
    dh = h0.new_zeros(h0.shape) if dh_n is None else _copy(dh_n)
    dc = c0.new_zeros(c0.shape) if dc_n is None else _copy(dc_n)
    dweights: list[Tensor | None] = []
    for d, need in enumerate(by_direction(needs[3:])):
        columns = slice(d * P, (d + 1) * P)
        dweights += _backward_direction(
            need,
            None if dy is None else dy[:, columns],
            dh[d],
            dc[d],
            dx,
            x,
            h0[d],
            y[:, columns],
            batch_sizes,
            c_starts[:, d],
            by_direction(weights)[d],
            steps,
            reverse=d == 1,
        )
    return dx, dh if needs[1] else None, dc if needs[2] else None, *dweights


def most_segments(n_rows: int, T: int, steps: int) -> int:
    """How many segments there are at most; each has so many steps, or is a block."""
    return T // max(steps, MIN_STEPS) + most_blocks(n_rows)


def _backward_direction(
    need: LSTMWeights,
    dy: Tensor | None,
    dh: Tensor,
    dc: Tensor,
    dx: Tensor | None,
    x: Tensor,
    h0: Tensor,
    y: Tensor,
    batch_sizes: Tensor | None,
    c_starts: Tensor,
    w: LSTMWeights,
    steps: int,
    reverse: bool,
) -> LSTMWeights:
    """Return the weights' gradients; turn dh, dc into dh0, dc0, all in place, and set dx.

    In reverse, as the second of two directions, add to dx.
    """
    total = NOTHING
    plan = _plan(x, h0, batch_sizes, steps)
    joined = any(need[4:])  # whether a sum takes more than dpre, x and h
    for block in plan if reverse else reversed(plan):
        whole = _span(block)
        dpre = x.new_empty(1, whole.rows.stop - whole.rows.start, 4 * c_starts.shape[-1])
        pieces: list[tuple[Tensor, ...]] = []
        for k, segment in block if reverse else reversed(block):
            h = _state_before(segment, y, h0, batch_sizes, reverse)
            given = _inputs(x, h, c_starts[k], batch_sizes, segment)
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
        h = _state_before(whole, y, h0, batch_sizes, reverse)
        given = _inputs(x, h, c_starts[entry], batch_sizes, whole)
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
    sizes = [B] * n_steps(N, B, None) if batch_sizes is None else batch_sizes.tolist()
    plan: Plan = []
    k = 0
    for block in blocks(N, B, batch_sizes):
        segments = runs(block, sizes[block.steps], max(steps, MIN_STEPS), MIN_ROWS)
        plan.append(list(enumerate(segments, k)))
        k += len(segments)
    return plan


def _state_before(
    run: Run, y: Tensor, h0: Tensor, batch_sizes: Tensor | None, reverse: bool
) -> Tensor:
    """h (B, P) or of those alive in `run`, before it in the order of the recurrence."""
    first, end = run.steps.start, run.steps.stop
    if not reverse:
        if first == 0:
            return h0
        before = len(h0) if batch_sizes is None else int(batch_sizes[first - 1])
        return y[run.rows.start - before : run.rows.start]
    going_on = 0
    if run.rows.stop < len(y):
        going_on = len(h0) if batch_sizes is None else int(batch_sizes[end])
    return torch.cat([y[run.rows.stop : run.rows.stop + going_on], h0[going_on:]])


def _copy(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


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
