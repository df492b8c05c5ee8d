"""The LSTM recurrence and its tangent in one pass: what forward mode alone needs.

Where the compiled kernel serves, it keeps no gates in between (csrc/lstm_dual.h). Elsewhere, and
with projections or full peepholes, one op follows the other. Shapes: kernels/lstm_tangent.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from torch_manual.kernels import backend, cpu, cpu_library
from torch_manual.kernels.lstm import by_direction, dispatched, lstm_forward
from torch_manual.kernels.lstm_tangent import lstm_tangent


def lstm_dual(
    tx: Tensor | None,
    th0: Tensor | None,
    tc0: Tensor | None,
    tweights: Sequence[Tensor | None],
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor | None],
    return_cells: bool,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return y, h_n, c_n and, if asked for, the cells; then the tangents of these."""
    w = by_direction(weights)[0]
    if (
        w.weight_hr is None
        and (w.weight_ci is None or w.weight_ci.dim() == 1)
        and not dispatched(tx, th0, tc0, *tweights, x, h0, c0, weights=weights)
        and not backend.triton_serves(x)
        and cpu_library.serves(x.dtype)
        and x.dtype not in cpu_library.HALF
    ):
        return cpu.lstm_dual(tx, th0, tc0, tweights, x, h0, c0, batch_sizes, weights, return_cells)
    y, h_n, c_n, gates, cells = lstm_forward(x, h0, c0, batch_sizes, weights, True)
    ty, th_n, tc_n, _, tcells = lstm_tangent(
        tx, th0, tc0, tweights, x, h0, c0, batch_sizes, weights, y, gates, cells
    )
    n = 4 if return_cells else 3
    return (y, h_n, c_n, cells)[:n], (ty, th_n, tc_n, tcells)[:n]
