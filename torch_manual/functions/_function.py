"""What `autograd.Function`s share: positional arguments, one node in a compiled graph."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.nn import Parameter


class PositionalFunction(torch.autograd.Function):
    """An `autograd.Function` whose `apply` takes positional arguments, all of them.

    Binding arguments to a signature takes a tenth of the time of training a small layer for one
    step. Under autograd's own vmap (`is_grads_batched`, `vectorize`), which would lose the graph of
    an `autograd.Function` without a word, one sample goes through it after the other.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        for t in args:
            if t is None or type(t) is Parameter or not isinstance(t, Tensor):
                continue
            if is_functorch_wrapped_tensor(t):  # its transform is over: `Function.apply` unwraps it
                return super().apply(*args)
            if is_legacy_batchedtensor(t):
                return _sample_by_sample(cls.apply, args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


def refuse_complex(name: str, *tensors: Tensor | None) -> None:
    """Raise for complex tensors, since the derivations are of real ones, and for what is none."""
    for t in tensors:
        if t is not None and not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
        if t is not None and t.dtype.is_complex:
            raise TypeError(f"{name}: tensors must be real, got {t.dtype}")


def is_wrapped(t: Tensor | None) -> bool:
    """Whether it comes from a transform, be it over, or from autograd's own vmap."""
    return t is not None and (is_functorch_wrapped_tensor(t) or is_legacy_batchedtensor(t))


def _sample_by_sample(function: Callable, args: Sequence[Any]) -> tuple[Tensor | None, ...]:
    """`function` of every sample of `args` that autograd's own vmap has batched."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    if level != 1:
        raise RuntimeError(
            "lstm: batched gradients within batched gradients (is_grads_batched, vectorize=True) "
            "are not supported; torch.func.vmap nests"
        )
    samples = [
        torch._remove_batch_dim(a, level, 1, 0).unbind()
        if isinstance(a, Tensor) and is_legacy_batchedtensor(a)
        else itertools.repeat(a)
        for a in args
    ]
    each = zip(*(function(*sample) for sample in zip(*samples, strict=False)), strict=True)
    return tuple(
        None if ts[0] is None else torch._add_batch_dim(torch.stack(ts), 0, level) for ts in each
    )


def wanted_by_engine(ctx: Any, are_tensors: Sequence[bool]) -> list[bool]:
    """`ctx.needs_input_grad` without what the backward pass at work was not asked for.

    Args:
        are_tensors: which of the inputs of `forward` are.
    """
    if in_compiled_autograd():
        return list(ctx.needs_input_grad)
    nodes = iter(ctx.next_functions)  # of the tensors
    each = [next(nodes)[0] if is_tensor else None for is_tensor in are_tensors]
    return [node is not None and _will_run(node) for node in each]


def _will_run(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # it says so of a leaf whose gradient is asked for
        return True


def in_compiled_autograd() -> bool:
    module = sys.modules.get("torch._dynamo.compiled_autograd")  # who uses it has imported it
    return module is not None and module.in_compiled_autograd_region


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
