"""The ops of kernels/lstm.py on CPU tensors, in the compiled kernel (torch_manual/csrc).

Shapes are those of torch_manual/kernels/lstm.py; csrc/lstm.h describes the structures filled here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from torch_manual.kernels import cpu_grid, cpu_library, memory, packed
from torch_manual.kernels.cpu_library import HALF
from torch_manual.kernels.rows import check_batch_sizes

_WEIGHTS = 8  # of one direction; LSTMWeights in kernels/lstm.py
_NONE = (0,) * _WEIGHTS
# Sizes take so many words; then come three more and ten pointers, or eleven pointers and a stride.
SIZES_WORDS = 13
FORWARD_WORDS = SIZES_WORDS + 13 + 2 * _WEIGHTS
BACKWARD_WORDS = SIZES_WORDS + 12 + 2 * _WEIGHTS
_forward_arguments = struct.Struct(f"{FORWARD_WORDS}q").pack
_dual_arguments = struct.Struct(f"{FORWARD_WORDS + 7 + 2 * _WEIGHTS}q").pack
_backward_arguments = struct.Struct(f"{BACKWARD_WORDS}q").pack


def lstm_forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor | None],
    save: bool,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`torch_manual::lstm_forward` on CPU tensors."""
    dtype = x.dtype
    if dtype in HALF:
        single = [None if w is None else w.float() for w in weights]
        results = lstm_forward(
            x.float(), h0.float(), c0.float(), batch_sizes, single, save, reverse
        )
        return tuple(t.to(dtype) for t in results)  # type: ignore[return-value]
    (D, _, H), N = c0.shape, x.shape[0]
    gates = memory.empty(x, D, N, 4 * H) if save else x.new_empty(0)
    cells = memory.empty(x, D, N, H) if save else x.new_empty(0)
    kept = gates.data_ptr(), cells.data_ptr(), 0
    return *run_forward(x, h0, c0, batch_sizes, weights, kept, reverse=reverse), gates, cells


def run_forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor | None],
    kept: tuple[int, int, int],
    recompute: int = 0,
    chunk_rows: int = 0,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, h_n and c_n; `kept` are the addresses of gates, cells and c_kept, or 0."""
    x, h0, c0 = x.contiguous(), h0.contiguous(), c0.contiguous()
    (N, I), (D, B, P), H = x.shape, h0.shape, c0.shape[2]
    y, h_n, c_n = memory.empty(x, N, D * P), torch.empty_like(h0), torch.empty_like(c0)
    T, lengths = steps(N, B, batch_sizes)
    if T == 0:
        return y, h_n.copy_(h0), c_n.copy_(c0)
    weights, pointers, full = in_c_order(weights)
    work = N * 4 * H * (I + P)
    key = None if any(kept) else packed.key_of((I, H, P, D), weights, pointers)
    unpacked = cpu_grid.unpacked(T, N, key is not None)
    block = None if unpacked else packed.take(key)
    cpu_library.call(
        "lstm_forward",
        x.dtype,
        _forward_arguments(
            *(T, B, I, H, P, D, full, reverse),
            *(*cpu_grid.thinned(cpu_grid.grid(T, B, work, H, D)), lengths),
            *(unpacked, recompute, chunk_rows),
            *(x.data_ptr() or none_of(x), h0.data_ptr() or none_of(h0)),
            c0.data_ptr() or none_of(c0),
            *(y.data_ptr(), h_n.data_ptr(), c_n.data_ptr(), *kept),
            *(0 if block is None else block.data_ptr(), *pointers),
        ),
    )
    packed.give_back(key, block)
    return y, h_n, c_n


def lstm_step(
    x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Tensor | None], save: bool
) -> tuple[Tensor, ...]:
    """`lstm_forward` of one step and direction: x (B, I), h (B, P), c (B, H).

    Returns the next h and c, and with `save` gates (1, B, 4H) and cells (1, B, H).
    """
    x, h, c = x.contiguous(), h.contiguous(), c.contiguous()
    (B, I), P, H = x.shape, h.shape[1], c.shape[1]
    h_n, c_n = torch.empty_like(h), torch.empty_like(c)
    kept = (memory.empty(x, 1, B, 4 * H), memory.empty(x, 1, B, H)) if save else ()
    if B == 0:
        return h_n, c_n, *kept
    weights, pointers, full = in_c_order(weights)
    gates, cells = (t.data_ptr() for t in kept) if save else (0, 0)
    y, unpacked = h_n.data_ptr(), cpu_grid.unpacked(1, B)
    grid = cpu_grid.grid(1, B, B * 4 * H * (I + P), H, 1)
    if grid is not cpu_grid.ALONE:
        grid = cpu_grid.thinned(grid)
    key = None if unpacked or save else packed.key_of((I, H, P, 1), weights, pointers)
    block = packed.take(key)
    cpu_library.call(
        "lstm_forward",
        x.dtype,
        _forward_arguments(
            *(1, B, I, H, P, 1, full, False, *grid, 0),
            *(unpacked, 0, 0),
            *(x.data_ptr() or none_of(x), h.data_ptr() or none_of(h), c.data_ptr() or none_of(c)),
            *(y, y, c_n.data_ptr(), gates, cells, 0),
            *(0 if block is None else block.data_ptr(), *pointers),
        ),
    )
    packed.give_back(key, block)
    return h_n, c_n, *kept


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
    """`lstm_dual` of kernels/lstm_dual.py on CPU tensors, without projection and full peepholes."""
    x, h0, c0 = x.contiguous(), h0.contiguous(), c0.contiguous()
    tx, th0, tc0 = (None if t is None else t.contiguous() for t in (tx, th0, tc0))
    (N, I), (D, B, H) = x.shape, c0.shape
    T, lengths = steps(N, B, batch_sizes)

    def results() -> tuple[Tensor, ...]:
        made = memory.empty(x, N, D * H), torch.empty_like(h0), torch.empty_like(c0)
        return (*made, memory.empty(x, D, N, H)) if return_cells else made

    out, tout = results(), results()
    if T == 0:
        for t, given in zip((*out[1:3], *tout[1:3]), (h0, c0, th0, tc0), strict=True):
            t.zero_() if given is None else t.copy_(given)
        return out, tout
    weights, pointers, _ = in_c_order(weights)
    tweights, tpointers, _ = in_c_order(tweights)
    products = sum(t is not None for t in (tx, tweights[0])) * I
    products += I + H * (2 + (tweights[1] is not None))
    key = packed.key_of((I, H, H, D), weights, pointers)
    block = packed.take(key)
    cpu_library.call(
        "lstm_dual",
        x.dtype,
        _dual_arguments(
            *(T, B, I, H, H, D, 0, False),
            *(*cpu_grid.grid(T, B, N * 4 * H * products, H, D), lengths),
            *(0, 0, 0, x.data_ptr() or none_of(x), h0.data_ptr() or none_of(h0)),
            c0.data_ptr() or none_of(c0),
            *(t.data_ptr() for t in out[:3]),
            *(0, out[3].data_ptr() if return_cells else 0, 0),
            *(0 if block is None else block.data_ptr(), *pointers),
            *addresses((tx, th0, tc0)),
            *(t.data_ptr() for t in tout[:3]),
            tout[3].data_ptr() if return_cells else 0,
            *tpointers,
        ),
    )
    packed.give_back(key, block)
    return out, tout


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
    """`torch_manual::lstm_backward` on CPU tensors."""
    dtype = gates.dtype
    if dtype in HALF:
        single = [
            None if t is None else t.float()
            for t in (dy, dh_n, dc_n, dcells, c0, gates, cells, *weights)
        ]
        dy, dh_n, dc_n, dcells, c0, gates, cells, *weights = single  # type: ignore[assignment]
        results = lstm_backward(
            dy, dh_n, dc_n, dcells, c0, batch_sizes, weights, gates, cells, reverse
        )
        return tuple(t.to(dtype) for t in results)  # type: ignore[return-value]
    gates, cells, c0 = gates.contiguous(), cells.contiguous(), c0.contiguous()
    dh_n, dc_n, dcells = (None if t is None else t.contiguous() for t in (dh_n, dc_n, dcells))
    weights, pointers, full = in_c_order(weights)
    weight_hh, projected = weights[1], weights[4] is not None
    assert weight_hh is not None
    (D, N, _), (_, B, H), P = gates.shape, c0.shape, weight_hh.shape[1]
    dpre = memory.empty(gates, *gates.shape)
    dh = memory.empty(gates, D, N, P) if projected else gates.new_empty(D, 0)
    dh0, dc0 = gates.new_empty(D, B, P), torch.empty_like(c0)
    T, lengths = steps(N, B, batch_sizes)
    if T == 0:
        for out, given in ((dh0, dh_n), (dc0, dc_n)):
            out.zero_() if given is None else out.copy_(given)
        return dpre, dh, dh0, dc0
    dy, stride_dy = rows_of(dy)
    work = N * 4 * H * P
    threads_of = cpu_grid.thinned(cpu_grid.grid(T, B, work, H, D, backward=True))
    cpu_library.call(
        "lstm_backward",
        dtype,
        _backward_arguments(
            *(T, B, 0, H, P, D, full, reverse, *threads_of, lengths),
            *(*addresses((dy,)), stride_dy),
            *addresses((dh_n, dc_n, dcells, c0, gates, cells)),
            *(dpre.data_ptr(), dh.data_ptr(), dh0.data_ptr(), dc0.data_ptr()),
            *pointers,
        ),
    )
    return dpre, dh, dh0, dc0


def rows_of(dy: Tensor | None) -> tuple[Tensor | None, int]:
    """`dy` with dense rows, and the stride between them: 0 where one row stands for all."""
    if dy is None:
        return None, 0
    if dy.stride(0) == 0:  # as in the gradient of y.sum()
        return dy[:1].contiguous(), 0
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    return dy, dy.stride(0)


def steps(n_rows: int, batch: int, batch_sizes: Tensor | None) -> tuple[int, int]:
    """T, and the address of batch_sizes or 0."""
    if batch_sizes is None:
        return (n_rows // batch if batch else 0), 0
    check_batch_sizes(batch_sizes, n_rows, batch)
    return len(batch_sizes), batch_sizes.data_ptr()


def in_c_order(
    weights: Sequence[Tensor | None],
) -> tuple[Sequence[Tensor | None], tuple[int, ...], bool]:
    """The weights in C order, their addresses (of two directions), and if peepholes are full."""
    at = []
    for w in weights:
        if w is None:
            at.append(0)
        elif w.is_contiguous():
            at.append(w.data_ptr() or none_of(w))
        else:
            return in_c_order([None if w is None else w.contiguous() for w in weights])
    pointers = tuple(at)
    full = pointers[5:_WEIGHTS] != _NONE[5:] and _is_full(weights[5:_WEIGHTS])
    return weights, pointers if len(pointers) > _WEIGHTS else pointers + _NONE, full


def addresses(tensors: Iterable[Tensor | None]) -> tuple[int, ...]:
    """Those of tensors; 0 for None, and for one of no numbers."""
    return tuple([0 if t is None else t.data_ptr() or none_of(t) for t in tensors])


def none_of(t: Tensor) -> int:
    """The address of a tensor that has none: of no numbers, or freed."""
    if t.numel() == 0:
        return 0
    if t._is_zerotensor():
        raise RuntimeError(f"lstm: a tensor of shape {tuple(t.shape)} is a ZeroTensor: clone it")
    raise RuntimeError(
        f"lstm: a tensor of shape {tuple(t.shape)} has no memory: its storage was freed, as "
        "fully_shard does with weights after a module's forward or backward pass"
    )


def _is_full(peepholes: Sequence[Tensor | None]) -> bool:
    return any(w is not None and w.dim() == 2 for w in peepholes)
