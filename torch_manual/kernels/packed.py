"""Packed weights that wait for the next inference call.

The compiled CPU kernel packs the weights of a layer before its first step, which of a call of few
rows can be a third. A block keeps them, and beside every panel a digest of the numbers it was
packed from (csrc/digest.h). The next call of the same weights takes the digest of these as they are
then, for a quarter or less of the cost, and packs the panels whose digest has changed. So no call
sees stale numbers, whoever wrote to a weight and however.

A block is one call's at a time: of calls side by side each has its own.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor
from torch.nn import Parameter

from torch_manual.kernels import cpu_library, memory

SMALLEST = 1 << 18  # bytes of weights: below, packing takes little longer than a digest
MOST_KEPT = 256 << 20  # bytes of blocks that are not in use
_MOST_LANES = 16  # of a panel
_free: OrderedDict[tuple, list[Tensor]] = OrderedDict()  # the key used last at the end


def key_of(
    sizes: tuple[int, ...], weights: Sequence[Tensor | None], addresses: tuple[int, ...]
) -> tuple | None:
    """By what the packed weights are found again, or None if they are not to be kept.

    Only parameters': another tensor may be made for one call, at another address every time.

    Args:
        sizes: I, H, P and D.
        weights: as the ops of kernels/lstm.py take them.
        addresses: theirs, of two directions.
    """
    I, H, P, D = sizes
    assert weights[0] is not None
    dtype = weights[0].dtype
    if not SMALLEST <= D * 4 * H * (I + P) * dtype.itemsize <= MOST_KEPT // 2:
        return None
    if not all(type(w) is Parameter for w in (*weights[:2], *weights[8:10])):
        return None
    return dtype, sizes, addresses, cpu_library.chosen.instruction_set


def take(key: tuple | None) -> Tensor | None:
    """A block for the packed weights, in which they may be from an earlier call."""
    if key is None:
        return None
    with suppress(KeyError, IndexError):  # no call before, or all are in use
        return _free[key].pop()
    dtype, (I, H, P, D), *_ = key
    units = -(-H // _MOST_LANES) * _MOST_LANES  # of the panels, whatever their width
    n_bytes = D * units * (4 * (I + P) * dtype.itemsize + 2 * 8)
    block = memory.empty(torch.empty(0, dtype=torch.uint8, device="cpu"), n_bytes)
    ctypes.memset(block.data_ptr(), 0, n_bytes)  # zero_() would wait for threads in a forked child
    return block


def give_back(key: tuple | None, block: Tensor | None) -> None:
    """Keep what `take` returned for the next call."""
    if key is None or block is None:
        return
    _free.setdefault(key, []).append(block)
    with suppress(KeyError):  # another thread has dropped it meanwhile
        _free.move_to_end(key)
        while kept_bytes() > MOST_KEPT:
            _free.popitem(last=False)


def kept_bytes() -> int:
    """How much memory is kept for later calls and not in use."""
    return sum(block.nbytes for blocks in list(_free.values()) for block in blocks)


def empty_cache() -> None:
    """Give back to the system the CPU memory that layers keep for later calls.

    It is at most 256 MiB each of packed weights, of blocks for outputs and gradients, and of what a
    call computes with.
    """
    _free.clear()
    memory.drop_free()
    cpu_library.drop_workspace()
