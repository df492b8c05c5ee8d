"""The command line, `python -m torch_manual check | info | kernels`: a function for each."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import torch_manual
from torch_manual._check_cases import CheckCase, check_cases
from torch_manual._derivatives import analytic, draw_cotangents, prepare
from torch_manual._kernels_command import add_arguments as add_kernels_arguments
from torch_manual._kernels_command import positive
from torch_manual._table import render
from torch_manual.gradcheck import gradcheck

STOCK_TOLERANCE = 1e-12  # float64: the same sums, in another order


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the subcommand and return the exit code: 0 well, 1 a check failed, 2 a wrong argument."""
    parser = argparse.ArgumentParser(
        prog="python -m torch_manual", description=torch_manual.__doc__
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser(
        "check", help="check every layer's gradients numerically and against torch.nn, in float64"
    )
    command.add_argument("--layer", nargs="+", default=[], metavar="NAME", help="only these layers")
    command.add_argument(
        "--samples",
        type=positive,
        default=64,
        metavar="N",
        help="elements checked per tensor or gate (default: %(default)s)",
    )
    command.add_argument("--verbose", action="store_true", help="print every layer's full table")
    command.set_defaults(run=check)

    command = commands.add_parser("info", help="print versions, devices and backends")
    command.set_defaults(run=info)

    add_kernels_arguments(
        commands.add_parser(
            "kernels",
            help="compile the Triton kernels ahead of time, no GPU needed, and weigh them",
        )
    )

    options = parser.parse_args(arguments)
    return options.run(options)


def check(options: argparse.Namespace) -> int:
    """Check the layers numerically and against torch.nn; print one table with a row for each."""
    cases = check_cases()
    layers = list(dict.fromkeys(case.layer for case in cases))
    unknown = [name for name in options.layer if name not in layers]
    if unknown:
        print(
            f"check: no layer {', '.join(unknown)}; there are {', '.join(layers)}", file=sys.stderr
        )
        return 2

    rows, failed = [], 0
    for case in cases:
        if options.layer and case.layer not in options.layer:
            continue
        torch.manual_seed(0)
        module = case.build()
        report = gradcheck(module, case.inputs, samples=options.samples)
        difference = difference_to_stock(case, module)
        passed = report.ok and difference <= STOCK_TOLERANCE
        failed += not passed
        if options.verbose or not report.ok:
            print(f"{report}\n")
        rows.append(
            (
                case.label,
                str(len(report.rows)),
                str(sum(row.checked for row in report.rows)),
                f"{max(row.max_abs for row in report.rows):.1e}",
                f"{max(row.max_rel for row in report.rows):.1e}",
                f"{difference:.1e}",
                "pass" if passed else "FAIL",
            )
        )
    columns = ("layer", "rows", "elements", "abs error", "rel error", "to torch.nn", "result")
    print(render("gradients against central differences, and all against torch.nn", columns, rows))
    print(f"{len(rows) - failed} of {len(rows)} pass (float64; to torch.nn ≤ {STOCK_TOLERANCE:g})")
    return 1 if failed else 0


def difference_to_stock(case: CheckCase, module: nn.Module) -> float:
    """The largest difference to the stock layer, over outputs and gradients, with the same weights.

    Parameters that the stock layer has not (peepholes) are set to zero in `module`.
    """
    stock = case.build_stock(module)
    shared = dict(stock.named_parameters())
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name not in shared:
                weight.zero_()
    ours, theirs = (prepare(m, case.inputs, seed=0) for m in (module, stock))
    outputs, expected = ours.evaluate(), theirs.evaluate()
    draws = draw_cotangents(expected, seed=0)
    gradients = dict(zip((name for name, _ in ours.leaves), analytic(ours, draws)[0], strict=True))
    expected_gradients = analytic(theirs, draws)[0]
    pairs = list(zip(outputs, expected, strict=True))
    for (name, _), gradient in zip(theirs.leaves, expected_gradients, strict=True):
        pairs.append((gradients[name], gradient))
    return max(_distance(a, b) for a, b in pairs)


def _distance(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
        return float("inf")
    return (a - b).abs().max().item()


def info(options: argparse.Namespace) -> int:
    """Print what a bug report needs."""
    devices = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "torch_manual": torch_manual.__version__,
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "devices": ", ".join(["cpu", *devices]),
    }
    facts |= {f"backend {name}": status for name, status in torch_manual.backends().items()}
    for name, fact in facts.items():
        print(f"{name:<16}{fact}")
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
