"""The Triton kernels as implementation of the ops: arguments prepared, a level chosen and launched.

Shapes are those of torch_manual/kernels/lstm.py. The kernels (triton_kernels/lstm) are imported at
the first call, so that torch_manual needs neither Triton nor a GPU. See docs/gpu_kernels.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from torch_manual.kernels import backend, triton_levels
from torch_manual.kernels.lstm import LSTMWeights, _cast, _compute_dtype, by_direction
from torch_manual.kernels.rows import check_batch_sizes, previous, steps
from torch_manual.kernels.triton_levels import CHIPS, Chip, Plan, Shape

_choose: Callable[[Shape, Chip], Plan] = triton_levels.choose


@contextmanager
def override(choose: Callable[[Shape, Chip], Plan]) -> Iterator[None]:
    """Within a `with` block, let `choose` pick the plan. For experiments and tests.

    Projections, full peepholes and empty batches stay with L0.
    """
    global _choose
    before, _choose = _choose, choose
    try:
        yield
    finally:
        _choose = before


def launched_beside(argument: int) -> Callable[[Callable], Callable]:
    """Decorate a function to launch on the device of its argument of this number."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def launch(*args: object, **options: object) -> object:
            with torch.cuda.device_of(args[argument]):
                return function(*args, **options)

        return launch

    return decorate


def chip_of(device: torch.device) -> Chip:
    """Describe `device`; the CPU, where the kernels are interpreted, stands for an H100."""
    if device.type == "cpu":
        return CHIPS["sm_90"]._replace(cooperative=False)  # programs run one after another
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        architecture = properties.gcnArchName.partition(":")[0]
        shared, cooperative = 65_536, False
    else:
        architecture = f"sm_{properties.major}{properties.minor}"
        shared = getattr(properties, "shared_memory_per_block_optin", 49_152)
        cooperative = True
    return Chip(architecture, properties.multi_processor_count, shared, cooperative)


def _plan(
    backward: bool, T: int, B: int, H: int, weights: Sequence[LSTMWeights], like: Tensor
) -> Plan:
    w = weights[0]
    full = w.weight_ci is not None and w.weight_ci.dim() == 2
    if w.weight_hr is not None or full or T == 0 or B == 0:
        return Plan(0)
    shape = Shape(backward, like.dtype, _precision(), T, B, H, len(weights))
    chip = chip_of(like.device)
    plan = _choose(shape, chip)
    if plan.level == 3 and backend.requested() == "auto" and _choose is triton_levels.choose:
        return triton_levels.plan_at(2, shape, chip)  # L3 has not run on hardware: only on request
    return plan


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@launched_beside(0)
def lstm_forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor | None],
    save: bool,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`torch_manual::lstm_forward` by the level that suits the shape."""
    from torch_manual.triton_kernels.lstm import sequence, step

    directions, dtype = by_direction(weights), x.dtype
    (D, B, P), H, N = h0.shape, c0.shape[2], len(x)
    T = _length(N, B, batch_sizes)
    plan = _plan(False, T, B, H, directions, x)
    y = x.new_empty(N, D * P)
    if plan.level == 0:
        return _forward_pointwise(x, h0, c0, batch_sizes, directions, y, save, reverse)
    gates = x.new_empty(D, N, 4 * H) if save else None
    cells = x.new_empty(D, N, H) if save else None
    gx = x.new_empty(D, N, 4 * H)
    for d, w in enumerate(directions):
        if w.bias_ih is not None and w.bias_hh is not None:
            torch.addmm(w.bias_ih + w.bias_hh, x, w.weight_ih.T, out=gx[d])
        else:
            torch.mm(x, w.weight_ih.T, out=gx[d])
    c = c0.to(_compute_dtype(c0), copy=True, memory_format=torch.contiguous_format)
    arguments = (
        *(gx, _stack([w.weight_hh for w in directions]), _peepholes(directions)),
        *(h0.contiguous(), c, _starts(B, T, batch_sizes, x.device), y, gates, cells, reverse),
    )
    if plan.level == 1:
        h_n = sequence.forward(
            *arguments, block=plan.block, precision=_precision(), options=plan.options()
        )
    else:
        step.forward(
            *arguments,
            persistent=plan.level == 3,
            block=plan.block,
            slices=plan.slices,
            precision=_precision(),
            options=plan.options(),
        )
        h_n = torch.empty_like(h0, memory_format=torch.contiguous_format)
        for d in range(D):
            last = _last_rows(N, B, batch_sizes, bool(d) or reverse)
            h_n[d] = y[last, d * P : (d + 1) * P]
    empty = x.new_empty(0)
    return (
        y,
        h_n,
        c.to(dtype),
        empty if gates is None else gates,
        empty.clone() if cells is None else cells,
    )


def _forward_pointwise(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    directions: Sequence[LSTMWeights],
    y: Tensor,
    save: bool,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from torch_manual.triton_kernels.lstm import pointwise

    dtype, (D, B, P), H, N = _compute_dtype(x), h0.shape, c0.shape[2], len(x)
    h, c = (t.to(dtype, copy=True, memory_format=torch.contiguous_format) for t in (h0, c0))
    gates = x.new_empty(D, N, 4 * H) if save else None
    cells = x.new_empty(D, N, H) if save else None
    order = steps(N, B, batch_sizes)
    for d, w in enumerate(_cast(w, dtype) for w in directions):
        gx = x.to(dtype) @ w.weight_ih.T
        for bias in (w.bias_ih, w.bias_hh):
            if bias is not None:
                gx += bias
        pointwise.forward(
            gx,
            w.weight_hh,
            w.weight_hr,
            _contiguous(w.weight_ci, w.weight_cf, w.weight_co),
            order[::-1] if d or reverse else order,
            h[d],
            c[d],
            y[:, d * P : (d + 1) * P],
            None if gates is None else gates[d],
            None if cells is None else cells[d],
        )
    empty = x.new_empty(0)
    return (
        y,
        h.to(x.dtype),
        c.to(x.dtype),
        empty if gates is None else gates,
        empty.clone() if cells is None else cells,
    )


@launched_beside(4)
def lstm_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    c0: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor | None],
    gates: Tensor,
    cells: Tensor,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`torch_manual::lstm_backward` by the level that suits the shape."""
    from torch_manual.triton_kernels.lstm import sequence, step_backward

    directions, dtype = by_direction(weights), _compute_dtype(gates)
    (D, N, _), (_, B, H), P = gates.shape, c0.shape, directions[0].weight_hh.shape[1]
    T = _length(N, B, batch_sizes)
    plan = _plan(True, T, B, H, directions, gates)
    dh, dc = (
        gates.new_zeros(D, B, width, dtype=dtype)
        if t is None
        else t.to(dtype, copy=True, memory_format=torch.contiguous_format)
        for t, width in ((dh_n, P), (dc_n, H))
    )
    dy = _rows_apart(gates.new_zeros(1, D * P).expand(N, -1) if dy is None else dy)
    gates, cells, c0 = gates.contiguous(), cells.contiguous(), c0.contiguous()
    if plan.level == 0:
        return _backward_pointwise(
            dy, dcells, dh, dc, c0, batch_sizes, directions, gates, cells, reverse
        )
    dpre = torch.empty_like(gates)
    weight_hh = _stack([w.weight_hh for w in directions])
    arguments = (
        *(dy, None if dcells is None else dcells.contiguous(), dh, dc, c0, weight_hh),
        *(
            _peepholes(directions),
            _starts(B, T, batch_sizes, gates.device),
            gates,
            cells,
            dpre,
            reverse,
        ),
    )
    if plan.level == 1:
        sequence.backward(
            *arguments, block=plan.block, precision=_precision(), options=plan.options()
        )
    else:
        step_backward.backward(
            *arguments,
            persistent=plan.level == 3,
            block=plan.block,
            slices=plan.slices,
            precision=_precision(),
            options=plan.options(),
        )
        for d in range(D):  # the first rows of a direction are the last ones of the other
            first = _last_rows(N, B, batch_sizes, not (d or reverse))
            dh[d] = (dpre[d][first] @ weight_hh[d]).to(dtype)  # B9
    return dpre, gates.new_empty(D, 0), dh.to(gates.dtype), dc.to(gates.dtype)


def _backward_pointwise(
    dy: Tensor,
    dcells: Tensor | None,
    dh: Tensor,
    dc: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    directions: Sequence[LSTMWeights],
    gates: Tensor,
    cells: Tensor,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from torch_manual.triton_kernels.lstm import pointwise

    dtype, (D, N, _), (_, B, P) = dh.dtype, gates.shape, dh.shape
    dpre = torch.empty_like(gates, dtype=dtype)
    projected = directions[0].weight_hr is not None
    dh_rows = gates.new_empty((D, N, P) if projected else (D, 0), dtype=dtype)
    order = steps(N, B, batch_sizes)
    for d, w in enumerate(_cast(w, dtype) for w in directions):
        pointwise.backward(
            dy[:, d * P : (d + 1) * P],
            None if dcells is None else dcells[d],
            w.weight_hh,
            w.weight_hr,
            _contiguous(w.weight_ci, w.weight_cf, w.weight_co),
            order if d or reverse else order[::-1],
            gates[d],
            cells[d],
            previous(cells[d], c0[d], batch_sizes, bool(d) or reverse),
            dh[d],
            dc[d],
            dpre[d],
            dh_rows[d] if projected else None,
        )
    return tuple(t.to(gates.dtype) for t in (dpre, dh_rows, dh, dc))  # type: ignore[return-value]


def _length(n_rows: int, batch: int, batch_sizes: Tensor | None) -> int:
    if batch_sizes is not None:
        check_batch_sizes(batch_sizes, n_rows, batch)
        return len(batch_sizes)
    return n_rows // batch if batch else 0


def _starts(batch: int, T: int, batch_sizes: Tensor | None, device: torch.device) -> Tensor:
    """The first row of every step, with an empty step before and after: (T + 3,)."""
    if batch_sizes is None:
        return (torch.arange(-1, T + 2, device=device) * batch).clamp(0, T * batch)
    ends = batch_sizes.cumsum(0)
    return torch.cat([ends.new_zeros(2), ends, ends[-1:]]).to(device, non_blocking=True)


def _last_rows(
    n_rows: int, batch: int, batch_sizes: Tensor | None, reverse: bool
) -> slice | Tensor:
    """The row at which the recurrence of each sequence ends."""
    if reverse:
        return slice(0, batch)
    if batch_sizes is None:
        return slice(n_rows - batch, n_rows)
    sequence = torch.arange(batch)
    last = (batch_sizes[:, None] > sequence).sum(0) - 1
    return (batch_sizes.cumsum(0) - batch_sizes)[last] + sequence


def _rows_apart(t: Tensor) -> Tensor:
    """`t` (N, K) with its columns side by side and its rows anywhere, all in one place too."""
    if t.stride(0) == 0 and len(t):
        return t[:1].contiguous().expand(len(t), -1)
    return t if t.stride(1) == 1 else t.contiguous()


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(tuple(tensors)) if len(tensors) > 1 else tensors[0].contiguous().unsqueeze(0)


def _peepholes(directions: Sequence[LSTMWeights]) -> tuple[Tensor | None, ...]:
    """The three peepholes, (D, H) each, or three times None."""
    if directions[0].weight_ci is None:
        return None, None, None
    return tuple(_stack(w) for w in zip(*(w[5:8] for w in directions), strict=True))


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)
