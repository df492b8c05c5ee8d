"""The LSTM's gradient in little memory: run the forward pass again, a segment at a time.

Only c at the start of every segment is kept; h is in y. The backward pass goes through the segments
in reverse, computes the gates and cells of one again and forgets them. Where one call of the kernel
makes a gradient, one makes it here, too (kernels/cpu_gradients.py), bit for bit what it would have
been. Elsewhere lstm_segments.py goes op by op, and gradients are the same but for rounding: a
segment is computed on the threads that suit it, and from states that half precision has rounded.

Both passes are ops, torch_manual::lstm_recompute and ::lstm_recompute_gradients, which graphs hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from torch_manual.functions._autocast import autocast_off
from torch_manual.functions._function import one_node
from torch_manual.functions.lstm_compiled import empty_gradients
from torch_manual.functions.lstm_gradients import Primal, check_saved
from torch_manual.functions.lstm_segments import (
    forward_by_segments,
    gradients_by_segments,
    most_segments,
)
from torch_manual.kernels import cpu_gradients
from torch_manual.kernels.lstm import dispatched
from torch_manual.kernels.rows import n_steps

MOST_STEPS = 1 << 31  # between which anything is kept: more than a sequence has


@one_node
def lstm_recompute(*args: Any) -> tuple[Tensor, ...]:
    """x, h0, c0, batch_sizes, steps and weights → y, h_n, c_n."""
    return LSTMRecomputeFunction.apply(*args)[:3]


class LSTMRecomputeFunction(torch.autograd.Function):
    """(x, h0, c0, batch_sizes, steps, weights) → (y, h_n, c_n, c where segments start)."""

    @staticmethod
    def forward(
        x: Tensor,
        h0: Tensor,
        c0: Tensor,
        batch_sizes: Tensor | None,
        steps: int,
        *weights: Tensor | None,
    ) -> tuple[Tensor, ...]:
        run: Any = _forward
        if dispatched(x, h0, c0, weights=weights):
            run = torch.ops.torch_manual.lstm_recompute.default
        by_kernel = cpu_gradients.does(x, weights)
        return tuple(run(x, h0, c0, batch_sizes, weights, steps, by_kernel))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        *given, ctx.steps = inputs[:5]
        y, _, _, c_starts = output
        ctx.by_kernel = cpu_gradients.does(inputs[0], inputs[5:])
        ctx.mark_non_differentiable(c_starts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given, y, c_starts, *inputs[5:])

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = (*ctx.needs_input_grad[:3], *ctx.needs_input_grad[5:])
        dx, dh0, dc0, *dweights = LSTMRecomputeGradientFunction.apply(
            needs, ctx.steps, ctx.by_kernel, *outer[:3], *ctx.saved_tensors
        )
        return dx, dh0, dc0, None, None, *dweights

    @staticmethod
    def jvp(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError("lstm: with recompute there is no forward mode")

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple:
        raise RuntimeError("lstm: with recompute there is no vmap")


class LSTMRecomputeGradientFunction(torch.autograd.Function):
    """The backward pass as a node of the graph, so that differentiating it again is refused."""

    @staticmethod
    def forward(
        needs: tuple[bool, ...], steps: int, by_kernel: bool, *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if any(t is not None and is_legacy_batchedtensor(t) for t in tensors[:3]):
            raise RuntimeError("lstm: with recompute gradients cannot be batched")
        run: Any = _gradients
        if dispatched(*tensors[:9], weights=tensors[9:]):
            run = torch.ops.torch_manual.lstm_recompute_gradients.default
        given = iter(run(needs, *tensors[:9], tensors[9:], steps, by_kernel))
        return tuple(next(given) if need else None for need in needs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError("lstm: with recompute there are no second-order gradients")


def _forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor | None],
    steps: int,
    by_kernel: bool,
) -> tuple[Tensor, ...]:
    given = x, h0, c0, batch_sizes, weights, steps
    with autocast_off(x):
        return cpu_gradients.lstm_forward(*given) if by_kernel else forward_by_segments(*given)


def _fake_forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor | None],
    steps: int,
    by_kernel: bool,
) -> tuple[Tensor, ...]:
    (_, B, H), N = c0.shape, x.shape[0]
    T = n_steps(N, B, batch_sizes)
    if by_kernel:
        n = cpu_gradients.most_segments(T, B, H, x.element_size(), steps)
    else:
        n = most_segments(N, T, steps)
    shapes = (x.shape[0], h0.shape[0] * h0.shape[2]), h0.shape, c0.shape, (n, *c0.shape)
    return tuple(x.new_empty(shape) for shape in shapes)


def _gradients(
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
    by_kernel: bool,
) -> list[Tensor]:
    """Those that are needed."""
    primal = Primal.of((x, h0, c0, batch_sizes, y, None, None, *weights))
    check_saved((dy, dh_n, dc_n, c_starts), primal)
    with autocast_off(x):
        if by_kernel:
            dx, dh0, dc0, _, _, *dweights = cpu_gradients.lstm_gradients(
                *(needs, (dy, dh_n, dc_n, None), x, h0, c0, batch_sizes, y, None, None, weights),
                recompute=steps,
                c_kept=c_starts,
            )
        else:
            dx, dh0, dc0, *dweights = gradients_by_segments(
                needs, dy, dh_n, dc_n, x, h0, c0, batch_sizes, y, c_starts, weights, steps
            )
    return [t for t in (dx, dh0, dc0, *dweights) if t is not None]


def _fake_gradients(
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
    by_kernel: bool,
) -> list[Tensor]:
    return empty_gradients(needs, (x, h0, c0, *weights))


for _name, _schema, _plain, _fake in (
    (
        "torch_manual::lstm_recompute",
        "(Tensor x, Tensor h0, Tensor c0, Tensor? batch_sizes, Tensor?[] weights, int steps,"
        " bool by_kernel) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor c_starts)",
        _forward,
        _fake_forward,
    ),
    (
        "torch_manual::lstm_recompute_gradients",
        "(bool[] needs, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor h0, Tensor c0,"
        " Tensor? batch_sizes, Tensor y, Tensor c_starts, Tensor?[] weights, int steps,"
        " bool by_kernel) -> Tensor[]",
        _gradients,
        _fake_gradients,
    ),
):
    torch.library.define(_name, _schema)
    torch.library.impl(_name, "default", _plain)
    torch.library.register_fake(_name, _fake)
