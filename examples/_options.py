"""char_lm's command line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from _text import Problem


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Problem(message)


def number(
    kind: Callable[[str], float], accepts: Callable[[float], bool], wanted: str
) -> Callable[[str], float]:
    """Return a converter for argparse that refuses what is not such a number."""

    def convert(word: str) -> float:
        try:
            value = kind(word)
        except ValueError:
            value = math.nan
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {word}")
        return value

    return convert


def build_parser(cells: Iterable[str]) -> argparse.ArgumentParser:
    count = number(int, lambda x: 0 < x < 2**31, "a positive integer")
    seed = number(int, lambda x: 0 <= x < 2**32, "an integer from 0 to 2**32 - 1")
    positive = number(float, lambda x: 0 < x < math.inf, "a positive number")
    rate = number(float, lambda x: 0 < x < 1, "a positive number below 1")
    share = number(float, lambda x: 0 <= x < 1, "at least 0 and less than 1")
    parser = OneLineParser(
        prog="char_lm",
        description="Train a character-level language model on torch_manual's layers.",
    )

    def add(name: str, help: str, **settings: Any) -> None:
        default = " (default: %(default)s)" if "default" in settings else ""
        parser.add_argument(name, help=help + default, **settings)

    add("--text", metavar="FILE", help="UTF-8 text (default: the Python language reference)")
    add("--cell", choices=tuple(cells), default="lstm", help="recurrent layer")
    add("--hidden", type=count, default=256, help="hidden units per layer")
    add("--layers", type=count, default=1, help="recurrent layers")
    add("--dropout", type=share, default=0.0, help="dropout after each recurrent layer")
    add("--steps", type=count, default=1000, help="training steps in all")
    add("--batch", type=count, default=32, help="streams that the text is cut into")
    add("--bptt", type=count, default=64, help="characters to backpropagate through")
    add("--lr", type=rate, default=0.003, help="Adam's learning rate")
    add("--seed", type=seed, default=0, help="seed of the weights, the dropout and the sample")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    add("--backend", default="auto", help="torch_manual's: auto, eager, cpu or triton")
    add("--compare", action="store_true", help="train the same model of torch.nn's layers as well")
    add("--out", type=Path, default=Path("runs/char_lm"), help="folder for plot and checkpoint")
    add("--save-every", type=count, default=250, help="steps from one checkpoint to the next")
    add("--resume", type=Path, metavar="CHECKPOINT", help="go on with the run it is from")
    add("--sample-length", type=count, default=400, help="characters to write at the end")
    add("--temperature", type=positive, default=0.7, help="below 1 the sample is less adventurous")
    add("--prompt", help="how the sample begins (default: as the text)")
    return parser
