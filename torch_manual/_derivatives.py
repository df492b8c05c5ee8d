"""The two derivatives that `gradcheck` compares, of a module or function made ready for float64.

Every floating-point output y_j gets a random cotangent v_j; J = Σ_j ⟨y_j, v_j⟩ is the scalar both
sides differentiate. `analytic` is what backward returns, `numeric` the central difference
(J(x + eps) − J(x − eps)) / 2 eps, one element of x at a time.

D draws of cotangents, N output elements, K elements of x
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Problem:
    """A function to differentiate: its name, its float64 leaves, and how to run it."""

    subject: str
    fn: Callable[..., Any]
    leaves: tuple[tuple[str, Tensor], ...]
    evaluate: Callable[[], list[Tensor]]

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        return self.fn.named_modules() if isinstance(self.fn, nn.Module) else iter(())


Draw = dict[int, Tensor]  # the cotangents of one draw, by the number of the output


def prepare(fn: Callable[..., Any], inputs: Any, seed: int) -> Problem:
    """Copy modules and tensors to float64 and name every tensor that has a gradient."""
    subject = getattr(fn, "__name__", type(fn).__name__)
    parameters: list[tuple[str, Tensor]] = []
    signature_of: Callable[..., Any] = fn
    if isinstance(fn, nn.Module):
        fn = copy.deepcopy(fn).double()
        parameters = [(name, p) for name, p in fn.named_parameters() if p.requires_grad]
        signature_of = fn.forward
    if isinstance(inputs, Tensor | PackedSequence):
        inputs = (inputs,)
    if not isinstance(inputs, tuple | list):
        raise TypeError(
            "gradcheck: inputs must be a tensor, a PackedSequence or a tuple of arguments, "
            f"got {type(inputs).__name__}"
        )

    arguments = [pytree.tree_map(_float64_copy, argument) for argument in inputs]
    leaves = [
        (name + pytree.keystr(path), value)
        for name, argument in zip(
            _argument_names(signature_of, len(inputs)), arguments, strict=True
        )
        for path, value in pytree.tree_flatten_with_path(argument)[0]
        if isinstance(value, Tensor) and value.requires_grad
    ]
    leaves += parameters
    for name, leaf in leaves:
        if leaf.is_complex():
            raise TypeError(f"gradcheck: {name} must be real, got {leaf.dtype}")
    if not leaves:
        raise ValueError(
            f"gradcheck: {subject} must have a floating-point input or a parameter that requires "
            "grad, got neither"
        )
    cuda = sorted({leaf.device.index for _, leaf in leaves if leaf.is_cuda})

    def evaluate() -> list[Tensor]:
        with torch.random.fork_rng(devices=cuda):
            for generator in (torch.default_generator, *map(_cuda_generator, cuda)):
                generator.manual_seed(seed)
            result = fn(*arguments)
        tensors = [value for value in pytree.tree_leaves(result) if isinstance(value, Tensor)]
        if any(value.is_complex() for value in tensors):
            raise TypeError(f"gradcheck: the outputs of {subject} must be real, got complex ones")
        return [value for value in tensors if value.is_floating_point()]

    return Problem(subject, fn, tuple(leaves), evaluate)


def _cuda_generator(index: int) -> torch.Generator:
    return torch.cuda.default_generators[index]


def _float64_copy(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if not (value.is_floating_point() or value.is_complex()):
        return value.detach().clone()
    wide = torch.complex128 if value.is_complex() else torch.float64
    return value.detach().to(wide, copy=True).requires_grad_()


def _argument_names(fn: Callable[..., Any], count: int) -> list[str]:
    """The names of the first `count` positional arguments; inputs[k] where they have none."""
    try:
        declared = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        declared = []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [parameter.name for parameter in declared if parameter.kind in positional]
    return [names[k] if k < len(names) else f"inputs[{k}]" for k in range(count)]


def outputs_of(problem: Problem, eps: float) -> list[Tensor]:
    """The outputs, once it is sure that they are float64, reproducible and not rounded."""
    subject = problem.subject
    try:
        recorded = problem.evaluate()
    except RuntimeError as error:
        raise ValueError(
            f"gradcheck: {subject} must run on these inputs in float64; it raised: {error}"
        ) from error
    if not recorded:
        raise ValueError(f"gradcheck: {subject} must return a floating-point tensor, got none")
    for y in recorded:
        if y.dtype != torch.float64:
            raise ValueError(f"gradcheck: {subject} must compute in float64, got {y.dtype}")
    with torch.no_grad():
        again = problem.evaluate()
        base, repeated = _flat(recorded), _flat(again)
        if base.shape != repeated.shape or not torch.allclose(
            base, repeated, rtol=1e-13, atol=1e-13, equal_nan=True
        ):
            raise ValueError(
                f"gradcheck: {subject} must be deterministic; two evaluations from the same state "
                "of the generators, one recording gradients and one under no_grad, differ"
            )
        moved = _flat(_nearby(problem, eps))
    moved = moved[moved != base]
    if moved.numel() and torch.equal(moved, moved.float().double()):
        raise ValueError(f"gradcheck: {subject} must compute in float64, its results are float32")
    return [y.detach() for y in recorded]


def _nearby(problem: Problem, eps: float) -> list[Tensor]:
    """The outputs with every leaf moved by about eps."""
    generator = torch.Generator().manual_seed(0)
    before = [x.detach().clone() for _, x in problem.leaves]
    for _, x in problem.leaves:
        x += eps * torch.randn(x.shape, dtype=x.dtype, generator=generator).to(x.device)
    moved = problem.evaluate()
    for (_, x), value in zip(problem.leaves, before, strict=True):
        x.copy_(value)
    return moved


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


def draw_cotangents(outputs: list[Tensor], seed: int) -> list[Draw]:
    """Two draws for all outputs together, then one for each output alone."""
    generator = torch.Generator().manual_seed(seed)
    every = range(len(outputs))
    chosen = [every, every, *([k] for k in every if len(outputs) > 1)]
    return [
        {
            k: torch.randn(outputs[k].shape, dtype=torch.float64, generator=generator).to(
                outputs[k].device
            )
            for k in draw
        }
        for draw in chosen
    ]


def analytic(problem: Problem, draws: list[Draw]) -> tuple[list[Tensor], list[str]]:
    """Per leaf: the gradients in every draw (D, *shape), and what backward raised, if anything.

    Where the backward pass of all leaves raises, each is tried alone, to find the guilty ones.
    """
    leaves = [x for _, x in problem.leaves]
    try:
        return _backward(problem, draws, leaves), [""] * len(leaves)
    except Exception as error:
        together = _first_line(error)
    gradients, failures = [], []
    for x in leaves:
        for other in leaves:
            other.requires_grad_(other is x)
        try:
            gradients += _backward(problem, draws, [x])
            failures.append("")
        except Exception as error:
            gradients.append(x.new_zeros(len(draws), *x.shape))
            failures.append(_first_line(error))
    for x in leaves:
        x.requires_grad_()
    return gradients, failures if any(failures) else [together] * len(leaves)


def _first_line(error: Exception) -> str:
    return f"backward raised {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _backward(problem: Problem, draws: list[Draw], leaves: list[Tensor]) -> list[Tensor]:
    per_draw = []
    for draw in draws:
        outputs = problem.evaluate()
        reached = [k for k in draw if outputs[k].requires_grad]
        gradients: Sequence[Tensor | None] = [None] * len(leaves)
        if reached:
            gradients = torch.autograd.grad(
                [outputs[k] for k in reached],
                leaves,
                [draw[k] for k in reached],
                allow_unused=True,
            )
        per_draw.append(
            [
                torch.zeros_like(x) if g is None else g.to_dense()
                for x, g in zip(leaves, gradients, strict=True)
            ]
        )
    return [torch.stack(of_leaf) for of_leaf in zip(*per_draw, strict=True)]


@torch.no_grad()
def numeric(
    problem: Problem, x: Tensor, at: list[int], outputs: list[Tensor], draws: list[Draw], eps: float
) -> Tensor:
    """The central differences (D, K) for the elements of `x` with the flat indices `at`."""
    v = torch.stack(
        [_flat([draw.get(k, torch.zeros_like(y)) for k, y in enumerate(outputs)]) for draw in draws]
    )
    columns = []
    for k in at:
        index = np.unravel_index(k, x.shape)
        value = x[index].item()
        step = eps * max(1.0, abs(value))  # a step that rounding leaves something of
        x[index] = value + step
        above, y_above = x[index].item(), _flat(problem.evaluate())
        x[index] = value - step
        below, y_below = x[index].item(), _flat(problem.evaluate())
        x[index] = value
        columns.append(v @ ((y_above - y_below) / (above - below)))
    return torch.stack(columns, dim=1)
