"""Forward mode with nothing else: a pass and its tangent in one go, without a graph.

Where one `torch.func.jvp` or one `forward_ad.dual_level` is all that looks at a layer, nothing has
to be kept for another transform, and an `autograd.Function` would take longer than the kernel of a
small layer. Any other combination goes through LSTMFunction.jvp in lstm.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torch_manual.functions._autocast import autocast_off
from torch_manual.functions._function import is_wrapped
from torch_manual.kernels.lstm_dual import lstm_dual
from torch_manual.kernels.rows import as_before, as_rows

_functorch = torch._C._functorch
_of_functorch = _functorch.is_functorch_wrapped_tensor
_JVP = _functorch.TransformType.Jvp
# Those of forward_ad but for what torch.export needs, which does not come here.
_make_dual, _unpack_dual = torch._VF._make_dual, torch._VF._unpack_dual


def lstm_forward_mode(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor | None],
    return_cells: bool,
) -> tuple[Tensor, ...] | None:
    """Return y, h_n, c_n and cells as dual tensors (F1 to F8, R1 to R8).

    y is (T, B, ·) where x is. Without `return_cells` no cells are made, and c0 stands in their
    place.

    None where something else than one level of forward mode is at work: no tangent, a reverse pass
    that may follow, another transform, a batch of tangents, torch.compile.
    """
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return None
    level = None
    if depth := _functorch.get_dynamic_layer_stack_depth():
        top = _functorch.peek_interpreter_stack()
        if depth > 1 or top.key() != _JVP:
            return None
        level = top.level()
    parts = [_unpack(t, level) for t in (x, h0, c0, *weights)]
    reverse = torch.is_grad_enabled()
    tensors = [t for dual in parts for t in dual if t is not None]
    if any((reverse and t.requires_grad) or is_wrapped(t) for t in tensors):
        return None
    if all(tangent is None for _, tangent in parts):
        return None
    (x, tx), (h0, th0), (c0, tc0) = parts[:3]  # type: ignore[assignment]
    weights, tweights = zip(*parts[3:], strict=True)
    transform = None if level is None else _functorch.pop_dynamic_layer_stack()
    try:
        with autocast_off(x):
            rows, trows = as_rows(x), None if tx is None else as_rows(tx)
            duals = lstm_dual(
                trows, th0, tc0, tweights, rows, h0, c0, batch_sizes, weights, return_cells
            )
            out, tout = ((as_before(y, x), *rest) for y, *rest in duals)
    finally:
        if transform is not None:
            _functorch.push_dynamic_layer_stack(transform)
    if level is not None:
        out, tout = (tuple(_functorch._wrap_for_grad(t, level) for t in ts) for ts in (out, tout))
    dual_level = forward_ad._current_level
    y, h_n, c_n, *cells = (
        _make_dual(t, tangent, level=dual_level) for t, tangent in zip(out, tout, strict=True)
    )
    return y, h_n, c_n, cells[0] if cells else c0


def _unpack(t: Tensor | None, level: int | None) -> tuple[Tensor | None, Tensor | None]:
    """A primal and its tangent, or None for none; out of functorch's wrappers of `level`."""
    if t is None or (level is not None and not _of_functorch(t)):
        return t, None
    primal, tangent = _unpack_dual(t, level=forward_ad._current_level)
    if level is not None:
        primal = _functorch._unwrap_for_grad(primal, level)
        tangent = None if tangent is None else _functorch._unwrap_for_grad(tangent, level)
    if tangent is not None and tangent._is_zerotensor():
        return primal, None
    return primal, tangent
