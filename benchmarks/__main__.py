"""Time our layers against torch.nn's on the CPU: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import report
from benchmarks.cases import CASES, PASSES, TARGETS, Case, Pass, group, quick
from benchmarks.check import Workload
from benchmarks.machine import describe, fma_peak
from benchmarks.measure import Timing, interleaved, summarize
from benchmarks.memory import peak_mib
from benchmarks.report import Row
from benchmarks.table import PARTIAL_RESULTS, RESULTS
from benchmarks.worker import malloc_can_keep_memory, run_block, worker


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    cases = quick(CASES) if options.quick else list(CASES)
    selected = [
        (case, passes)
        for case in cases
        if (passes := [p for p in PASSES if options.filter.lower() in f"{case.label} {p}".lower()])
    ]
    if not selected:
        print(f"benchmarks: no case matches --filter {options.filter!r}", file=sys.stderr)
        return 2
    rows: list[Row] = []
    total = len(options.threads) * sum(len(passes) for _, passes in selected)
    # Without auto_refresh, whose thread would run beside what is timed.
    with Progress(auto_refresh=False) as progress:
        task = progress.add_task("", total=total)
        for case, passes in selected:
            progress.update(task, description=case.label, refresh=True)
            for row in rows_of(case, passes, options.threads, options.seconds):
                rows.append(row)
                progress.console.print(one_line(row), highlight=False, soft_wrap=True)
                progress.update(task, advance=1, refresh=True)
    machine = describe() | {"threads": ", ".join(map(str, options.threads))}
    report.write(options.out, "cpu", rows, machine, TARGETS)
    Console().print(verdict_table(report.verdicts(rows, TARGETS)))
    print(f"written: {options.out}/cpu.csv, cpu.md, cpu.png")
    return 1 if any(row.wrong for row in rows) else 0


def one_line(row: Row) -> str:
    name = f"{row.label} {row.pass_}, {row.threads} threads:"
    if row.ratio is None:
        return f"{name} [red]{row.status}[/]"
    colour = "red" if row.ratio < 1 else "green"
    return f"{name} {row.ours_ms:.3g} ms [{colour}]{row.ratio:.2f} ×[/] {row.status}"


def verdict_table(found: Sequence[report.Verdict]) -> Table:
    table = Table(*report.VERDICT_HEAD)
    for verdict in found:
        table.add_row(*verdict.cells, style="green" if verdict.outcome == "met" else "red")
    return table


def rows_of(
    case: Case, passes: Sequence[Pass], threads: Sequence[int], seconds: float
) -> Iterator[Row]:
    workload = Workload(case)
    for count in threads:
        torch.set_num_threads(count)
        for pass_ in passes:
            yield measure(workload, pass_, count, seconds)


def measure(workload: Workload, pass_: Pass, threads: int, seconds: float) -> Row:
    """Check a case and, if ours is right, time and weigh it."""
    case = workload.case
    row = Row(
        case.kind,
        pass_,
        *(case.T, case.B, case.I, case.H, case.P),
        case.dtype,
        threads,
        group(case, pass_),
    )
    if wrong := workload.disagreement(pass_):
        return replace(row, status=f"WRONG: {wrong}")
    timing, peak = timed(case, pass_, threads, seconds, keep_memory=False)
    row = replace(
        row,
        status="noisy" if timing.noisy else "",
        stock_ms=timing.stock_ms,
        ours_ms=timing.ours_ms,
        ratio=timing.ratio,
        limit_share=peak and 1e3 * case.flops(pass_) / peak / timing.ours_ms,
        fma_peak_gflops=peak and peak / 1e9,
        stock_mib=peak_mib(case, "stock", pass_, threads),
        ours_mib=peak_mib(case, "ours", pass_, threads),
        rounds=timing.rounds,
        rejected=timing.rejected,
    )
    if malloc_can_keep_memory():
        kept, _ = timed(case, pass_, threads, seconds, keep_memory=True)
        row = replace(row, ratio_kept=kept.ratio, kept_status="noisy" if kept.noisy else "")
    return row


def timed(
    case: Case, pass_: Pass, threads: int, seconds: float, keep_memory: bool
) -> tuple[Timing, float | None]:
    """Time both sides, each in a process of its own; return the FMA peak beside it, too."""
    with (
        worker(case, "stock", pass_, threads, keep_memory) as stock,
        worker(case, "ours", pass_, threads, keep_memory) as ours,
    ):
        peak = ours.submit(fma_peak, getattr(torch, case.dtype)).result()
        rounds = interleaved(
            lambda: stock.submit(run_block).result(),
            lambda: ours.submit(run_block).result(),
            seconds,
        )
    return summarize(rounds), peak


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description="Time torch_manual's layers against torch.nn's, in turns, on the CPU.",
    )
    parser.add_argument("--quick", action="store_true", help="a few cases, under a minute")
    parser.add_argument("--filter", default="", metavar="TEXT", help="cases whose name holds TEXT")
    parser.add_argument("--seconds", type=float, metavar="S", help="of clean rounds, per row")
    parser.add_argument("--threads", type=thread_counts, default=[1, 2], metavar="N,N")
    parser.add_argument(
        "--out",
        type=Path,
        help=f"folder; benchmarks/results, or {PARTIAL_RESULTS} with --quick or --filter",
    )
    options = parser.parse_args(arguments)
    options.seconds = options.seconds or (0.5 if options.quick else 1.5)
    options.out = options.out or (PARTIAL_RESULTS if options.quick or options.filter else RESULTS)
    return options


def thread_counts(text: str) -> list[int]:
    counts = [int(count) for count in text.split(",")]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError("threads must be 1 or more")
    return counts


if __name__ == "__main__":
    sys.exit(main())
