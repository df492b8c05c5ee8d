"""What a run shows: its progress, its loss curve."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

LINES = 20  # how often a run that is not watched on a terminal says where it is


@contextmanager
def progress(done: int, total: int, batch: int) -> Iterator[Callable[[Sequence[float]], None]]:
    """Yield a function to call with the losses after each step of `batch` characters.

    It moves a bar on a terminal, and elsewhere prints a line now and then.
    """
    console = Console()
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    task = bar.add_task("", total=total, completed=done)
    times = deque([time.monotonic()], maxlen=51)

    def show(losses: Sequence[float]) -> None:
        step = len(losses)
        times.append(time.monotonic())
        seconds = (times[-1] - times[0]) / (len(times) - 1)
        recent = losses[-20:]
        status = (
            f"loss {sum(recent) / len(recent):.3f} bits  {batch / seconds:,.0f} characters/s  "
            f"{(total - step) * seconds:.0f} s left"
        )
        bar.update(task, completed=step, description=status)
        if not console.is_terminal and step % math.ceil(total / LINES) == 0:
            print(f"step {step}/{total}  {status}", flush=True)

    with bar:
        yield show


def smooth(losses: Sequence[float], decay: float = 0.9) -> list[float]:
    """Return the exponential moving average, freed of its bias towards the start."""
    average, weight, smoothed = 0.0, 0.0, []
    for loss in losses:
        average = decay * average + (1 - decay) * loss
        weight = decay * weight + (1 - decay)
        smoothed.append(average / weight)
    return smoothed


def plot(
    curves: Mapping[str, Sequence[float]],
    validation: Sequence[tuple[int, float]],
    entropy: float,
    path: Path,
) -> None:
    """Draw the loss curves, the first one raw too, beside the held-out text's loss."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, losses) in enumerate(curves.items()):
        steps = range(1, len(losses) + 1)
        if number == 0:
            axes.plot(steps, losses, color="C0", alpha=0.25, linewidth=0.8, label="training loss")
        style = "-" if number == 0 else "--"
        axes.plot(steps, smooth(losses), style, color=f"C{number}", label=f"{name}, smoothed")
    label = f"held-out text, {validation[-1][1]:.2f} at the end"
    axes.plot(*zip(*validation, strict=True), "o", color="C2", markersize=5, label=label)
    axes.axhline(entropy, color="gray", linestyle=":", label=f"unigram entropy, {entropy:.2f}")
    axes.set(xlabel="training step", ylabel="bits per character", ylim=(0, None))
    axes.set_title("Character language model: loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
