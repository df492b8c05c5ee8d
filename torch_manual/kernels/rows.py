"""The flat batch: which rows of an (N, ·) tensor belong to which time step.

A dense (T, B, ·) batch is N = T·B rows. A PackedSequence is N = Σ batch_sizes rows, its sequences
sorted by falling length, so that the sequences alive at step t are always the first batch_sizes[t].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """Return the (N, ·) rows of a (T, B, ·) batch, or `x` if it is rows."""
    return x if x.dim() == 2 else x.flatten(0, 1)


def as_before(rows: Tensor, x: Tensor) -> Tensor:
    """Return what came of `as_rows(x)`, a row of each, as (T, B, ·) where `x` is."""
    return rows if rows.dim() == x.dim() else rows.view(*x.shape[:-1], rows.shape[-1])


def steps(n_rows: int, batch: int, batch_sizes: Tensor | None) -> list[slice]:
    """Return the rows of every time step, first to last."""
    if batch_sizes is None:
        return [slice(start, start + batch) for start in range(0, n_rows, batch or 1)]
    check_batch_sizes(batch_sizes, n_rows, batch)
    ends = batch_sizes.cumsum(0).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def n_steps(n_rows: int, batch: int, batch_sizes: Tensor | None) -> int:
    """T; traced, too."""
    return n_rows // max(batch, 1) if batch_sizes is None else batch_sizes.shape[0]


def check_batch_sizes(batch_sizes: Tensor, n_rows: int, batch: int) -> None:
    """Refuse what are not the sizes of a packed batch of so many rows and sequences.

    Raises:
        RuntimeError: they are not int64 in C order on the CPU, positive, falling from `batch` on,
            `n_rows` in all.
    """
    kind = batch_sizes.dtype, batch_sizes.dim(), batch_sizes.device.type
    if kind == (torch.int64, 1, "cpu") and batch_sizes.is_contiguous():
        sizes = batch_sizes.numpy()
        positive = len(sizes) == 0 or (sizes[0] == batch and sizes[-1] > 0)
        if positive and sizes.sum() == n_rows and (sizes[1:] <= sizes[:-1]).all():
            return
    raise RuntimeError(
        "lstm: batch_sizes must be int64 numbers in C order on the CPU, positive and falling, the "
        f"first {batch} (the sequences of h_0) and {n_rows} in all (the rows of the input), got "
        f"{batch_sizes}"
    )


class Run(NamedTuple):
    """Consecutive time steps, and their rows."""

    steps: slice
    rows: slice


def runs(whole: Run, sizes: list[int], min_steps: int, min_rows: int) -> list[Run]:
    """Cut `whole` into runs of at least so many steps and rows; what is left over joins the last.

    Args:
        whole: what to cut.
        sizes: how many sequences are alive at each of its steps.
    """
    cuts = []
    step, row = whole.steps.start, whole.rows.start
    first_step, first_row = step, row
    for size in sizes:
        step, row = step + 1, row + size
        if step - first_step >= min_steps and row - first_row >= min_rows:
            cuts.append(Run(slice(first_step, step), slice(first_row, row)))
            first_step, first_row = step, row
    start = cuts.pop() if cuts else whole
    cuts.append(
        Run(slice(start.steps.start, whole.steps.stop), slice(start.rows.start, whole.rows.stop))
    )
    return cuts


def previous(
    rows: Tensor, initial: Tensor, batch_sizes: Tensor | None, reverse: bool = False
) -> Tensor:
    """Return, beside every row, the row its recurrence came from: `rows` delayed by one step.

    Args:
        rows: (N, K), a state at every step.
        initial: (B, K), the state before the first step.
        batch_sizes: (T,) of a packed batch, or None for a dense one.
        reverse: the recurrence ran from the last step to the first.
    """
    batch = initial.shape[0]
    if batch_sizes is None:
        n_rows = rows.shape[0]  # not len(), which a traced length does not survive
        if n_rows == batch:
            return initial
        return torch.cat([rows[batch:], initial] if reverse else [initial, rows[: n_rows - batch]])
    return torch.cat([rows, initial]).index_select(
        0, _previous_index(rows.shape[0], batch_sizes, reverse).to(rows.device)
    )


def first(rows: Tensor, batch: int, batch_sizes: Tensor | None, reverse: bool = False) -> Tensor:
    """Return every sequence's first row in the order of the recurrence, (B, K)."""
    if not reverse:
        return rows[:batch]
    if batch_sizes is None:
        return rows[rows.shape[0] - batch :]
    sequence = torch.arange(batch)
    lengths = (batch_sizes > sequence.unsqueeze(1)).sum(1)
    starts = batch_sizes.cumsum(0) - batch_sizes
    return rows.index_select(0, (starts[lengths - 1] + sequence).to(rows.device))


def _previous_index(n_rows: int, batch_sizes: Tensor, reverse: bool) -> Tensor:
    """Index into [rows; initial] of every row's predecessor."""
    row = torch.arange(n_rows)
    size = batch_sizes.repeat_interleave(batch_sizes, output_size=n_rows)
    step = torch.arange(len(batch_sizes)).repeat_interleave(batch_sizes, output_size=n_rows)
    sequence = row - (batch_sizes.cumsum(0) - batch_sizes)[step]
    if reverse:
        after = torch.cat([batch_sizes[1:], batch_sizes.new_zeros(1)])[step]
        return torch.where(sequence < after, row + size, n_rows + sequence)
    before = torch.cat([batch_sizes.new_zeros(1), batch_sizes[:-1]])[step]
    return torch.where(step > 0, row - before, n_rows + sequence)
