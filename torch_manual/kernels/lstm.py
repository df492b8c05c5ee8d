"""The LSTM recurrence of one layer, as opaque ops (equations: docs/derivations/lstm.md).

    torch_manual::lstm_forward   x, h0, c0, weights            → y, h_n, c_n, gates, cells
    torch_manual::lstm_backward  dy, dh_n, dc_n, dcells, saved  → dpre, dh, dh0, dc0

The rest is matrix products on `dpre` in lstm_sums.py, dx row by row, dW and db sums over time, and
dW_hr, of dh, in functions/lstm_gradients.py. What follows here is the implementation in plain
torch, for any device and real dtype.

Shapes: T steps, B sequences, N rows (T·B, or Σ batch_sizes when packed), I inputs, H hidden units,
P outputs (proj_size, or H), D directions. Gates stand in the order i, f, g, o.

    x (N, I)   h0, h_n (D, B, P)   c0, c_n (D, B, H)   y (N, D·P)   gates, dpre (D, N, 4H)
    cells (D, N, H)   dh (D, N, P), or (D, 0) without W_hr
    batch_sizes (T,) int64 on the CPU, or None

The second direction runs from the last step to the first; with `reverse`, so does a single one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.nn import Parameter

from torch_manual.kernels import backend, cpu, cpu_library
from torch_manual.kernels.rows import previous, steps


class LSTMWeights(NamedTuple):
    """The parameters of one direction of one layer; what a layer does without is None.

    weight_ih (4H, I), weight_hh (4H, P), bias_ih and bias_hh (4H,), weight_hr (P, H);
    peepholes weight_ci, weight_cf, weight_co: (H,) diagonal or (H, H) full.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    weight_hr: Tensor | None = None
    weight_ci: Tensor | None = None
    weight_cf: Tensor | None = None
    weight_co: Tensor | None = None


def by_direction(flat: Sequence) -> list[LSTMWeights]:
    """Undo `[*forward_weights, *reverse_weights]`, the form in which the ops take weights."""
    n = len(LSTMWeights._fields)
    return [LSTMWeights(*flat[k : k + n]) for k in range(0, len(flat), n)]


def _forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor | None],
    save: bool,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if x.is_complex():
        raise TypeError(f"lstm: tensors must be real, got {x.dtype}")
    dtype = _compute_dtype(x)
    results = [
        _forward_direction(x.to(dtype), h, c, batch_sizes, _cast(w, dtype), bool(d) or reverse)
        for d, (h, c, w) in enumerate(
            zip(h0.to(dtype), c0.to(dtype), by_direction(weights), strict=True)
        )
    ]
    y, h_n, c_n, gates, cells = zip(*results, strict=True)
    out = (torch.cat(y, -1), torch.stack(h_n), torch.stack(c_n))
    saved = (torch.stack(gates), torch.stack(cells)) if save else (x.new_empty(0), x.new_empty(0))
    return tuple(t.to(x.dtype) for t in out + saved)  # type: ignore[return-value]


def _forward_direction(
    x: Tensor, h0: Tensor, c0: Tensor, batch_sizes: Tensor | None, w: LSTMWeights, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    h, c = h0.clone(), c0.clone()
    y = x.new_empty(len(x), h.shape[1])
    gates = x.new_empty(len(x), 4 * c.shape[1])
    cells = x.new_empty(len(x), c.shape[1])
    input_part = x @ w.weight_ih.T
    for bias in (w.bias_ih, w.bias_hh):
        if bias is not None:
            input_part += bias
    order = steps(len(x), len(h0), batch_sizes)
    for rows in reversed(order) if reverse else order:
        alive = slice(rows.stop - rows.start)
        pre = input_part[rows] + h[alive] @ w.weight_hh.T  # F1
        pre_i, pre_f, pre_g, pre_o = pre.chunk(4, -1)
        i = torch.sigmoid(_peep(pre_i, c[alive], w.weight_ci))  # F2
        f = torch.sigmoid(_peep(pre_f, c[alive], w.weight_cf))  # F3
        g = torch.tanh(pre_g)  # F4
        c[alive] = f * c[alive] + i * g  # F5
        o = torch.sigmoid(_peep(pre_o, c[alive], w.weight_co))  # F6
        m = o * torch.tanh(c[alive])  # F7
        h[alive] = m if w.weight_hr is None else m @ w.weight_hr.T  # F8
        y[rows], cells[rows], gates[rows] = h[alive], c[alive], torch.cat([i, f, g, o], -1)
    return y, h, c, gates, cells


def _backward(
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
    dtype = _compute_dtype(gates)
    n_directions, n_rows = gates.shape[:2]
    directions = by_direction(weights)
    P = directions[0].weight_hh.shape[1]
    if dy is None:
        dy = gates.new_zeros(n_rows, n_directions * P)
    if dh_n is None:
        dh_n = c0.new_zeros(*c0.shape[:2], P)
    if dc_n is None:
        dc_n = torch.zeros_like(c0)
    results = [
        _backward_direction(
            dy[:, d * P : (d + 1) * P].to(dtype),
            dh_n[d].to(dtype),
            dc_n[d].to(dtype),
            None if dcells is None else dcells[d].to(dtype),
            c0[d].to(dtype),
            batch_sizes,
            _cast(w, dtype),
            gates[d].to(dtype),
            cells[d].to(dtype),
            reverse=bool(d) or reverse,
        )
        for d, w in enumerate(directions)
    ]
    dpre, dh, dh0, dc0 = (torch.stack(t).to(gates.dtype) for t in zip(*results, strict=True))
    return dpre, dh, dh0, dc0


def _backward_direction(
    dy: Tensor,
    dh_n: Tensor,
    dc_n: Tensor,
    dcells: Tensor | None,
    c0: Tensor,
    batch_sizes: Tensor | None,
    w: LSTMWeights,
    gates: Tensor,
    cells: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dpre = torch.empty_like(gates)
    dh_rows = dy.clone() if w.weight_hr is not None else dy.new_empty(0)
    dh_next, dc_next = dh_n.clone(), dc_n.clone()
    c_before = previous(cells, c0, batch_sizes, reverse)
    order = steps(len(dy), len(c0), batch_sizes)
    for rows in order if reverse else reversed(order):
        alive = slice(rows.stop - rows.start)
        i, f, g, o = gates[rows].chunk(4, -1)
        c_prev, tanh_c = c_before[rows], torch.tanh(cells[rows])
        dh = dy[rows] + dh_next[alive]  # B1
        dm = dh if w.weight_hr is None else dh @ w.weight_hr  # B2
        dpre_o = dm * tanh_c * o * (1 - o)  # B3
        dc = dc_next[alive] + dm * o * (1 - tanh_c**2) + _peep_back(dpre_o, w.weight_co)  # B4
        if dcells is not None:
            dc = dc + dcells[rows]
        dpre_i = dc * g * i * (1 - i)  # B5
        dpre_f = dc * c_prev * f * (1 - f)  # B6
        dpre_g = dc * i * (1 - g**2)  # B7
        dc_next[alive] = (  # B8
            dc * f + _peep_back(dpre_i, w.weight_ci) + _peep_back(dpre_f, w.weight_cf)
        )
        dpre[rows] = torch.cat([dpre_i, dpre_f, dpre_g, dpre_o], -1)
        dh_next[alive] = dpre[rows] @ w.weight_hh  # B9
        if w.weight_hr is not None:
            dh_rows[rows] = dh
    return dpre, dh_rows, dh_next, dc_next


def _peep(pre: Tensor, c: Tensor, weight: Tensor | None) -> Tensor:
    """`pre` plus what the gate sees of the cell through its peephole."""
    if weight is None:
        return pre
    return pre + (c * weight if weight.dim() == 1 else c @ weight.T)


def _peep_back(dpre: Tensor, weight: Tensor | None) -> Tensor | int:
    """What the gate's gradient sends back to the cell through its peephole."""
    if weight is None:
        return 0
    return dpre * weight if weight.dim() == 1 else dpre @ weight


def _compute_dtype(t: Tensor) -> torch.dtype:
    """Half precision is stored, never accumulated."""
    return torch.float32 if t.dtype in (torch.float16, torch.bfloat16) else t.dtype


def _cast(w: LSTMWeights, dtype: torch.dtype) -> LSTMWeights:
    return LSTMWeights(*(None if t is None else t.to(dtype) for t in w))  # type: ignore[arg-type]


def _fake_forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor | None],
    save: bool,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (D, _, P), H, N = h0.shape, c0.shape[2], x.shape[0]
    saved = ((D, N, 4 * H), (D, N, H)) if save else ((0,), (0,))
    return (
        x.new_empty(N, D * P),
        h0.new_empty(h0.shape),
        c0.new_empty(c0.shape),
        *(x.new_empty(shape) for shape in saved),
    )  # type: ignore[return-value]


def _fake_backward(
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
    w = by_direction(weights)[0]
    (D, N, _), B, P = gates.shape, c0.shape[1], w.weight_hh.shape[1]
    dh_shape = (D, 0) if w.weight_hr is None else (D, N, P)
    return (
        gates.new_empty(gates.shape),
        gates.new_empty(dh_shape),
        c0.new_empty(D, B, P),
        c0.new_empty(c0.shape),
    )


for _name, _schema, _plain, _fake in (
    (
        "torch_manual::lstm_forward",
        "(Tensor x, Tensor h0, Tensor c0, Tensor? batch_sizes, Tensor?[] weights, bool save,"
        " bool reverse=False)"
        " -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)",
        _forward,
        _fake_forward,
    ),
    (
        "torch_manual::lstm_backward",
        "(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, Tensor c0, Tensor? batch_sizes,"
        " Tensor?[] weights, Tensor gates, Tensor cells, bool reverse=False)"
        " -> (Tensor dpre, Tensor dh, Tensor dh0, Tensor dc0)",
        _backward,
        _fake_backward,
    ),
):
    torch.library.define(_name, _schema)
    torch.library.impl(_name, "default", _plain)
    torch.library.register_fake(_name, _fake)


def _triton() -> Any:
    from torch_manual.kernels import triton  # it imports this file

    return triton


def _forward_cpu(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    if backend.triton_serves(x):
        return _triton().lstm_forward(x, *rest)
    return (cpu.lstm_forward if cpu_library.serves(x.dtype) else _forward)(x, *rest)


def _backward_cpu(*args: Any) -> tuple[Tensor, ...]:
    if backend.triton_serves(args[4]):
        return _triton().lstm_backward(*args)
    return (cpu.lstm_backward if cpu_library.serves(args[4].dtype) else _backward)(*args)


def _forward_cuda(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _triton().lstm_forward(x, *rest) if backend.triton_serves(x) else _forward(x, *rest)


def _backward_cuda(*args: Any) -> tuple[Tensor, ...]:
    return _triton().lstm_backward(*args) if backend.triton_serves(args[4]) else _backward(*args)


torch.library.impl("torch_manual::lstm_forward", "cpu", _forward_cpu)
torch.library.impl("torch_manual::lstm_backward", "cpu", _backward_cpu)
torch.library.impl("torch_manual::lstm_forward", "cuda", _forward_cuda)
torch.library.impl("torch_manual::lstm_backward", "cuda", _backward_cuda)


def dispatched(*tensors: Tensor | None, weights: Sequence[Tensor | None] = ()) -> bool:
    """Whether PyTorch's dispatcher must see a call with these tensors.

    A step takes the kernel a few microseconds and the dispatcher as long again, so that CPU tensors
    go without it when nobody listens: no tracer, no mode, no transform, no subclass, no view that
    negates. `weights` that are parameters are where the other tensors are, and no such view.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    ):
        return True
    plain = Tensor, Parameter
    for t in tensors:
        if t is not None and (
            type(t) not in plain or is_legacy_batchedtensor(t) or not t.is_cpu or t.is_neg()
        ):
            return True
    others = [w for w in weights if w is not None and type(w) is not Parameter]
    return bool(others) and dispatched(*others)


def lstm_forward(x: Tensor, h0: Tensor, c0: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """`torch_manual::lstm_forward`."""
    if dispatched(x, h0, c0, weights=rest[1]):
        return torch.ops.torch_manual.lstm_forward.default(x, h0, c0, *rest)
    return _forward_cpu(x, h0, c0, *rest)


def lstm_step(
    x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Tensor | None], save: bool
) -> tuple[Tensor, ...]:
    """One step, x (B, I), h (B, P) and c (B, H) to the next h and c; with `save` gates and cells.

    None of these is a view, so that they may leave an `autograd.Function` and be changed in place.
    """
    if (
        dispatched(x, h, c, weights=weights)
        or backend.triton_serves(x)
        or not cpu_library.serves(x.dtype)
        or x.dtype in cpu_library.HALF
    ):
        y, _, c_n, *kept = lstm_forward(x, h.unsqueeze(0), c.unsqueeze(0), None, weights, save)
        return y, c_n.squeeze_(0), *(kept if save else ())
    return cpu.lstm_step(x, h, c, weights, save)


def lstm_backward(*args: Any) -> tuple[Tensor, ...]:
    """`torch_manual::lstm_backward`."""
    dy, dh_n, dc_n, dcells, c0, _, weights, gates, cells = args[:9]
    if dispatched(dy, dh_n, dc_n, dcells, c0, gates, cells, weights=weights):
        return torch.ops.torch_manual.lstm_backward.default(*args)
    return _backward_cpu(*args)
