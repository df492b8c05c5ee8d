"""`torch_manual::lstm_layer`, what exported graphs hold of a layer.

The op of a compiled graph's forward pass, torch_manual::lstm_forward, has no gradient: there the
graph of the backward pass stands beside it. This one has, knows torch.func's transforms and
autocast, and checks its arguments, which may be others than those it was exported with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_manual.functions._autocast import autocast_cast, autocast_off
from torch_manual.functions.lstm import LSTMFunction, needs_graph, of_autocast
from torch_manual.functions.lstm_arguments import check_layer
from torch_manual.kernels.lstm import by_direction, lstm_forward


def _layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor | None],
    return_cells: bool,
) -> tuple[Tensor, ...]:
    check_layer(x, h0, c0, batch_sizes, by_direction(weights))
    with autocast_off(x):
        y, h_n, c_n, _, cells = lstm_forward(x, h0, c0, batch_sizes, weights, return_cells)
    return y, h_n, c_n, cells


def _with_gradients(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor | None],
    return_cells: bool,
) -> tuple[Tensor, ...]:
    if not needs_graph(x, h0, c0, *weights):
        with torch._C._AutoDispatchBelowAutograd():
            op = torch.ops.torch_manual.lstm_layer.default
            return op(x, h0, c0, batch_sizes, weights, return_cells)
    check_layer(x, h0, c0, batch_sizes, by_direction(weights))
    y, h_n, c_n, cells, _ = LSTMFunction.apply(x, h0, c0, batch_sizes, *weights)
    return y, h_n, c_n, cells if return_cells else x.new_empty(0)


def _under_autocast(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor | None],
    return_cells: bool,
) -> tuple[Tensor, ...]:
    projected = by_direction(weights)[0].weight_hr is not None
    x, h0, c0, *weights = of_autocast(batch_sizes, projected)(x, h0, c0, *weights)
    with autocast_off(x):
        op = torch.ops.torch_manual.lstm_layer.default
        y, h_n, c_n, cells = op(x, h0, c0, batch_sizes, weights, return_cells)
    if projected:
        y, h_n = autocast_cast(y, h_n)
    return y, h_n, c_n, cells


torch.library.define(
    "torch_manual::lstm_layer",
    "(Tensor x, Tensor h0, Tensor c0, Tensor? batch_sizes, Tensor?[] weights, bool return_cells)"
    " -> (Tensor y, Tensor h_n, Tensor c_n, Tensor cells)",
)
torch.library.impl("torch_manual::lstm_layer", "default", _layer)
for _key in ("Autograd", "FuncTorchDynamicLayerFrontMode"):  # our Function knows the transforms
    torch.library.impl("torch_manual::lstm_layer", _key, _with_gradients)
for _key in ("AutocastCPU", "AutocastCUDA"):
    torch.library.impl("torch_manual::lstm_layer", _key, _under_autocast)
