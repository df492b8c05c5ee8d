"""Train a character-level language model on torch_manual's layers.

Embedding → LSTM → Linear → CrossEntropyLoss, by truncated backpropagation through time: the text is
cut into parallel streams, and each chunk starts from the hidden state in which the last one ended.

    python examples/char_lm.py                         the Python language reference, 1-2 minutes
    python examples/char_lm.py --text book.txt --layers 2 --dropout 0.2 --steps 5000
    python examples/char_lm.py --cell peephole         Graves's LSTM, whose gates see the cell
    python examples/char_lm.py --compare               the same model of torch.nn's layers beside it
    python examples/char_lm.py --resume runs/char_lm/checkpoint.pt --steps 3000

Ctrl-C writes a checkpoint. A run that was interrupted and resumed ends bit for bit like one that
was not (on the CPU, with the same number of threads).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import math
import shlex
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import torch_manual

try:
    from _report import plot, progress
except ImportError as missing:
    print(f"char_lm: {missing}: pip install '.[examples]'", file=sys.stderr)
    raise SystemExit(2) from None
from _checkpoint import read_checkpoint, write_checkpoint
from _options import build_parser
from _text import Problem, alphabet_of, cut_into_streams, encode, read_text, unigram_entropy

FORMAT = "torch_manual char_lm 1"
CELLS = {"lstm": "LSTM", "peephole": "PeepholeLSTM"}
LIBRARIES = {"torch_manual": torch_manual, "torch.nn": nn}
HELD_OUT = 0.1  # the last tenth of the text is never trained on
CLIP = 1.0
EARLY, EARLY_TOLERANCE, MEAN_TOLERANCE = 100, 1e-4, 0.02  # --compare: steps, bits, bits

# A resumed run may not change these: it would not be the same run any more.
FIXED = ("cell", "hidden", "layers", "dropout", "batch", "bptt", "lr", "seed", "compare")


class CharModel(nn.Module):
    """Embedding → LSTM → Linear. `layers` is torch_manual or torch.nn: the two read the same."""

    def __init__(self, layers: Any, vocabulary: int, options: argparse.Namespace) -> None:
        super().__init__()
        lstm = getattr(layers, CELLS[options.cell])
        between_layers = options.dropout if options.layers > 1 else 0.0
        self.embedding = layers.Embedding(vocabulary, options.hidden)
        self.lstm = lstm(options.hidden, options.hidden, options.layers, dropout=between_layers)
        self.dropout = layers.Dropout(options.dropout)
        self.head = layers.Linear(options.hidden, vocabulary)

    def forward(self, ids: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Any]:
        """Map (T, B) character numbers to (T, B, vocabulary) logits and the state after them."""
        output, state = self.lstm(self.embedding(ids), state)
        return self.head(self.dropout(output)), state


@dataclass
class Learner:
    """A model and all that its training changes."""

    model: CharModel
    optimizer: torch.optim.Optimizer
    criterion: nn.Module
    state: tuple[Tensor, Tensor] | None = None
    losses: list[float] = field(default_factory=list)

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        logits, (h, c) = self.model(inputs, self.state)
        loss = self.criterion(logits.flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.state = h.detach(), c.detach()
        self.losses.append(loss.item() / math.log(2))


class Run:
    """A training run: its learners, where they are in the text, what was measured on the way."""

    def __init__(self, options: argparse.Namespace, text: str) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.text = text
        self.alphabet = alphabet_of(text)
        self.text_digest = hashlib.sha256(text.encode()).hexdigest()
        ids = encode(text, self.alphabet).to(self.device)
        boundary = len(ids) - int(HELD_OUT * len(ids))
        self.streams = cut_into_streams(ids[:boundary], options.batch)
        self.held_out = cut_into_streams(ids[boundary:], options.batch)
        if len(self.streams) <= options.bptt or len(self.held_out) < 2:
            raise Problem(
                f"the text is too short for --batch {options.batch} and --bptt {options.bptt}: "
                f"it has {len(text):,} characters"
            )
        self.position = 0
        self.validation: list[tuple[int, float]] = []
        libraries = LIBRARIES if options.compare else ["torch_manual"]
        self.learners = {library: self._learner(LIBRARIES[library]) for library in libraries}
        self.manual = self.learners["torch_manual"]

    def _learner(self, layers: Any) -> Learner:
        torch.manual_seed(self.options.seed)
        model = CharModel(layers, len(self.alphabet), self.options).to(self.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=self.options.lr)
        return Learner(model, optimizer, layers.CrossEntropyLoss())

    @property
    def steps(self) -> int:
        return len(self.manual.losses)

    def step(self) -> None:
        """Train on the next chunk; after the last one start over, from an empty state."""
        end = self.position + self.options.bptt
        if end >= len(self.streams):
            self.position, end = 0, self.options.bptt
            for learner in self.learners.values():
                learner.state = None
        inputs = self.streams[self.position : end]
        targets = self.streams[self.position + 1 : end + 1]
        self.position = end

        # Dropout's draws depend on the seed and the step alone: a resumed run repeats them.
        seed = self.options.seed + self.steps
        for learner in self.learners.values():
            torch.manual_seed(seed)
            learner.step(inputs, targets)
        if not math.isfinite(self.manual.losses[-1]):
            raise Problem(f"the loss is not finite at step {self.steps}: try a smaller --lr")

    @torch.no_grad()
    def validate(self) -> float:
        """Return bits per character on the held-out text, each stream's state carried through."""
        model = self.manual.model.eval()
        inputs, targets = self.held_out[:-1], self.held_out[1:]
        state, nats = None, 0.0
        for x, y in zip(inputs.split(256), targets.split(256), strict=True):
            logits, state = model(x, state)
            nats += self.manual.criterion(logits.flatten(0, 1), y.flatten()).item() * y.numel()
        model.train()
        return nats / targets.numel() / math.log(2)

    @torch.no_grad()
    def sample(self) -> str:
        """Return the prompt and what the model writes after it, one character at a time."""
        options, model = self.options, self.manual.model.eval()
        generator = torch.Generator().manual_seed(options.seed)
        text, state = options.prompt or self.text[0], None
        ids = encode(text, self.alphabet)
        for _ in range(options.sample_length):
            logits, state = model(ids[:, None].to(self.device), state)
            scores = logits[-1, 0].double().cpu()
            likelihood = torch.softmax((scores - scores.max()) / options.temperature, dim=0)
            ids = torch.multinomial(likelihood, 1, generator=generator)
            text += self.alphabet[int(ids)]
        model.train()
        return text

    def checkpoint(self) -> dict[str, Any]:
        options = {k: v for k, v in vars(self.options).items() if k not in ("resume", "out")}
        learners = {
            library: {
                "model": learner.model.state_dict(),
                "optimizer": learner.optimizer.state_dict(),
                "state": learner.state,
                "losses": learner.losses,
            }
            for library, learner in self.learners.items()
        }
        return {
            "format": FORMAT,
            "options": options,
            "text": self.text_digest,
            "position": self.position,
            "validation": self.validation,
            "learners": learners,
        }

    def restore(self, checkpoint: dict[str, Any]) -> None:
        for name in FIXED:
            before, now = checkpoint["options"][name], getattr(self.options, name)
            if now != before:
                raise Problem(f"the checkpoint's run has --{name} {before}, not {now}")
        if checkpoint["text"] != self.text_digest:
            raise Problem("the checkpoint's run has another text: give that one with --text")
        for library, learner in self.learners.items():
            saved = checkpoint["learners"][library]
            learner.model.load_state_dict(saved["model"])
            learner.optimizer.load_state_dict(saved["optimizer"])
            if saved["state"] is not None:
                h, c = saved["state"]
                learner.state = h.to(self.device), c.to(self.device)
            learner.losses = saved["losses"]
        self.position = checkpoint["position"]
        self.validation = checkpoint["validation"]
        if self.steps > self.options.steps:
            raise Problem(f"the checkpoint is at step {self.steps}, past --steps")


def train(run: Run, checkpoint_path: Path) -> bool:
    """Train to the last step, or return False when Ctrl-C asked for a stop."""
    options = run.options
    characters = options.batch * options.bptt
    with stop_on_ctrl_c() as stop, progress(run.steps, options.steps, characters) as show:
        while run.steps < options.steps and not stop.is_set():
            run.step()
            show(run.manual.losses)
            if run.steps % options.save_every == 0:
                run.validation.append((run.steps, run.validate()))
                write_checkpoint(run.checkpoint(), checkpoint_path)
        write_checkpoint(run.checkpoint(), checkpoint_path)
    return run.steps == options.steps


@contextmanager
def stop_on_ctrl_c() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C sets, lest it cut a step in two; a second one stops at once."""
    stop = threading.Event()

    def ask(_signal: int, _frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


def start(options: argparse.Namespace, checkpoint: dict[str, Any] | None) -> Run:
    """Return a run ready to train, having tried all that a wrong option could break later."""
    text = read_text(options.text)
    unknown = set(options.prompt or "") - set(text)
    if unknown:
        raise Problem(f"--prompt has characters that are not in the text: {sorted(unknown)}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.out).close()
    except OSError as error:
        raise Problem(f"cannot write to --out {options.out}: {error.strerror}") from error
    try:
        torch.zeros(1, device=options.device).item()
    except Exception as error:  # each kind of device has its own way to say that it is not there
        raise Problem(f"--device {options.device} is not usable here") from error
    try:
        run = Run(options, text)
        if checkpoint is not None:
            run.restore(checkpoint)
        else:
            run.validation.append((0, run.validate()))
    except (RuntimeError, LookupError, TypeError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        raise Problem(f"cannot start: {first_line}") from error
    return run


def compare(manual: Sequence[float], stock: Sequence[float]) -> bool:
    """Say whether the two libraries' losses agree.

    Training amplifies rounding: two runs of torch.nn alone that start one rounding apart lie 1e-6
    bits apart after 100 steps and 1e-2 after 200. So the first steps must agree closely, and the
    rest on average.
    """
    gaps = [ours - theirs for ours, theirs in zip(manual, stock, strict=True)]
    largest = max(abs(gap) for gap in gaps)
    early = max(abs(gap) for gap in gaps[:EARLY])
    mean = abs(sum(gaps)) / len(gaps)
    agree = early <= EARLY_TOLERANCE and mean <= MEAN_TOLERANCE
    print(
        f"losses of torch_manual and torch.nn {'agree' if agree else 'DRIFTED APART'}: "
        f"largest difference {largest:.1e} bits, {early:.1e} in the first {EARLY} steps "
        f"(tolerance {EARLY_TOLERANCE}), mean difference {mean:.1e} (tolerance {MEAN_TOLERANCE})"
    )
    return agree


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """Return the options, and the checkpoint to resume, whose own options are then the defaults."""
    parser = build_parser(CELLS)
    options = parser.parse_args(argv)
    if options.resume is None:
        checkpoint = None
    else:
        checkpoint = read_checkpoint(options.resume)
        if checkpoint.get("format") != FORMAT:
            raise Problem(f"{options.resume} is not a checkpoint of this program")
        parser.set_defaults(**checkpoint["options"], out=options.resume.parent)
        options = parser.parse_args(argv)
    if options.compare and not hasattr(nn, CELLS[options.cell]):
        raise Problem(f"--compare: torch.nn has no {CELLS[options.cell]}")
    return options, checkpoint


def run_char_lm(argv: Sequence[str] | None) -> int:
    options, checkpoint = parse(argv)
    try:
        backend = torch_manual.use_backend(options.backend)
    except (ValueError, RuntimeError) as error:
        raise Problem(str(error)) from error
    with backend:
        return train_and_show(options, checkpoint)


def train_and_show(options: argparse.Namespace, checkpoint: dict[str, Any] | None) -> int:
    run = start(options, checkpoint)
    checkpoint_path, plot_path = options.out / "checkpoint.pt", options.out / "loss.png"
    weights = sum(parameter.numel() for parameter in run.manual.model.parameters())
    print(f"text: {len(run.text):,} characters, {len(run.alphabet)} of them distinct")
    print(f"model: {weights:,} weights, {CELLS[options.cell]} of {options.hidden} units")

    if not train(run, checkpoint_path):
        print(f"interrupted at step {run.steps}; to go on:")
        print(f"    python {sys.argv[0]} --resume {shlex.quote(str(checkpoint_path))}")
        return 130

    bits, entropy = run.validate(), unigram_entropy(run.text)
    curves = {library: learner.losses for library, learner in run.learners.items()}
    plot(curves, [*run.validation, (run.steps, bits)], entropy, plot_path)
    agree = compare(*curves.values()) if options.compare else True
    print(f"held-out text: {bits:.3f} bits per character (unigram entropy {entropy:.3f})")
    print(f"sample at temperature {options.temperature}:\n\n{run.sample()}\n")
    print(f"plot: {plot_path}\ncheckpoint: {checkpoint_path}")
    return 0 if agree else 1


def main(argv: Sequence[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the sample may hold what a terminal cannot show
    try:
        return run_char_lm(argv)
    except (Problem, OSError) as error:
        print(f"char_lm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
