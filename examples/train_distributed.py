"""Train a language model of lines on several processes that may die at any time.

    torchrun --nproc-per-node 2 --max-restarts 3 examples/train_distributed.py
    torchrun --nproc-per-node 2 --max-restarts 3 examples/train_distributed.py --mode fsdp
    kill -9 ...                   one of the processes: all go on from the last checkpoint
    torchrun --nproc-per-node 1 examples/train_distributed.py --steps 400     another world size

`--mode ddp` keeps a copy of the model in every process (DistributedDataParallel), `--mode fsdp`
a share of it (`fully_shard`). A batch is lines of unequal lengths, packed. What is in batch k
depends on k alone, and the loss is divided by the whole batch's characters, so that the gradient is
the one of a single process whatever the number of processes; the run compares the two at its start.
Checkpoints suit both modes and any number of processes.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from _options import OneLineParser, number
from _text import Problem, alphabet_of, encode, read_text
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import torch_manual

SHORTEST, LONGEST = 8, 80  # characters of a line that is trained on
KEPT = 2  # checkpoints
PATIENCE = timedelta(seconds=30)  # with a process that does not answer, before all start again


class LineModel(nn.Module):
    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.embedding = torch_manual.Embedding(vocabulary, hidden)
        self.lstm = torch_manual.LSTM(hidden, hidden, 2)
        self.head = torch_manual.Linear(hidden, vocabulary)

    def forward(self, ids: PackedSequence) -> Tensor:
        """Map packed character numbers to logits, (N, vocabulary), in the packed order."""
        output, _ = self.lstm(ids._replace(data=self.embedding(ids.data)))
        return self.head(output.data)


class Lines:
    """The lines of the text, and which of them are in a batch."""

    def __init__(self, text: str, batch: int, seed: int) -> None:
        lines = [line.strip() for line in text.splitlines()]
        lines = [line for line in lines if SHORTEST <= len(line) <= LONGEST]
        self.alphabet = alphabet_of("".join(lines))
        self.lines = [encode(line, self.alphabet) for line in lines]
        self.batch, self.seed = batch, seed

    def of_step(self, step: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed + step)
        chosen = torch.randint(len(self.lines), (self.batch,), generator=generator)
        return [self.lines[k] for k in chosen.tolist()]


def loss_of(model: nn.Module, lines: Sequence[Tensor], characters: int) -> Tensor:
    """The cross-entropy of every next character, summed and divided by `characters`."""
    inputs = pack_sequence([line[:-1] for line in lines], enforce_sorted=False)
    targets = pack_sequence([line[1:] for line in lines], enforce_sorted=False)
    return F.cross_entropy(model(inputs), targets.data, reduction="sum") / characters


def predicted(lines: Sequence[Tensor]) -> int:
    return sum(len(line) - 1 for line in lines)


def distribute(model: LineModel, mode: str) -> nn.Module:
    if mode == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.lstm, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


class Run:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.lines = Lines(read_text(options.text), options.batch, options.seed)
        if not self.lines.lines:
            raise Problem(f"the text has no line of {SHORTEST} to {LONGEST} characters")
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if options.batch < self.world:
            raise Problem(f"--batch must be at least the number of processes, {self.world}")
        self.model = distribute(self._new_model(), options.mode)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=options.lr)
        self.step = 0

    def _new_model(self) -> LineModel:
        torch.manual_seed(self.options.seed)
        return LineModel(len(self.lines.alphabet), self.options.hidden)

    def backward(self) -> float:
        """Compute the gradients of this step's batch; return the loss, in bits per character."""
        batch = self.lines.of_step(self.step)
        mine = batch[self.rank :: self.world]
        loss = loss_of(self.model, mine, predicted(batch))
        self.optimizer.zero_grad()
        (loss * self.world).backward()  # DDP and FSDP take the mean over the processes
        total = loss.detach()
        dist.all_reduce(total)
        return total.item() / math.log(2)

    def distance_from_one_process(self) -> float:
        """The largest difference of a gradient from the one that a single process computes."""
        alone = self._new_model()
        batch = self.lines.of_step(self.step)
        loss_of(alone, batch, predicted(batch)).backward()
        self.backward()
        differences = [
            (whole(ours.grad) - theirs.grad).abs().max().item()  # type: ignore[operator]
            for ours, theirs in zip(self.model.parameters(), alone.parameters(), strict=True)
        ]
        return max(differences)

    def save(self, folder: Path) -> None:
        """Write a checkpoint, complete or not at all, and remove the oldest."""
        unfinished, finished = folder / "unfinished", folder / f"step-{self.step:06}"
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=unfinished)
        if self.rank == 0:
            unfinished.rename(finished)
            for old in checkpoints(folder)[:-KEPT]:
                shutil.rmtree(old)
        dist.barrier()

    def load(self, path: Path) -> None:
        self.optimizer.zero_grad()  # with gradients there, the optimizer's state would be left out
        model, optimizer = get_state_dict(self.model, self.optimizer)
        try:
            dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=path)
        except (ValueError, CheckpointException) as error:
            raise Problem(f"{path} is of another model or text: choose another --out") from error
        set_state_dict(
            self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer
        )
        self.step = int(path.name.removeprefix("step-"))


def join() -> None:
    """Join the other processes, each attempt under a name of its own in torchrun's store.

    The store outlives a restart, and the addresses in it are the dead processes' until the new ones
    have written theirs (pytorch issue 135712). The attempts' numbers are one machine's.
    """
    store, rank, world = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=PATIENCE)


def whole(gradient: Any) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def train(options: argparse.Namespace) -> None:
    rank = dist.get_rank()

    def say(words: str) -> None:
        if rank == 0:
            print(words, flush=True)

    run = Run(options)
    numbers = [0] * run.world
    dist.all_gather_object(numbers, os.getpid())
    say(f"processes: {', '.join(map(str, numbers))}")
    say(f"gradients equal one process's to {run.distance_from_one_process():.1e}")
    options.out.mkdir(parents=True, exist_ok=True)
    found = checkpoints(options.out)
    dist.barrier()
    if found:
        run.load(found[-1])
        say(f"going on from {found[-1]}")
        if run.step > options.steps:
            raise Problem(f"the checkpoint is at step {run.step}, past --steps")
    while run.step < options.steps:
        loss = run.backward()
        run.optimizer.step()
        run.step += 1
        if run.step % options.save_every == 0 or run.step == options.steps:
            run.save(options.out)
            say(f"step {run.step}  {loss:.3f} bits per character  saved")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    count = number(int, lambda x: 0 < x < 2**31, "a positive integer")
    rate = number(float, lambda x: 0 < x < 1, "a positive number below 1")
    parser = OneLineParser(
        prog="train_distributed", description="Train a language model on several processes."
    )

    def add(name: str, **settings: Any) -> None:
        parser.add_argument(name, **settings)

    add("--mode", choices=("ddp", "fsdp"), default="ddp", help="default: %(default)s")
    add("--text", metavar="FILE", help="UTF-8 (default: the Python language reference)")
    add("--steps", type=count, default=200, help="default: %(default)s")
    add("--batch", type=count, default=32, help="of all processes (default: %(default)s)")
    add("--hidden", type=count, default=128, help="default: %(default)s")
    add("--lr", type=rate, default=0.003, help="default: %(default)s")
    add("--seed", type=count, default=1, help="default: %(default)s")
    add("--save-every", type=count, default=20, help="steps (default: %(default)s)")
    add("--out", type=Path, default=Path("runs/train_distributed"), help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        options = parse(argv)
        if "RANK" not in os.environ:
            raise Problem(
                "start it with: torchrun --nproc-per-node 2 examples/train_distributed.py"
            )
        join()
        try:
            train(options)
        finally:
            dist.destroy_process_group()
    except (Problem, OSError) as error:
        print(f"train_distributed: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
