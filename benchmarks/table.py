"""Tables in Markdown, and files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe

RESULTS = Path(__file__).parent / "results"
PARTIAL_RESULTS = Path("runs/benchmarks")


def print_and_write(
    path: Path, title: str, head: Sequence[str], rows: Iterable[Sequence[str]]
) -> None:
    """Print every row as soon as it is measured, then write them all, with what they ran on."""
    found = []
    for row in rows:
        found.append(row)
        print("  ".join(row), flush=True)
    facts = describe() | {"threads": str(torch.get_num_threads())}
    listed = "\n".join(f"- {name}: {fact}" for name, fact in facts.items())
    text = f"# {title}\n\n{listed}\n\n{markdown_table(head, found)}\n"
    write_atomically(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))
    print(f"written: {path}")


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path`, then put it in its place in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
