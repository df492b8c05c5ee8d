"""The LSTM's gradients that are sums over all steps, as opaque ops: matrix products on `dpre`.

    torch_manual::lstm_input_sums   dpre, W_ih       → dx                       B10
    torch_manual::lstm_weight_sums  dpre, x, h_prev  → dW_ih, dW_hh, db         B11 to B13

The same products serve the tangents of these gradients. Shapes as in kernels/lstm.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from torch_manual.kernels import cpu_library, cpu_sums
from torch_manual.kernels.lstm import dispatched


def lstm_input_sums(dpre: Sequence[Tensor], weights_ih: Sequence[Tensor]) -> Tensor:
    """Return dx, (N, I).

    Args:
        dpre: (N, 4H) of each direction.
        weights_ih: (4H, I) of each direction.
    """
    if not torch.compiler.is_compiling() and is_legacy_batchedtensor(dpre[0]):
        # is_grads_batched=True, whose vmap has no rule for lists
        return _input_sums(dpre, weights_ih)
    if dispatched(*dpre, *weights_ih):
        return torch.ops.torch_manual.lstm_input_sums.default(dpre, weights_ih)
    return _input_sums_cpu(dpre, weights_ih)


def lstm_weight_sums(
    dpre: Tensor,
    x: Tensor | None,
    h_prev: Tensor | None,
    bias: bool,
    samples: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dW_ih (4H, I), dW_hh (4H, P) and db (4H,) of one direction; empty if not asked for.

    Args:
        dpre: (N, 4H).
        x: (N, I), or None for no dW_ih.
        h_prev: (N, P), every step's h_{t-1}, or None for no dW_hh.
        bias: whether db is wanted.
        samples: if given, rows hold this many samples side by side, (row, sample), and the results
            have a leading dimension of samples.
    """
    if dispatched(dpre, x, h_prev):
        return torch.ops.torch_manual.lstm_weight_sums.default(dpre, x, h_prev, bias, samples)
    return _weight_sums_cpu(dpre, x, h_prev, bias, samples)


def lstm_peephole_sums(dpre: Tensor, c_prev: Tensor, c: Tensor) -> tuple[Tensor, ...] | None:
    """Return the gradients (H,) of a direction's diagonal peepholes into i, f and o.

    None where the CPU kernel does not serve.

    Args:
        dpre: (N, 4H).
        c_prev: (N, H), every step's c_{t-1}.
        c: (N, H).
    """
    if (
        dispatched(dpre, c_prev, c)
        or dpre.dtype not in cpu_sums.DTYPES
        or not cpu_library.serves(dpre.dtype)
    ):
        return None
    return cpu_sums.lstm_peephole_sums(dpre, c_prev, c)  # B15


def apart(t: Tensor, samples: int | None) -> Tensor:
    """(…, row·sample, K) → (…, sample, row, K); `t` itself without samples."""
    return t if samples is None else t.unflatten(-2, (-1, samples)).transpose(-2, -3)


def _input_sums(dpre: Sequence[Tensor], weights_ih: Sequence[Tensor]) -> Tensor:
    dx = dpre[0] @ weights_ih[0]  # B10
    for d in range(1, len(dpre)):
        dx = dx + dpre[d] @ weights_ih[d]
    return dx


def _weight_sums(
    dpre: Tensor,
    x: Tensor | None,
    h_prev: Tensor | None,
    bias: bool,
    samples: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dpre = apart(dpre, samples)
    return (
        dpre.new_empty(0) if x is None else dpre.mT @ apart(x, samples),  # B11
        dpre.new_empty(0) if h_prev is None else dpre.mT @ apart(h_prev, samples),  # B12
        dpre.sum(-2) if bias else dpre.new_empty(0),  # B13
    )


def _fake_input_sums(dpre: Sequence[Tensor], weights_ih: Sequence[Tensor]) -> Tensor:
    return dpre[0].new_empty(dpre[0].shape[0], weights_ih[0].shape[1])


def _fake_weight_sums(
    dpre: Tensor,
    x: Tensor | None,
    h_prev: Tensor | None,
    bias: bool,
    samples: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    M = (dpre.shape[1],) if samples is None else (samples, dpre.shape[1])
    return (
        dpre.new_empty(0 if x is None else (*M, x.shape[1])),
        dpre.new_empty(0 if h_prev is None else (*M, h_prev.shape[1])),
        dpre.new_empty(M if bias else 0),
    )


def _input_sums_cpu(dpre: Sequence[Tensor], weights_ih: Sequence[Tensor]) -> Tensor:
    serves = dpre[0].dtype in cpu_sums.DTYPES and cpu_library.serves(dpre[0].dtype)
    return (cpu_sums.lstm_input_sums if serves else _input_sums)(dpre, weights_ih)


def _weight_sums_cpu(dpre: Tensor, *rest: Tensor | int | None) -> tuple[Tensor, Tensor, Tensor]:
    serves = dpre.dtype in cpu_sums.DTYPES and cpu_library.serves(dpre.dtype)
    return (cpu_sums.lstm_weight_sums if serves else _weight_sums)(dpre, *rest)  # type: ignore[arg-type]


for _name, _schema, _plain, _fake, _cpu in (
    (
        "torch_manual::lstm_input_sums",
        "(Tensor[] dpre, Tensor[] weights_ih) -> Tensor",
        _input_sums,
        _fake_input_sums,
        _input_sums_cpu,
    ),
    (
        "torch_manual::lstm_weight_sums",
        "(Tensor dpre, Tensor? x, Tensor? h_prev, bool bias, SymInt? samples=None)"
        " -> (Tensor dweight_ih, Tensor dweight_hh, Tensor dbias)",
        _weight_sums,
        _fake_weight_sums,
        _weight_sums_cpu,
    ),
):
    torch.library.define(_name, _schema)
    torch.library.impl(_name, "default", _plain)
    torch.library.impl(_name, "cpu", _cpu)
    torch.library.register_fake(_name, _fake)
