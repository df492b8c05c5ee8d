"""`python -m benchmarks.gpu`: bring the Triton kernels up on a GPU, then set them against cuDNN.

In this order, each on top of the one before: what the machine is; what a step costs that does next
to nothing; every level's outputs and gradients against plain torch in float64; the persistent
kernel, a thousand times, bit-equal to the step kernel, in a process that may hang; ratios. A shape
whose results are wrong gets no time. Writes gpu.csv, gpu.md and gpu.png.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

import torch_manual
from benchmarks import machine
from torch_manual.kernels import triton as launcher
from torch_manual.kernels.triton_levels import Chip, Plan, Shape, choose, plan_at, programs

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDTHS, BATCHES, LENGTHS = (64, 128, 256, 512, 768, 1024, 2048), (1, 16, 64), (32, 256)
TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float32: 1e-2, torch.float64: 1e-10}
REPEATS = 1000  # of the persistent kernel
ROUNDS, CALLS = 11, 5
REPLAYED = 10  # calls until one is a graph's replay, at addresses that may come in turns


@dataclasses.dataclass
class Row:
    dtype: str
    H: int
    B: int
    T: int
    pass_: str
    levels: str  # of forward and backward
    error: float
    cudnn_ms: float | None = None
    ours_ms: float | None = None

    @property
    def ratio(self) -> float | None:
        return self.cudnn_ms / self.ours_ms if self.cudnn_ms and self.ours_ms else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder (default: runs)")
    parser.add_argument("--persistent", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no GPU here", file=sys.stderr)
        return 2
    if options.persistent:
        return persistent_is_bit_equal(torch.device("cuda"), REPEATS)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return bring_up(options.out, torch.device("cuda"), event_milliseconds)


def bring_up(
    out: Path, device: torch.device, milliseconds: Callable[[Callable[[], object]], float]
) -> int:
    """Run the list; return 1 if anything was wrong, else 0."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [f"- {name}: {value}" for name, value in describe(device).items()]
    lines += [f"- {name}: {us:.2f} µs" for name, us in overheads(device, milliseconds).items()]
    wrong = []
    for name, error, limit in correctness(device):
        lines.append(f"- {name}: error {error:.1e}, limit {limit:.0e}")
        if not error <= limit:
            wrong.append(name)
    cooperative = launcher.chip_of(device).cooperative
    persistent = run_persistent_apart() if cooperative else "no barrier over a grid here"
    lines.append(f"- persistent against steps, {REPEATS} times: {persistent}")
    if cooperative and persistent != "bit-equal":
        wrong.append("persistent")
    chosen = choose if persistent == "bit-equal" else without_persistent
    rows = []
    # the backend on request, as "auto" does without L3
    with launcher.override(chosen), torch_manual.use_backend("triton"):
        for dtype, H, B, T in itertools.product(DTYPES, WIDTHS, BATCHES, LENGTHS):
            rows += time_shape(device, dtype, H, B, T, milliseconds, chosen)
            print(*dataclasses.astuple(rows[-1]), rows[-1].ratio, flush=True)
    write(out, rows, lines)
    print("\n".join(lines), f"written to {out}/gpu.csv, gpu.md, gpu.png", sep="\n")
    if wrong:
        print("WRONG: " + ", ".join(wrong))
    return 1 if wrong or any(row.ours_ms is None for row in rows) else 0


def describe(device: torch.device) -> dict[str, str]:
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm"]
    clocks = ""
    if shutil.which(query[0]):  # not with ROCm
        done = subprocess.run([*query, "--format=csv,noheader"], capture_output=True, text=True)
        clocks = done.stdout.strip()
    return machine.describe() | {
        "GPU": torch.cuda.get_device_name(device),
        "driver, clock, most": clocks or "unknown",
        "CUDA": str(torch.version.cuda or torch.version.hip),
        "cuDNN": str(torch.backends.cudnn.version()),
    }


def overheads(
    device: torch.device, milliseconds: Callable[[Callable[[], object]], float]
) -> dict[str, float]:
    """Microseconds of one step that does next to nothing: these decide between L2 and L3."""
    T, H = 256, 256
    module = torch_manual.LSTM(16, H, dtype=torch.float16, device=device)
    x = torch.randn(T, 1, 16, dtype=torch.float16, device=device)
    found = {}
    for name, n in (("L1", 1), ("a launch in a graph and L2", 2)):
        with at_level(n), torch.no_grad():
            width = 64 if n == 1 else H
            layer = module if n == 2 else torch_manual.LSTM(16, width).to(device, torch.float16)
            found[name] = 1e3 * milliseconds(lambda layer=layer: layer(x)) / T  # type: ignore[misc]
    return found


def correctness(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """Every level but L3 × dtype against plain torch in float64: name, error, limit."""
    for n, dtype in itertools.product((0, 1, 2), (torch.float64, *DTYPES)):
        if n > 0 and dtype == torch.float64:
            continue
        for H, B, T, packed in ((64, 19, 7, False), (48, 5, 6, True), (64, 16, 1, False)):
            module, x = layer_and_input(device, dtype, H, B, T)
            given = (
                nn.utils.rnn.pack_padded_sequence(x, [T] + [max(1, T // 2)] * (B - 1))
                if packed
                else x
            )
            with at_level(n):
                name = f"L{n} {dtype} H{H} B{B} T{T}{' packed' if packed else ''}"
                yield name, error_of(module, given), TOLERANCE[dtype]


def layer_and_input(
    device: torch.device, dtype: torch.dtype, H: int, B: int, T: int
) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    module = torch_manual.LSTM(H, H).to(device, dtype)
    return module, torch.randn(T, B, H, device=device).to(dtype)


def error_of(module: nn.Module, x: Tensor | nn.utils.rnn.PackedSequence) -> float:
    """The largest error of outputs and gradients, relative to each tensor's largest element."""
    exact = torch_manual.LSTM(module.input_size, module.hidden_size).to(  # type: ignore[arg-type]
        x.data.device, torch.float64
    )
    exact.load_state_dict(module.state_dict())
    for _ in range(REPLAYED):
        ours = outputs_and_gradients(module, x)
    with torch_manual.use_backend("eager"):
        theirs = outputs_and_gradients(exact, x.to(torch.float64))
    return max(
        ((a.double() - b).abs().max() / b.abs().max()).item()
        for a, b in zip(ours, theirs, strict=True)
    )


def outputs_and_gradients(
    module: nn.Module, x: Tensor | nn.utils.rnn.PackedSequence
) -> list[Tensor]:
    y, (h_n, c_n) = module(x)
    outputs = [y if isinstance(y, Tensor) else y.data, h_n, c_n]
    draws = [torch.linspace(-1, 1, t.numel(), device=t.device).view_as(t).to(t) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, list(module.parameters()), draws)]


def at_level(n: int) -> AbstractContextManager[None]:
    return launcher.override(lambda shape, chip: plan_at(n, shape, chip))


def without_persistent(shape: Shape, chip: Chip) -> Plan:
    return choose(shape, chip._replace(cooperative=False))


def run_persistent_apart() -> str:
    command = [sys.executable, "-m", "benchmarks.gpu", "--persistent"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        return "hung"
    if done.returncode == 0:
        return "bit-equal"
    return (done.stdout + done.stderr).strip().rpartition("\n")[2] or f"exit code {done.returncode}"


def persistent_is_bit_equal(device: torch.device, repeats: int) -> int:
    """L3 against L2 in the same blocks, and no barrier that gave up; 1 at the first difference."""
    from torch_manual.triton_kernels.lstm import step, step_backward

    flags: list[Tensor] = []
    make = step.barrier

    def watched(grid: tuple[int, int, int], device: torch.device) -> Tensor:
        flags.append(make(grid, device))
        return flags[-1]

    step.barrier = step_backward.barrier = watched
    for H, B in ((256, 16), (512, 64), (768, 16), (1024, 16)):
        module, x = layer_and_input(device, torch.float16, H, B, 20)

        def same_blocks(n: int, shape: Shape, chip: Chip) -> Plan:
            plan = plan_at(3, shape, chip)
            if programs(plan, shape) > chip.multiprocessors:
                return plan_at(2, shape, chip)
            return plan._replace(level=n)

        with launcher.override(lambda *args: same_blocks(2, *args)):
            expected = outputs_and_gradients(module, x)
        for k in range(repeats):
            flags.clear()
            with launcher.override(lambda *args: same_blocks(3, *args)):
                found = outputs_and_gradients(module, x)
            if any(flag[0].item() for flag in flags):
                print(f"H{H} B{B}: a barrier gave up in repeat {k}")
                return 1
            if not all(map(torch.equal, found, expected)):
                print(f"H{H} B{B}: differs in repeat {k}")
                return 1
    return 0


def time_shape(
    device: torch.device,
    dtype: torch.dtype,
    H: int,
    B: int,
    T: int,
    milliseconds: Callable[[Callable[[], object]], float],
    chosen: Callable[[Shape, Chip], Plan] = choose,
) -> list[Row]:
    """Inference and training of one shape, ours and cuDNN's, medians of turns about."""
    module, x = layer_and_input(device, dtype, H, B, T)
    stock = nn.LSTM(H, H).to(device, dtype)
    stock.load_state_dict(module.state_dict())
    chip = launcher.chip_of(device)
    plans = [chosen(Shape(b, dtype, "tf32", T, B, H, 1), chip) for b in (False, True)]
    levels = " ".join(f"L{plan.level}" for plan in plans)
    error = error_of(module, x)
    rows = []
    for pass_ in ("inference", "training"):
        for layer in (stock, module):
            layer.train(pass_ == "training")  # cuDNN keeps what a backward pass needs, or does not
        row = Row(str(dtype).removeprefix("torch."), H, B, T, pass_, levels, error)
        rows.append(row)
        if not error <= TOLERANCE[dtype]:
            continue

        def call(layer: nn.Module, pass_: str = pass_) -> None:
            with torch.set_grad_enabled(pass_ == "training"):
                y, _ = layer(x)
            if pass_ == "training":
                y.backward(y.detach())

        theirs, ours = [], []
        for _ in range(ROUNDS):
            theirs.append(milliseconds(lambda: call(stock)))
            ours.append(milliseconds(lambda: call(module)))
        row.cudnn_ms, row.ours_ms = statistics.median(theirs), statistics.median(ours)
    return rows


def event_milliseconds(call: Callable[[], object]) -> float:
    """Milliseconds of one call on the GPU, by CUDA events, after warming up."""
    for _ in range(REPLAYED):  # compiles, then captures
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / CALLS


def write(out: Path, rows: Sequence[Row], lines: Sequence[str]) -> None:
    columns = [field.name for field in dataclasses.fields(Row)] + ["ratio"]
    cells = [(*dataclasses.astuple(row), row.ratio) for row in rows]
    with (out / "gpu.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *cells])
    table = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for line in cells:
        table.append(
            f"| {' | '.join(f'{v:.3g}' if isinstance(v, float) else str(v) for v in line)} |"
        )
    (out / "gpu.md").write_text("\n".join(["# Against cuDNN", "", *lines, "", *table, ""]))
    plot(out / "gpu.png", rows)


def plot(path: Path, rows: Sequence[Row]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dtypes = sorted({row.dtype for row in rows})
    figure, panels = plt.subplots(
        1,
        len(dtypes),
        figsize=(5 * len(dtypes), 4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, dtype in zip(panels[0], dtypes, strict=True):
        lines: dict[tuple[str, int, int], list[Row]] = {}
        for row in rows:
            if row.dtype == dtype and row.ratio:
                lines.setdefault((row.pass_, row.B, row.T), []).append(row)
        for (pass_, B, T), line in lines.items():
            style = "o-" if pass_ == "training" else "o--"
            panel.plot(
                [r.H for r in line], [r.ratio for r in line], style, label=f"{pass_} B{B} T{T}"
            )
        panel.axhline(1.0, color="black", linewidth=1)
        panel.set_xscale("log", base=2)
        panel.set_xlabel("H")
        panel.set_title(dtype)
    panels[0][0].set_ylabel("cuDNN's time / ours")
    if panels[0][0].lines:
        panels[0][-1].legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
