"""What an LSTM layer or cell is given, and what it finds again in its backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from torch import Tensor

from torch_manual.kernels.lstm import LSTMWeights

_SHAPES = {  # those of the peepholes are theirs to choose
    "weight_ih": "(4H, I)",
    "weight_hh": "(4H, P)",
    "bias_ih": "(4H,)",
    "bias_hh": "(4H,)",
    "weight_hr": "(P, H)",
}


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
    try:
        of_x, of_h, of_c, n_directions = x.shape, h0.shape, c0.shape, len(weights)
    except AttributeError:
        types = ", ".join(type(t).__name__ for t in (x, h0, c0))
        raise TypeError(f"lstm: x, h0 and c0 must be tensors, got {types}") from None
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
            or ih is None
            or hh is None
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
    for k, (name, t, shape) in enumerate(zip(w._fields, w, shapes, strict=True)):
        if (k < 2 and t is None) or (t is not None and t.shape != shape):
            symbol = _SHAPES.get(name, "(H, H)" if full else "(H,)")
            got = None if t is None else tuple(t.shape)
            raise ValueError(f"lstm: {name} must be {symbol} = {shape}, got {got}")
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
