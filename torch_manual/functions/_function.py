"""`autograd.Function` without what its `apply` does for keyword arguments at every call.

Binding arguments to a signature takes a tenth of the time of training a small layer for one step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch._C._functorch import is_functorch_wrapped_tensor


class PositionalFunction(torch.autograd.Function):
    """An `autograd.Function` whose `apply` takes positional arguments, all of them."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active() or any(map(_is_wrapped, args)):
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


def _is_wrapped(argument: Any) -> bool:
    """Whether it comes from a transform; after that is over, `Function.apply` unwraps it."""
    return isinstance(argument, torch.Tensor) and is_functorch_wrapped_tensor(argument)


def keep_signature(forward: Callable) -> Callable:
    """Decorate a `forward` so that `inspect.signature` need not derive it again."""
    kept: Any = forward
    kept.__signature__ = inspect.signature(forward)
    return forward
