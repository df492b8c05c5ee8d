"""What `autograd.Function`s share: positional arguments, one node in a compiled graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn import Parameter


class PositionalFunction(torch.autograd.Function):
    """An `autograd.Function` whose `apply` takes positional arguments, all of them.

    Binding arguments to a signature takes a tenth of the time of training a small layer for one
    step.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active() or _any_wrapped(args):
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


def _any_wrapped(arguments: tuple[Any, ...]) -> bool:
    """Whether any comes from a transform; after that is over, `Function.apply` unwraps it."""
    for t in arguments:
        if t is None or type(t) is Parameter:
            continue
        if isinstance(t, Tensor) and is_functorch_wrapped_tensor(t):
            return True
    return False


def keep_signature(forward: Callable) -> Callable:
    """Decorate a `forward` so that `inspect.signature` need not derive it again."""
    kept: Any = forward
    kept.__signature__ = inspect.signature(forward)
    return forward


def one_node(function: Callable) -> Callable:
    """Decorate `function`, of tensors, so that torch.compile's graphs hold a call of it as it is.

    Dynamo would trace an `autograd.Function` line by line: it then refuses jvp and vmap and guards
    whatever the lines look at, at every call. `torch.compiler.allow_in_graph` ends that, but
    imports all of Dynamo, so that it waits until Dynamo traces a call.
    """

    def allow() -> None:
        torch.compiler.allow_in_graph(function)

    allow._dynamo_marked_constant = True  # type: ignore[attr-defined]  # run when traced

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            allow()
        return function(*args)

    return call
