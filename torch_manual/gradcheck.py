"""Numerical gradient checking with a report that says which gate is wrong, and how.

D draws of cotangents, K checked elements (the derivatives themselves: _derivatives.py)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, nan
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torch_manual._derivatives import (
    Problem,
    analytic,
    draw_cotangents,
    numeric,
    outputs_of,
    prepare,
)
from torch_manual._table import render

_GATES = {4: ("i", "f", "g", "o"), 3: ("r", "z", "n")}
_GATED = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@dataclass(frozen=True)
class GradcheckRow:
    """The check of one tensor, or of one gate's rows of it.

    `max_abs` is the largest |analytic − numeric|, `max_rel` the same over the largest |numeric|;
    `reason` guesses what is wrong and is empty when `ok`.
    """

    tensor: str
    gate: str
    shape: tuple[int, ...]
    checked: int
    elements: int
    max_abs: float
    max_rel: float
    ok: bool
    reason: str

    @property
    def name(self) -> str:
        return f"{self.tensor}[{self.gate}]" if self.gate else self.tensor


@dataclass(frozen=True)
class GradcheckReport:
    """What `gradcheck` found: true when every row passed, printed as a table."""

    subject: str
    rule: str
    rows: tuple[GradcheckRow, ...]

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    @property
    def diagnosis(self) -> tuple[str, ...]:
        """One line per tensor and kind of mistake; empty when everything passed."""
        wrong: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if not row.ok:
                wrong.setdefault((row.tensor, row.reason), []).append(row.gate)
        return tuple(
            f"{tensor}: {_part(gates)} wrong ({reason})"
            for (tensor, reason), gates in wrong.items()
        )

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        table = render(
            f"gradcheck of {self.subject}",
            ("gradient of", "shape", "checked", "max abs error", "max rel error", "result"),
            [
                (
                    row.name,
                    "×".join(map(str, row.shape)) or "scalar",
                    f"{row.checked} of {row.elements}",
                    f"{row.max_abs:.1e}",
                    f"{row.max_rel:.1e}",
                    "pass" if row.ok else "FAIL",
                )
                for row in self.rows
            ],
        )
        passed = sum(row.ok for row in self.rows)
        checked = sum(row.checked for row in self.rows)
        elements = sum(row.elements for row in self.rows)
        total = f"{passed} of {len(self.rows)} rows pass, {checked} of {elements} elements checked"
        return "\n".join([table, total, self.rule, *self.diagnosis])


def _part(gates: list[str]) -> str:
    if gates == [""]:
        return "the gradient is"
    return f"the rows of gate{'s' if len(gates) > 1 else ''} {', '.join(gates)} are"


@torch.inference_mode(False)
@torch.enable_grad()
def gradcheck(
    fn: nn.Module | Callable[..., Any],
    inputs: Any,
    *,
    eps: float = 1e-6,
    atol: float = 1e-8,
    rtol: float = 1e-6,
    samples: int | None = 64,
    gates: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
) -> GradcheckReport:
    """Compare the gradients of a module or function with central differences, in float64.

    A row passes when max|analytic − numeric| ≤ atol + rtol · max|numeric|, the maxima taken over
    the row's checked elements and over several random cotangents of the outputs: two on all
    outputs together, and one on each output alone. Wrong gradients are reported, never raised.

    Args:
        fn: a module, of which a float64 copy is checked in its present train or eval mode (all
            parameters that require grad, and all floating-point inputs), or a function of tensors.
            The random number generators are put in the same state before every evaluation.
        inputs: the argument, or a tuple of the arguments: tensors, PackedSequences, nested tuples.
            Floating-point tensors are copied to float64, everything else is passed through.
        eps: half the step of the central difference; of a number above 1 so much of it.
        atol, rtol: the tolerances of the rule above. The defaults find a relative error of 1e-4 in
            gradients above 1e-4; right layers of ordinary size come out near 1e-9.
        samples: at most this many elements of each tensor, or of each gate's rows, are checked,
            chosen at random; None checks all. An element costs two evaluations of `fn`.
        gates: the gates stacked along the first dimension of a tensor, by the tensor's name in the
            report, e.g. {"weight": ("i", "f", "g", "o")}. Weights and biases of LSTMs (4 · hidden
            rows: i, f, g, o) and GRUs (3 · hidden rows: r, z, n) are recognised without.
        seed: of the cotangents, of the chosen elements and of the generators `fn` draws from.

    Raises:
        TypeError: an argument of the wrong type; complex tensors.
        ValueError: an option out of range; nothing to differentiate; a function that fails or does
            not compute in float64, or gives two different results for the same inputs.
    """
    if not callable(fn):
        raise TypeError(f"gradcheck: fn must be a module or a function, got {type(fn).__name__}")
    for name, option in (("eps", eps), ("atol", atol), ("rtol", rtol)):
        if not isinstance(option, (int, float)):
            raise TypeError(f"gradcheck: {name} must be a number, got {option!r}")
    if type(seed) is not int:
        raise TypeError(f"gradcheck: seed must be an int, got {seed!r}")
    if gates is not None and not isinstance(gates, Mapping):
        raise TypeError(f"gradcheck: gates must be a dict or None, got {gates!r}")
    if not eps > 0:
        raise ValueError(f"gradcheck: eps must be positive, got {eps}")
    if not (atol >= 0 and rtol >= 0):
        raise ValueError(f"gradcheck: atol and rtol must not be negative, got {atol} and {rtol}")
    if samples is not None and (type(samples) is not int or samples < 1):
        raise ValueError(f"gradcheck: samples must be None or an int of at least 1, got {samples}")

    problem = prepare(fn, inputs, seed)
    stacked = _gates_of(problem, gates or {})
    outputs = outputs_of(problem, eps)
    draws = draw_cotangents(outputs, seed)
    gradients, failures = analytic(problem, draws)
    pick = random.Random(seed)

    rows = []
    for (tensor, x), gradient, failure in zip(problem.leaves, gradients, failures, strict=True):
        names = stacked.get(tensor, ("",))
        size = x.numel() // len(names)
        stack = gradient.reshape(len(draws), len(names), size)
        for number, gate in enumerate(names):
            shape = (x.shape[0] // len(names), *x.shape[1:]) if gate else tuple(x.shape)
            row = GradcheckRow(tensor, gate, shape, 0, size, 0.0, 0.0, True, "")
            if failure:
                row = replace(row, max_abs=nan, max_rel=nan, ok=False, reason=failure)
            elif size:
                at = sorted(pick.sample(range(size), min(samples or size, size)))
                there = numeric(problem, x, [number * size + k for k in at], outputs, draws, eps)
                row = _compared(row, there, stack, names, at, atol, rtol)
            rows.append(row)
    rule = (
        f"pass: max|analytic − numeric| ≤ {atol:g} + {rtol:g} · max|numeric| "
        f"(float64, eps {eps:g}, {len(draws)} draws of cotangents)"
    )
    return GradcheckReport(problem.subject, rule, tuple(rows))


def _gates_of(problem: Problem, given: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """The gates stacked in each tensor: recognised by the owning module's hidden size, or given."""
    leaves = dict(problem.leaves)
    stacked: dict[str, tuple[str, ...]] = {}
    for prefix, module in problem.modules():
        hidden = getattr(module, "hidden_size", None)
        for name, x in module.named_parameters(recurse=False):
            if isinstance(hidden, int) and name.startswith(_GATED) and x.shape[0] % hidden == 0:
                stacked[f"{prefix}.{name}".lstrip(".")] = _GATES.get(x.shape[0] // hidden, ("",))
    for name, gates in given.items():
        if name not in leaves:
            raise ValueError(
                f"gradcheck: gates must name checked tensors ({', '.join(leaves)}), got {name}"
            )
        rows = leaves[name].shape[0] if leaves[name].dim() else 0
        if not gates or len(set(gates)) < len(gates) or not rows or rows % len(gates):
            raise ValueError(
                f"gradcheck: gates[{name!r}] must be different names that divide the {rows} rows "
                f"of {name}, got {tuple(gates)}"
            )
        stacked[name] = tuple(gates)
    return stacked


def _compared(
    row: GradcheckRow,
    there: Tensor,
    stack: Tensor,
    names: tuple[str, ...],
    at: list[int],
    atol: float,
    rtol: float,
) -> GradcheckRow:
    """The row with its verdict, from numeric (D, K) and all gates' analytic gradients (D, G, n)."""
    block = stack[:, names.index(row.gate)]
    error = (block[:, at] - there).abs()
    max_abs, scale = error.max().item(), there.abs().max().item()
    row = replace(
        row,
        checked=len(at),
        max_abs=max_abs,
        max_rel=max_abs / scale if scale else (inf if max_abs else 0.0),
        ok=max_abs <= atol + rtol * scale,
    )
    if row.ok:
        return row
    guesses = {"sign flipped?": -block[:, at]}
    if len(row.shape) == 2:
        rows, columns = row.shape
        transposed = block.reshape(-1, columns, rows).mT.reshape(block.shape)
        guesses["transposed?"] = transposed[:, at]
    for number, other in enumerate(names):
        if other != row.gate:
            guesses[f"it holds the gradient of gate {other}?"] = stack[:, number, at]
    return replace(row, reason=_reason(there, block[:, at], guesses, at, row.shape))


def _reason(
    there: Tensor, here: Tensor, guesses: dict[str, Tensor], at: list[int], shape: tuple[int, ...]
) -> str:
    """The guess that explains all but a thousandth of the error, or where the error is largest."""
    if not there.isfinite().all():
        return "the numeric derivative is not finite"
    if not here.isfinite().all():
        return "NaN or infinite"
    if not here.any():
        return "missing: all zeros"
    error = (here - there).abs()
    factor = ((there * here).sum() / (here * here).sum()).item()
    scaled = f"numeric = {factor:.6g} × analytic: a forgotten sum, mean or factor?"
    for reason, guess in (guesses | {scaled: factor * here}).items():
        if (guess - there).abs().max() <= 1e-3 * error.max():
            return reason
    draw, k = divmod(int(error.argmax()), error.shape[1])
    place = [int(i) for i in np.unravel_index(at[k], shape)]
    return f"largest error at {place}: analytic {here[draw, k]:.6g}, numeric {there[draw, k]:.6g}"
