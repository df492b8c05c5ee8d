"""Time what is beyond a forward and a backward pass: `python -m benchmarks.transforms`.

Each row is two sides timed in turns (benchmarks/measure.py), the median of their ratio, and what is
asked of it. Where both sides compute the same thing, it is compared before it is timed.

A block of each side takes 0.1 s or one call, so that neither finds the caches as the other left
them: the sides differ tenfold.

Dims: T steps, B batch, I input, H hidden. The second derivative needs stock's plain path: oneDNN's
LSTM has none, so it is switched off for stock.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

import torch_manual
from benchmarks.machine import wait_for_cores
from benchmarks.measure import block, interleaved, no_garbage_collection, summarize
from benchmarks.table import PARTIAL_RESULTS, RESULTS, print_and_write

BLOCK_SECONDS = 0.1
HEAD = ("what", "ms", "compared with", "ms", "ratio", "asked", "")

Step = Callable[[], object]


@dataclass(frozen=True)
class Comparison:
    """`step` beside `base`; the ratio of their times is to be at least or at most `limit`.

    Without a limit it is torch's own cost, to see another row beside. `same` is the pair of their
    results where these should be equal.
    """

    name: str
    base_name: str
    step: Step
    base: Step
    limit: float | None = None
    at_least: bool = False  # then it is base / step, a speedup, else step / base, a cost
    same: Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]] | None = None

    def row(self, seconds: float) -> tuple[str, ...]:
        if self.same is not None:
            torch.testing.assert_close(*self.same(), rtol=1e-3, atol=1e-4)
        with no_garbage_collection():
            base, step = (block(side, seconds=BLOCK_SECONDS) for side in (self.base, self.step))
            wait_for_cores()
            timing = summarize(interleaved(base, step, seconds))
        ratio = timing.ratio if self.at_least else 1 / timing.ratio
        return (
            self.name,
            f"{timing.ours_ms:.3g}",
            self.base_name,
            f"{timing.stock_ms:.3g}",
            f"{ratio:.2f} ×",
            *self.verdict(ratio, timing.noisy),
        )

    def verdict(self, ratio: float, noisy: bool) -> tuple[str, str]:
        """What is asked, and whether it is met."""
        if self.limit is None:
            return "", "noisy" if noisy else ""
        met = ratio >= self.limit if self.at_least else ratio <= self.limit
        asked = f"{'≥' if self.at_least else '≤'} {self.limit:g} ×"
        return asked, ("met" if met else "MISSED") + (", noisy" if noisy else "")


def loss(module: Callable, x: Tensor) -> Tensor:
    return module(x)[0].square().sum()


def comparisons() -> Iterator[Comparison]:
    yield gradient_penalty(T=100, B=8, I=64, H=64)
    yield per_sample_gradients(T=50, B=32, I=64, H=128)
    yield from first_order(T=100, B=8, I=64, H=64)
    yield from first_order(T=128, B=32, I=128, H=128)
    yield hessian_vector_product(T=100, B=8, I=64, H=64)


def gradient_penalty(T: int, B: int, I: int, H: int) -> Comparison:
    ours, stock = torch_manual.LSTM(I, H), nn.LSTM(I, H)
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(T, B, I, requires_grad=True)

    def step(module: nn.Module) -> Sequence[Tensor]:
        (slope,) = torch.autograd.grad(module(x)[0].mean(0).sum(), x, create_graph=True)
        penalty = ((slope.norm(dim=(0, 2)) - 1) ** 2).mean()
        return torch.autograd.grad(penalty, [*module.parameters()], allow_unused=True)

    def stock_step() -> Sequence[Tensor]:
        with torch.backends.mkldnn.flags(enabled=False):
            return step(stock)

    return Comparison(
        f"gradient penalty T{T} B{B} I{I} H{H}",
        "torch.nn",
        lambda: step(ours),
        stock_step,
        limit=8,
        at_least=True,
        same=lambda: (step(ours), stock_step()),
    )


def per_sample_gradients(T: int, B: int, I: int, H: int) -> Comparison:
    from opacus import GradSampleModule
    from opacus.layers import DPLSTM

    ours = torch_manual.LSTM(I, H)
    theirs = DPLSTM(I, H)
    theirs.load_state_dict(ours.state_dict())
    with_hooks = GradSampleModule(theirs, batch_first=False, loss_reduction="sum")
    their_parameters = dict(theirs.named_parameters())
    x = torch.randn(T, B, I)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}

    def loss_of(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss(partial(functional_call, ours, parameters), x)

    def step() -> list[Tensor]:
        return list(vmap(grad(loss_of), (None, 1))(parameters, x).values())

    def opacus_step() -> list[Tensor]:
        with_hooks.zero_grad()
        with_hooks(x)[0].square().sum().backward()
        return [their_parameters[name].grad_sample for name in parameters]

    return Comparison(
        f"per-sample gradients T{T} B{B} I{I} H{H}",
        "Opacus's DPLSTM",
        step,
        opacus_step,
        limit=8,
        at_least=True,
        same=lambda: (step(), opacus_step()),
    )


def first_order(T: int, B: int, I: int, H: int) -> Iterator[Comparison]:
    module = torch_manual.LSTM(I, H)
    x, tx = torch.randn(T, B, I), torch.randn(T, B, I)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}

    def forward() -> Tensor:
        return module(x)[0]

    @torch.no_grad()
    def of_input() -> object:
        return jvp(lambda x: module(x)[0], (x,), (tx,))

    def of_weights() -> object:
        return jvp(lambda p: functional_call(module, p, (x,))[0], (parameters,), (tangents,))

    @torch.no_grad()
    def dual_input() -> object:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(module(forward_ad.make_dual(x, tx))[0])

    @torch.no_grad()
    def dual_weights() -> object:
        with forward_ad.dual_level():
            duals = {k: forward_ad.make_dual(p, tangents[k]) for k, p in parameters.items()}
            return forward_ad.unpack_dual(functional_call(module, duals, (x,))[0])

    @torch.no_grad()
    def of_nothing() -> object:
        return jvp(lambda x: x, (x,), (tx,))

    without_graph = torch.no_grad()(forward)
    yield Comparison(
        f"torch's own: jvp of the identity T{T} B{B} I{I}",
        "forward, no_grad",
        of_nothing,
        without_graph,
    )
    for name, of, dual in (
        ("input", of_input, dual_input),
        ("weights", of_weights, dual_weights),
    ):
        name = f"along the {name} T{T} B{B} I{I} H{H}"
        yield Comparison(f"jvp {name}", "forward, no_grad", of, without_graph, 2.5)
        yield Comparison(f"jvp {name}", "forward, graph kept", of, forward, 2.5)
        yield Comparison(f"forward_ad {name}", "forward, no_grad", dual, without_graph, 2.5)


def hessian_vector_product(T: int, B: int, I: int, H: int) -> Comparison:
    module = torch_manual.LSTM(I, H)
    x = torch.randn(T, B, I)
    parameters = [*module.parameters()]
    vectors = [torch.randn_like(p) for p in parameters]

    def gradient(create_graph: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(module, x), parameters, create_graph=create_graph)

    def product() -> tuple[Tensor, ...]:
        return torch.autograd.grad(gradient(create_graph=True), parameters, vectors)

    return Comparison(
        f"Hessian-vector product T{T} B{B} I{I} H{H}", "gradient", product, gradient, limit=4
    )


def compiled(T: int, B: int, I: int, H: int) -> Iterator[tuple[Comparison, float]]:
    """Compiled training steps beside the eager one, and the seconds that compiling each took."""
    module = torch_manual.LSTM(I, H)
    x = torch.randn(T, B, I)
    parameters = [*module.parameters()]

    def step(loss: Callable, module: Callable) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(module, x), parameters)

    def compare(name: str, *functions: Callable) -> tuple[Comparison, float]:
        start = time.perf_counter()
        step(*functions)
        seconds = time.perf_counter() - start
        return Comparison(
            f"{name} T{T} B{B} I{I} H{H}",
            "eager step",
            lambda: step(*functions),
            lambda: step(loss, module),
            limit=1.0,
            same=lambda: (step(*functions), step(loss, module)),
        ), seconds

    def compile(f: Callable) -> Callable:
        return torch.compile(f, fullgraph=True, dynamic=True)

    yield compare("step, loss and module compiled", compile(loss), module)
    yield compare("step, module compiled", loss, compile(module))


def compiled_without_recurrence(B: int, I: int, H: int) -> Comparison:
    """What two graphs, forward and backward, cost where there is little in them."""
    module = nn.Sequential(nn.Linear(I, H), nn.Linear(H, H))
    x = torch.randn(B, I)
    parameters = [*module.parameters()]

    def loss(x: Tensor) -> Tensor:
        return module(x).square().sum()

    def step(loss: Callable) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(x), parameters)

    compiled_loss = torch.compile(loss, fullgraph=True, dynamic=True)
    return Comparison(
        f"torch's own: step of two nn.Linear, compiled B{B} I{I} H{H}",
        "eager step",
        lambda: step(compiled_loss),
        lambda: step(loss),
        same=lambda: (step(compiled_loss), step(loss)),
    )


def first_compilation() -> float:
    """The seconds that Inductor takes to set itself up and to compile next to nothing."""
    start = time.perf_counter()
    torch.compile(lambda x: x + 1)(torch.ones(64))
    return time.perf_counter() - start


def compiled_whole(T: int, B: int, I: int, H: int) -> Iterator[Comparison]:
    """Forward and backward pass in one graph; a step with its optimizer."""
    module = torch_manual.LSTM(I, H)
    x = torch.randn(T, B, I)
    parameters = dict(module.named_parameters())

    def loss_of(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss(partial(functional_call, module, parameters), x)

    one_graph = torch.compile(grad(loss_of), fullgraph=True, dynamic=True)

    def step() -> list[Tensor]:
        return list(one_graph({name: p.detach() for name, p in parameters.items()}, x).values())

    def eager_step() -> Sequence[Tensor]:
        return torch.autograd.grad(loss(module, x), list(parameters.values()))

    name = f"compiled torch.func.grad T{T} B{B} I{I} H{H}"
    yield Comparison(
        name, "eager step", step, eager_step, limit=1.0, same=lambda: (step(), eager_step())
    )

    def training_step(compile: Callable) -> Callable[[], list[Tensor]]:
        trained = copy.deepcopy(module)
        optimizer = torch.optim.Adam(trained.parameters())
        compiled_loss, optimizer_step = compile(loss), compile(optimizer.step)

        def step() -> list[Tensor]:
            optimizer.zero_grad()
            compiled_loss(trained, x).backward()
            optimizer_step()
            return [p.detach() for p in trained.parameters()]

        return step

    compiled_step, eager_training_step = training_step(torch.compile), training_step(lambda f: f)
    yield Comparison(
        f"training step with Adam, both compiled T{T} B{B} I{I} H{H}",
        "the same, eager",
        compiled_step,
        eager_training_step,
        limit=1.0,
        same=lambda: (compiled_step(), eager_training_step()),
    )


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Inductor finds nothing that an earlier run has compiled."""
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        yield


def rows(seconds: float) -> Iterator[tuple[str, ...]]:
    for comparison in comparisons():
        yield comparison.row(seconds)
    with nothing_compiled():
        yield from compiled_rows(seconds)


def compiled_rows(seconds: float) -> Iterator[tuple[str, ...]]:
    yield "torch's own first compilation, of x + 1", f"{1e3 * first_compilation():.0f}", *[""] * 5
    yield compiled_without_recurrence(8, 64, 64).row(seconds)
    compile_seconds = 0.0
    for sizes in ((100, 8, 64, 64), (128, 32, 128, 128)):
        for comparison, seconds_to_compile in compiled(*sizes):
            compile_seconds = max(compile_seconds, seconds_to_compile)
            yield comparison.row(seconds)
        for comparison in compiled_whole(*sizes):
            yield comparison.row(seconds)
    met = "met" if compile_seconds <= 10 else "MISSED"
    longest = f"{1e3 * compile_seconds:.0f}"
    yield "the longest compilation after it", longest, "", "", "", "≤ 10000 ms", met


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.transforms", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a rough look, under a minute")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder of transforms.md")
    options = parser.parse_args(arguments)
    try:
        importlib.import_module("opacus")
    except ImportError:
        print("benchmarks: pip install torch-manual[opacus]", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", "TF32 acceleration|Full backward hook")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    path = (options.out or (PARTIAL_RESULTS if options.quick else RESULTS)) / "transforms.md"
    print_and_write(path, "Transforms", HEAD, rows(0.5 if options.quick else 3.0))
    return 0


if __name__ == "__main__":
    sys.exit(main())
