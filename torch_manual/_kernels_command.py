"""`python -m torch_manual kernels`: compile the Triton kernels for chips that are not here."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from torch_manual._table import render
from torch_manual.kernels.triton_levels import CHIPS, Chip, Shape, programs

BATCH = 16
# multiprocessors apart: flop/s of half-precision products, bytes/s of memory (data sheets) and of
# the L2 cache (a guess)
SPEED = {
    "sm_80": (312e12, 2.0e12, 4.0e12),
    "sm_90": (989e12, 3.35e12, 5.5e12),
    "sm_100": (2250e12, 8.0e12, 10e12),
    "gfx942": (1307e12, 5.3e12, 10e12),
}
LATENCY = (8e-6, 0.8e-6, 2.5e-6, 2.0e-6)  # of a step: two launches, none, one in a graph, a barrier
COLUMNS: tuple[str, ...] = (
    "name",
    "target",
    "dtype",
    "precision",
    "block",
    "warps",
    "peepholes",
    "aligned",
    "form",
)
COLUMNS += ("registers", "spill_bytes", "shared_bytes", "HMMA", "LDSM", "BAR", "MUFU")
COLUMNS += ("H", "estimated_us")


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--target",
        default=",".join(CHIPS),
        metavar="CHIP,...",
        help=f"of {', '.join(CHIPS)} (default: all)",
    )
    command.add_argument("--json", action="store_true", help="a list of objects, not a table")
    command.add_argument("--name", default="", help="only kernels whose name contains this")
    command.add_argument("--dtype", default="", help="only this dtype, such as bf16")
    command.add_argument(
        "--jobs",
        type=positive,
        default=os.cpu_count() or 1,
        metavar="N",
        help="compilers at a time (default: all)",
    )
    command.set_defaults(run=kernels)


def positive(text: str) -> int:
    """An argument's number, at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def kernels(options: argparse.Namespace) -> int:
    """Compile every variant the chooser can pick; 0 all in budget, 1 not, 2 a wrong argument."""
    targets = options.target.split(",")
    if unknown := [name for name in targets if name not in CHIPS]:
        print(
            f"kernels: no chip {', '.join(unknown)}; there are {', '.join(CHIPS)}", file=sys.stderr
        )
        return 2
    try:
        rows = measure([CHIPS[name] for name in targets], options.name, options.dtype, options.jobs)
    except ImportError as error:
        print(f"kernels: {error}", file=sys.stderr)
        return 2
    if not rows:
        print("kernels: no variant has that --name and --dtype", file=sys.stderr)
        return 2
    failed = [row for row in rows if row["over_budget"]]
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        cells = [[_cell(row.get(column, "")) for column in COLUMNS] for row in rows]
        print(render("Triton kernels, compiled ahead of time; nothing was run", COLUMNS, cells))
        print(
            f"estimated_us: an estimate, not a measurement, of a step at that H and B = {BATCH}\n"
            f"{len(rows) - len(failed)} of {len(rows)} variants within budget (no spills, shared "
            "memory within the chip's)"
        )
    for row in failed:
        print(
            f"over budget: {row['name']} {row['target']} {row['dtype']}: {row['over_budget']}",
            file=sys.stderr if options.json else sys.stdout,
        )
    return 1 if failed else 0


def measure(chips: Sequence[Chip], name: str, dtype: str, jobs: int) -> list[dict[str, Any]]:
    """Return one object for every variant, with what the compiler made of it."""
    from torch_manual.kernels.triton_compile import DTYPES, compile_apart, variants

    chosen = [v for chip in chips for v in variants(chip) if name in v.name and dtype in v.dtype]
    torch_dtypes = {short: dtype for dtype, short in DTYPES.items()}
    rows = []
    for variant, result in compile_apart(chosen, jobs):
        chip = CHIPS[variant.target]
        row = variant._asdict() | variant.plan._asdict() | result
        del row["plan"]
        row["over_budget"] = result.get("error") or over_budget(result, chip)
        shape = Shape(
            "backward" in variant.name,
            torch_dtypes[variant.dtype],
            variant.precision,
            *(100, BATCH, variant.H, 1),
        )
        row["estimated_us"] = round(1e6 * estimate(variant.plan, shape, chip), 1)
        rows.append(row)
    return rows


def over_budget(result: dict[str, Any], chip: Chip) -> str:
    """Why a variant must not be chosen for the chip, or nothing."""
    if result["spill_bytes"]:
        return f"spills {result['spill_bytes']} bytes a thread"
    if result["shared_bytes"] > chip.shared_bytes:
        return f"{result['shared_bytes']} bytes of shared memory, the chip has {chip.shared_bytes}"
    return ""


def estimate(plan: Any, shape: Shape, chip: Chip) -> float:
    """Seconds of one step by latency, bandwidth and arithmetic; never compared with hardware."""
    flops, memory, cache = SPEED[chip.architecture]
    B, H, size = shape.B, shape.H, shape.dtype.itemsize
    flops *= {8: 1 / 16, 4: 1 / 16 if shape.precision == "ieee" else 1 / 2}.get(size, 1)
    product, traffic = 8 * B * H * H / flops, 11 * size * B * H / memory
    if plan.level == 1:  # one multiprocessor's product, at half its speed for so few rows
        product = 8 * plan.block[0] * H * H / (flops / chip.multiprocessors) * 2
    exchanged = 0.0
    if plan.level >= 2:  # every program reads its sequences' h, or all four gates' dpre
        rows = plan.block[0] * H * (4 if shape.backward else 1)
        exchanged = programs(plan, shape) * rows * size / cache
    if plan.level == 2:  # and its slice of W_hh again
        exchanged += -(-B // plan.block[0]) * 4 * H * H * size / cache
    return LATENCY[plan.level] + max(product, traffic) + exchanged


def _cell(value: Any) -> str:
    return "×".join(map(str, value)) if isinstance(value, tuple) else str(value)
