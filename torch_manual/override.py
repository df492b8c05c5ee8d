"""Serve PyTorch's own LSTM ops with our kernels, whoever calls them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from torch_manual.functions.lstm import LSTMWeights, lstm_layer
from torch_manual.functions.lstm_cell import lstm_cell

_in_force: list[Library] = []  # a Library that nobody holds gives its ops back


class override:
    """Run every LSTM on our kernels, for the process or for a `with` block; no module is touched.

        with torch_manual.override():
            model(x)

        switch = torch_manual.override()  # from here on
        ...
        switch.undo()

    While it is in force, PyTorch's dispatcher sends the ops `aten::lstm.input`, `aten::lstm.data`
    (packed input) and `aten::lstm_cell` to our functions: calls of `nn.LSTM` and `nn.LSTMCell`, of
    their subclasses, of TorchScript modules, of `torch.lstm`, and from C++. Derivatives of every
    kind, torch.func, autocast and inference mode come with them. Dropout draws the numbers that
    PyTorch draws on the CPU.

    It takes effect at once, nests, and leaves no trace in the dispatcher. It is global to the
    process, not to a thread. A graph recorded under it keeps our backward pass afterwards, a
    compiled one what it was compiled with, before or under it.

    Not served: quantized LSTMs; the cell in a model that torch.jit.trace recorded, which holds its
    parts; and `nn.LSTM` under torch.compile and torch.export, which refuse it or take it apart into
    steps: use `replace` there.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._begin()

    def _begin(self) -> None:
        self._library = Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for op, function in FUNCTIONS.items():
                for key in KEYS:
                    self._library.impl(op, function, key)
        _in_force.append(self._library)

    def undo(self) -> None:
        """Give the ops back. A second call does nothing."""
        if self._library in _in_force:
            _in_force.remove(self._library)
            self._library._destroy()

    def __enter__(self) -> override:
        if self._library not in _in_force:
            self._begin()
        self._depth += 1
        return self

    def __exit__(self, *exc: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.undo()


def _lstm_input(input: Tensor, hx: Sequence[Tensor], *options: Any) -> tuple[Tensor, ...]:
    *options, batch_first = options  # type: ignore[assignment]
    x = input.transpose(0, 1) if batch_first else input
    if x.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    y, h_n, c_n = _layers(x, None, x.shape[1], hx, *options)
    return y.transpose(0, 1) if batch_first else y, h_n, c_n


def _lstm_data(
    data: Tensor, batch_sizes: Tensor, hx: Sequence[Tensor], *options: Any
) -> tuple[Tensor, ...]:
    return _layers(data, batch_sizes, int(batch_sizes[0]), hx, *options)


def _lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Check what our `lstm_cell` takes for granted, in stock's words, and run it."""
    if torch.jit.is_tracing():  # a trace holds not this op, but what stock does in it
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        return _stock_cell.call_boxed(keys, input, hx, w_ih, w_hh, b_ih, b_hh)
    if len(hx) != 2:
        raise RuntimeError("lstm_cell expects two hidden states")
    (B, I), (_, H) = input.shape, w_hh.shape
    if w_ih.shape[1] != I:
        raise RuntimeError(f"input has inconsistent input_size: got {I} expected {w_ih.shape[1]}")
    for k, state in enumerate(hx):
        if state.shape[0] != B:
            raise RuntimeError(
                f"Input batch size {B} doesn't match hidden{k} batch size {state.shape[0]}"
            )
        if state.shape[1] != H:
            raise RuntimeError(
                f"hidden{k} has inconsistent hidden_size: got {state.shape[1]}, expected {H}"
            )
    return lstm_cell(input, (hx[0], hx[1]), LSTMWeights(w_ih, w_hh, b_ih, b_hh))


_stock_cell = torch.library.get_kernel("aten::lstm_cell", "CPU")

FUNCTIONS = {"lstm.input": _lstm_input, "lstm.data": _lstm_data, "lstm_cell": _lstm_cell}

# Under a transform of torch.func the second comes first: our functions know the transforms, and
# the dispatcher has yet to unwrap the tensors.
KEYS = ("CompositeImplicitAutograd", "FuncTorchDynamicLayerFrontMode")


def _layers(
    x: Tensor,
    batch_sizes: Tensor | None,
    batch: int,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the layers, with dropout between them, over (T, B, ·) or packed rows."""
    D = 2 if bidirectional else 1
    if len(hx) != 2:
        raise RuntimeError("lstm expects two hidden states")
    for k, state in enumerate(hx):
        if state.dim() != 3 or state.shape[:2] != (num_layers * D, batch):
            raise ValueError(
                f"lstm: hx[{k}] must be (layers · D, B, ·) = ({num_layers * D}, {batch}, ·), "
                f"got {tuple(state.shape)}"
            )
    h0, c0 = hx
    weights = _by_direction(params, has_biases, h0.shape[2] != c0.shape[2])
    if len(weights) != num_layers * D:
        raise RuntimeError("Expected more weights in stacked_rnn")
    h_n, c_n = [], []
    for layer in range(num_layers):
        if layer > 0:
            x = torch.dropout(x, dropout, train)
        states = slice(layer * D, (layer + 1) * D)
        x, h, c = lstm_layer(x, h0[states], c0[states], weights[states], batch_sizes)
        h_n.append(h)
        c_n.append(c)
    return x, torch.cat(h_n), torch.cat(c_n)


def _by_direction(params: Sequence[Tensor], has_biases: bool, projected: bool) -> list[LSTMWeights]:
    """Group stock's flat list: w_ih, w_hh, b_ih, b_hh, w_hr of every direction of every layer."""
    n = 2 + 2 * has_biases + projected
    groups = [params[k : k + n] for k in range(0, len(params), n)]
    if any(len(group) != n for group in groups):
        raise RuntimeError("got an incorrect number of RNN parameters")
    none = (None, None)
    return [
        LSTMWeights(
            group[0],
            group[1],
            *(group[2:4] if has_biases else none),
            *(group[-1:] if projected else ()),
        )
        for group in groups
    ]
