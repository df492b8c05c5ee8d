"""Initial values for LSTMs: each function writes into the module's parameters and returns it.

They apply to `torch_manual.LSTM` and `PeepholeLSTM`, to their cells, and to torch.nn's, whose
parameters hold the four gates one after another in the order i, f, g, o.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def _lstm(module: nn.Module, caller: str) -> None:
    sort = getattr(module, "mode", None) if isinstance(module, nn.RNNBase) else None
    if sort != "LSTM" and not (
        isinstance(module, nn.RNNCellBase) and module.weight_hh.shape[0] == 4 * module.hidden_size
    ):
        raise TypeError(f"{caller}: module must be an LSTM or an LSTMCell, got {type(module)}")


def _parameters(module: nn.Module, prefix: str) -> list[nn.Parameter]:
    """The parameters of that name: of each layer and direction."""
    own = dict(module.named_parameters(recurse=False))
    names = module._flat_weights_names if isinstance(module, nn.RNNBase) else [prefix]
    found = []
    for name in names:
        if not name.startswith(prefix):
            continue
        p = own.get(name, own.get(name + "_orig"))  # of a pruned module
        if p is None:
            raise ValueError(
                f"init: {name} is computed from other parameters; initialise the module before "
                "it is parametrized"
            )
        found.append(p)
    return found


def _biases(module: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    pairs = _parameters(module, "bias_ih"), _parameters(module, "bias_hh")
    return list(zip(*pairs, strict=True))


@torch.no_grad()
def forget_bias_(module: M, value: float = 1.0) -> M:
    """Set the bias of the forget gate, b_if + b_hf, to `value`.

    A positive bias keeps the cell's content, and with it the gradient, from the first step on
    (Gers, Schmidhuber & Cummins 2000; Jozefowicz, Zaremba & Sutskever 2015). `bias_ih` receives
    the value and `bias_hh` zero; the other gates keep theirs.

    Raises:
        TypeError: `module` is no LSTM or LSTMCell.
        ValueError: it has no bias.
    """
    _lstm(module, "forget_bias_")
    if not module.bias:
        raise ValueError("forget_bias_: module has no bias (bias=False)")
    for bias_ih, bias_hh in _biases(module):
        bias_ih.chunk(4)[1].fill_(value)
        bias_hh.chunk(4)[1].zero_()
    return module


@torch.no_grad()
def orthogonal_(module: M, gain: float = 1.0) -> M:
    """Draw the recurrent weight of every gate as an orthogonal matrix of its own.

    `weight_hh` is (4H, P): four (H, P) blocks, each (semi-)orthogonal (Saxe, McClelland & Ganguli
    2014). `nn.init.orthogonal_` on the whole weight would make the gates orthogonal to each other.

    Raises:
        TypeError: `module` is no LSTM or LSTMCell.
    """
    _lstm(module, "orthogonal_")
    for weight_hh in _parameters(module, "weight_hh"):
        for block in weight_hh.chunk(4):
            nn.init.orthogonal_(block, gain)
    return module


@torch.no_grad()
def chrono_(module: M, max_length: int, min_length: int = 2) -> M:
    """Draw gate biases for memories of `min_length` to `max_length` steps (chrono initialisation).

    b_f = log(u) with u ~ U(min_length − 1, max_length − 1), b_i = −b_f, as in Tallec & Ollivier
    (2018), "Can recurrent neural networks warp time?", equation 16; b_g, b_o and `bias_hh` are 0.

    Raises:
        TypeError: `module` is no LSTM or LSTMCell.
        ValueError: it has no bias, or not 2 ≤ min_length ≤ max_length.
    """
    _lstm(module, "chrono_")
    if not module.bias:
        raise ValueError("chrono_: module has no bias (bias=False)")
    numbers = all(isinstance(n, (int, float)) for n in (min_length, max_length))
    if not numbers or not 2 <= min_length <= max_length < math.inf:
        raise ValueError(
            "chrono_: expected numbers 2 <= min_length <= max_length, "
            f"got min_length={min_length}, max_length={max_length}"
        )
    for bias_ih, bias_hh in _biases(module):
        bias_hh.zero_()
        b_i, b_f, b_g, b_o = bias_ih.chunk(4)
        b_f.uniform_(min_length - 1, max_length - 1).log_()
        b_i.copy_(-b_f)
        b_g.zero_()
        b_o.zero_()
    return module
