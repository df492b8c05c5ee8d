"""One line a case and a dot a pass: how many times faster than stock, losses in red."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, NullLocator

if TYPE_CHECKING:
    from benchmarks.report import Row

MARKERS = {"inference": "o", "training": "s"}
COLOURS = {"inference": "#0072b2", "training": "#009e73"}
LOSS = "#d62728"


def save(path: Path, rows: Sequence[Row], machine: Mapping[str, str]) -> None:
    labels = list(dict.fromkeys(row.label for row in rows))
    threads = sorted({row.threads for row in rows})
    figure, panels = plt.subplots(
        1,
        len(threads),
        figsize=(4 + 4 * len(threads), 2.2 + 0.25 * len(labels)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, count in zip(panels[0], threads, strict=True):
        _draw(panel, [row for row in rows if row.threads == count], labels)
        panel.set_title(f"{count} thread{'s' * (count > 1)}", fontsize=10)
    panels[0][0].set_yticks(range(len(labels)), labels, fontsize=8)
    panels[0][0].set_ylim(len(labels) - 0.4, -0.6)
    _scale(panels[0][0], rows)
    about = " · ".join(f"{name}: {value}" for name, value in machine.items())
    figure.legend(
        handles=_legend(),
        loc="outside lower center",
        ncols=4,
        fontsize=9,
        title=about,
        title_fontsize=8,
    )
    figure.suptitle("Stock's time / ours: right of 1 we are faster", fontsize=12)
    figure.savefig(path, format="png", dpi=130)
    plt.close(figure)


def _draw(panel: plt.Axes, rows: Sequence[Row], labels: Sequence[str]) -> None:
    panel.axvline(1.0, color="black", linewidth=1)
    panel.axvspan(1e-6, 1.0, color=LOSS, alpha=0.06, linewidth=0)
    panel.grid(axis="both", color="0.9", linewidth=0.6)
    panel.set_axisbelow(True)
    for row in rows:
        y = labels.index(row.label) + (-0.17 if row.pass_ == "inference" else 0.17)
        if row.ratio is None:
            panel.text(1.0, y, row.status.partition(":")[0], color=LOSS, fontsize=7, va="center")
            continue
        colour = LOSS if row.ratio < 1 else COLOURS[row.pass_]
        panel.plot([1.0, row.ratio], [y, y], color=colour, linewidth=1.2, alpha=0.5)
        face = "white" if row.status == "noisy" else colour
        panel.plot(row.ratio, y, MARKERS[row.pass_], color=colour, markerfacecolor=face, ms=5)
        if row.ratio < 1:
            panel.annotate(
                f"{row.ratio:.2f}",
                (row.ratio, y),
                xytext=(-6, 0),
                textcoords="offset points",
                color=LOSS,
                fontsize=7,
                ha="right",
                va="center",
            )


def _scale(panel: plt.Axes, rows: Sequence[Row]) -> None:
    ratios = [row.ratio for row in rows if row.ratio is not None]
    panel.set_xscale("log")
    panel.set_xlim(min([0.7, *ratios]) / 1.6, max([2.0, *ratios]) * 1.3)
    ticks = [m * 10**e for e in range(-3, 5) for m in (1, 2, 5)]
    panel.xaxis.set_major_locator(FixedLocator(ticks))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter("{x:g}")


def _legend() -> list[plt.Line2D]:
    def dot(label: str, marker: str, colour: str, face: str | None = None) -> plt.Line2D:
        return plt.Line2D(
            [], [], marker=marker, color=colour, ls="", label=label, markerfacecolor=face or colour
        )

    return [
        *(dot(pass_, MARKERS[pass_], COLOURS[pass_]) for pass_ in MARKERS),
        dot("slower", "D", LOSS),
        dot("noisy: too few clean rounds", "o", "0.4", "white"),
    ]
