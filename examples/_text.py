"""A text as numbers: reading it, its alphabet and entropy, and cutting it into parallel streams."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor


class Problem(Exception):
    """Something the user can put right; its message is the one line they see."""


def read_text(path: str | None) -> str:
    """Return the text of a UTF-8 file, or the Python language reference that Python carries."""
    if path is None:
        return "".join(topics[name] for name in sorted(topics))
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise Problem(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise Problem(f"{path} is not UTF-8 text: byte {error.start} does not decode") from error
    if not text:
        raise Problem(f"{path} is empty")
    if "\0" in text:
        raise Problem(f"{path} is not a text: it holds zero bytes")
    return text


def alphabet_of(text: str) -> str:
    """Return the distinct characters of the text in order; a character's number is its place."""
    return "".join(sorted(set(text)))


def encode(text: str, alphabet: str) -> Tensor:
    """Return the numbers of the text's characters, all of which must be in the alphabet."""
    numbers = {character: number for number, character in enumerate(alphabet)}
    return torch.tensor([numbers[character] for character in text])


def unigram_entropy(text: str) -> float:
    """Return the bits per character that a model needs which knows only how frequent each is."""
    shares = [count / len(text) for count in Counter(text).values()]
    return -sum(share * math.log2(share) for share in shares)


def cut_into_streams(ids: Tensor, streams: int) -> Tensor:
    """Return (length, streams): each column is a contiguous piece of the text."""
    length = len(ids) // streams
    return ids[: length * streams].view(streams, length).t().contiguous()
