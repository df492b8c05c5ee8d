"""The rows of a run as CSV, Markdown and a plot, and what is asked of them."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from benchmarks import plot
from benchmarks.cases import Target
from benchmarks.table import markdown_table, write_atomically


@dataclass(frozen=True)
class Row:
    """One line of the report. A row whose result is wrong has no figures."""

    case: str
    pass_: str
    T: int
    B: int
    I: int
    H: int
    P: int
    dtype: str
    threads: int
    group: str
    status: str = ""  # "", "noisy" or "WRONG: …"
    stock_ms: float | None = None
    ours_ms: float | None = None
    ratio: float | None = None
    limit_share: float | None = None
    fma_peak_gflops: float | None = None
    stock_mib: float | None = None
    ours_mib: float | None = None
    rounds: int = 0
    rejected: int = 0
    ratio_kept: float | None = None  # where malloc keeps what is freed
    kept_status: str = ""

    @property
    def wrong(self) -> bool:
        return self.status.startswith("WRONG")

    @property
    def label(self) -> str:
        proj = "" if self.P == self.H else f" P{self.P}"
        return f"{self.case} · T{self.T} B{self.B} I{self.I} H{self.H}{proj}"


def write(
    out: Path,
    stem: str,
    rows: Sequence[Row],
    machine: Mapping[str, str],
    targets: Mapping[str, Target],
) -> None:
    """Write `stem`.csv, `stem`.md and `stem`.png into `out`."""
    write_csv(out / f"{stem}.csv", rows)
    markdown = to_markdown(rows, machine, targets)
    write_atomically(out / f"{stem}.md", lambda path: path.write_text(markdown))
    write_atomically(out / f"{stem}.png", lambda path: plot.save(path, rows, machine))


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(field.name.rstrip("_") for field in fields(Row))
    table.writerows(map(_plain, astuple(row)) for row in rows)
    write_atomically(path, lambda unfinished: unfinished.write_text(text.getvalue()))


def _plain(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else value


VERDICT_HEAD = (
    *("group", "rows", "minimum", "target", "geometric mean", "target", ""),
    *("minimum, memory kept", "geometric mean, memory kept"),
)


@dataclass(frozen=True)
class Verdict:
    group: str
    rows: int
    noisy: int
    minimum: float
    mean: float
    target: Target
    minimum_kept: float | None
    mean_kept: float | None

    @property
    def outcome(self) -> str:
        """Noise proves nothing: a group with a noisy row neither meets nor misses its target."""
        if self.noisy:
            return f"unknown: {self.noisy} noisy"
        met = self.minimum >= self.target.minimum and self.mean >= (self.target.mean or 0.0)
        return "met" if met else "missed"

    @property
    def cells(self) -> tuple[str, ...]:
        """Return the verdict as a line of a table, under `VERDICT_HEAD`."""
        return (
            self.group,
            str(self.rows),
            f"{self.minimum:.2f}",
            f"{self.target.minimum:.2f}",
            f"{self.mean:.2f}",
            _number(self.target.mean, ".2f"),
            self.outcome,
            _number(self.minimum_kept, ".2f"),
            _number(self.mean_kept, ".2f"),
        )


def verdicts(rows: Sequence[Row], targets: Mapping[str, Target]) -> list[Verdict]:
    """Return how each group fares, on the most threads that were timed.

    A wrong row counts as a ratio of 0, since it has no time.
    """
    threads = max(row.threads for row in rows)
    found = []
    for group, target in targets.items():
        members = [row for row in rows if row.group == group and row.threads == threads]
        ratios = [row.ratio or 0.0 for row in members]
        if ratios:
            noisy = sum(row.status == "noisy" for row in members)
            kept = [row.ratio_kept for row in members if row.ratio_kept is not None]
            found.append(
                Verdict(
                    *(group, len(ratios), noisy, min(ratios), _mean(ratios), target),
                    min(kept, default=None),
                    _mean(kept) if kept else None,
                )
            )
    return found


def _mean(ratios: Sequence[float]) -> float:
    return statistics.geometric_mean(ratios) if min(ratios) > 0 else 0.0


EXPLANATION = (
    "Ratio is stock's time over ours: above 1 we are faster, **bold ▼** we are slower. Each side "
    "runs in a process of its own, in turns. The ratio with memory kept is measured where malloc "
    "is told to keep what is freed; by default it returns large blocks to the system, and a step "
    "that allocates as much again waits for new pages. "
    "In rows named “vs ours” our plain LSTM takes stock's place. The GEMM limit is the time the "
    "matrix products alone would take at the FMA peak, measured beside each row in registers. "
    "MiB: the peak of one call beyond weights and inputs."
)


def to_markdown(
    rows: Sequence[Row], machine: Mapping[str, str], targets: Mapping[str, Target]
) -> str:
    threads = max(row.threads for row in rows)
    blocks = [
        "# Ours against stock",
        "\n".join(f"- {name}: {value}" for name, value in machine.items()),
        EXPLANATION,
        f"## Targets, {threads} thread{'s' * (threads > 1)}",
        markdown_table(VERDICT_HEAD, [verdict.cells for verdict in verdicts(rows, targets)]),
        *_limit_line(rows, threads),
        "## Rows",
        _row_table(rows),
    ]
    return "\n\n".join(blocks) + "\n"


def _limit_line(rows: Sequence[Row], threads: int) -> list[str]:
    shares = [
        row.limit_share
        for row in rows
        if row.pass_ == "training" and row.H >= 256 and row.T > 1 and row.threads == threads
        if row.dtype == "float32" and row.limit_share is not None
    ]
    if not shares:
        return []
    return [
        f"Share of the GEMM limit in float32 training at H ≥ 256: {min(shares):.2f} to "
        f"{max(shares):.2f} (aim: 0.80)."
    ]


def _row_table(rows: Sequence[Row]) -> str:
    head = (
        *("case", "pass", "T", "B", "I", "H", "P", "dtype", "threads", "stock ms", "ours ms"),
        *(
            "ratio",
            "ratio, memory kept",
            "share of GEMM limit",
            "FMA peak GFLOP/s",
            "stock MiB",
            "ours MiB",
        ),
    )
    body = [
        (
            *(row.case, row.pass_, *map(str, (row.T, row.B, row.I, row.H, row.P))),
            *(row.dtype, str(row.threads)),
            _number(row.stock_ms, ".3g"),
            _number(row.ours_ms, ".3g"),
            _ratio(row.ratio, row.status),
            _ratio(row.ratio_kept, row.kept_status),
            _number(row.limit_share, ".2f"),
            _number(row.fma_peak_gflops, ".0f"),
            _number(row.stock_mib, ".1f"),
            _number(row.ours_mib, ".1f"),
        )
        for row in rows
    ]
    return markdown_table(head, body)


def _ratio(ratio: float | None, status: str) -> str:
    if ratio is None:
        return f"**{status}**" if status else "—"
    shown = f"**{ratio:.2f} ▼**" if ratio < 1 else f"{ratio:.2f}"
    return f"{shown} (noisy)" if status == "noisy" else shown


def _number(value: float | None, spec: str) -> str:
    return "—" if value is None else format(value, spec)
