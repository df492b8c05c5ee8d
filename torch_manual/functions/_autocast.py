"""Automatic mixed precision: the casts at a layer's door, and none behind it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_cast(*tensors: Tensor | None) -> tuple:
    """Cast as autocast does for the ops on its lower-precision list.

    Float64 and integer tensors stay as they are, and so does everything outside an autocast
    region. The casts are recorded, so the gradient of a float32 weight is float32.
    """
    if not torch._C._is_any_autocast_enabled():
        return tensors
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def autocast_factors(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor | None) -> tuple:
    """Cast as autocast does where stock computes op by op: in cells, packed and projected layers.

    On a GPU all is cast. On a CPU the products' factors are, and the states keep the precision in
    which they come.
    """
    if not c.is_cpu or c.dtype != torch.float32 or not torch.is_autocast_enabled("cpu"):
        return autocast_cast(x, h, c, *weights)
    factors = autocast_cast(x, h, *weights)
    x, h, *weights = (None if t is None else t.to(c.dtype) for t in factors)  # type: ignore[assignment]
    return x, h, c, *weights


def autocast_off(t: Tensor) -> AbstractContextManager:
    """A context without autocast, in which a hand-written formula computes as written."""
    if not torch._C._is_any_autocast_enabled():
        return nullcontext()
    device = t.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
