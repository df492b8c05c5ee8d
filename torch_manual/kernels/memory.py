"""Large blocks of CPU memory that are used again.

malloc returns large blocks to the system as soon as they are freed, and the next call waits while
the system finds and zeroes fresh pages: up to a tenth of a training step, a third where that is one
step of time. So the blocks behind outputs, what a forward pass keeps, gradients and what a backward
pass computes on the way come back here when their tensor dies, and wait for the next call.

Torch cannot resize such a tensor (`resize_`); all else it does with it as with its own.
"""

from __future__ import annotations

import mmap
import sys
import weakref
from collections import OrderedDict
from contextlib import suppress

import torch
from torch import Tensor

SMALLEST = 1 << 20  # bytes
MOST_KEPT = 256 << 20  # bytes, of blocks not in use
_HUGE_PAGE = 2 << 20

_free: OrderedDict[int, mmap.mmap] = OrderedDict()  # by id, the one used last at the end
_lent: dict[int, tuple[weakref.ref, mmap.mmap]] = {}


def empty(like: Tensor, *shape: int) -> Tensor:
    """`like.new_empty(shape)`, in a block that is kept for the next call when the tensor dies."""
    n_bytes = like.element_size()
    for n in shape:
        n_bytes *= n
    if n_bytes < SMALLEST or not sys.platform.startswith("linux"):
        return like.new_empty(shape)
    block = _take(n_bytes) or _fresh(n_bytes)
    if block is None:
        return like.new_empty(shape)
    lent = memoryview(block)
    key = id(block)
    _lent[key] = weakref.ref(lent, lambda _: _give_back(key)), block
    flat = torch.frombuffer(lent, dtype=like.dtype, count=n_bytes // like.element_size())
    return flat.resize_(shape)  # no view: autograd would refuse some changes of one


def empty_like(t: Tensor) -> Tensor:
    """`torch.empty_like(t)`, of a tensor in C order, in such a block."""
    return torch.empty_like(t) if t.nbytes < SMALLEST else empty(t, *t.shape)


def drop_free() -> None:
    """Give the blocks that are not in use back to the system."""
    while _free:
        _drop_oldest()


def kept_bytes() -> int:
    """How much memory is kept for later calls and not in use."""
    return sum(len(block) for block in list(_free.values()))


def _take(n_bytes: int) -> mmap.mmap | None:
    """The smallest free block that fits and is not twice as large."""
    fitting = [block for block in list(_free.values()) if n_bytes <= len(block) < 2 * n_bytes]
    # Another thread may take the same one first: then it is gone from _free.
    return _free.pop(id(min(fitting, key=len)), None) if fitting else None


def _fresh(n_bytes: int) -> mmap.mmap | None:
    """A new block, or None if the system has no memory for it."""
    page = _HUGE_PAGE if n_bytes >= 4 * _HUGE_PAGE else mmap.PAGESIZE  # at most a quarter too much
    size = -(-n_bytes // page) * page
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        block = mmap.mmap(-1, size, flags=flags)
    except OSError:
        drop_free()
        return None
    if size >= _HUGE_PAGE:
        with suppress(OSError):  # a kernel without huge pages
            block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _give_back(key: int) -> None:
    _free[key] = _lent.pop(key)[1]
    while _free and kept_bytes() > MOST_KEPT:
        _drop_oldest()


def _drop_oldest() -> None:
    with suppress(KeyError):  # another thread was faster
        _free.popitem(last=False)
