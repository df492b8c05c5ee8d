"""Plain-text tables, drawn by rich where it is installed."""

from __future__ import annotations

import io
from collections.abc import Sequence


def render(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table as text without colour codes: by rich, or one tab-separated line per row."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return "\n".join([title, *("\t".join(row) for row in (columns, *rows))])

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    wide = 10_000  # never wrapped: the terminal may be narrower, a log file is not
    console = Console(file=io.StringIO(), width=wide, markup=False, emoji=False, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().strip("\n").splitlines())
