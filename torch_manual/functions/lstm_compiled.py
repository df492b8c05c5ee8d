"""The LSTM's backward pass as one op, `torch_manual::lstm_gradients`: what compiled graphs call.

A compiled graph looks at nothing between the recurrence and its sums, and traced one by one they
would cost more than eager code, where one call of the kernel does both (cpu_gradients.py). The op
runs that eager code, so that gradients are the same to the bit and one graph serves all lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_manual.functions.lstm_gradients import Primal, Tensors, lstm_gradients


def lstm_gradients_op(
    needs: Sequence[bool], outer: Tensors, p: Primal
) -> tuple[Tensor | None, ...]:
    """`lstm_gradients` without dpre and dh."""
    given = iter(torch.ops.torch_manual.lstm_gradients.default(needs, *outer, *p))
    dx, dh0, dc0, *dweights = (next(given) if need else None for need in needs)
    return dx, dh0, dc0, None, None, *dweights


def _gradients(
    needs: Sequence[bool],
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    *primal: Any,
) -> list[Tensor]:
    outer = dy, dh_n, dc_n, dcells
    gradients = lstm_gradients(needs, outer, Primal(*primal), keep_dpre=False)
    dx, dh0, dc0, _, _, *dweights = gradients
    return [t for t in (dx, dh0, dc0, *dweights) if t is not None]


def _fake(
    needs: Sequence[bool],
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    *primal: Any,
) -> list[Tensor]:
    p = Primal(*primal)
    return empty_gradients(needs, (p.x, p.h0, p.c0, *p.weights))


def empty_gradients(needs: Sequence[bool], inputs: Tensors) -> list[Tensor]:
    """In place of the gradients of the inputs that need one."""
    given = zip(inputs, needs, strict=True)
    return [t.new_empty(t.shape) for t, need in given if need and t is not None]


torch.library.define(
    "torch_manual::lstm_gradients",
    "(bool[] needs, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, Tensor x, Tensor h0,"
    " Tensor c0, Tensor? batch_sizes, Tensor y, Tensor gates, Tensor cells, Tensor?[] weights)"
    " -> Tensor[]",
)
torch.library.impl("torch_manual::lstm_gradients", "default", _gradients)
torch.library.register_fake("torch_manual::lstm_gradients", _fake)
