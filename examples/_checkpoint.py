"""Checkpoint files that are never half written and never silently damaged."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from _text import Problem


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Replace the file in one go: whatever happens, it holds the old checkpoint or the new one."""
    unfinished = path.with_suffix(".tmp")
    try:
        with unfinished.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except RuntimeError as error:
        raise Problem(f"cannot write {path}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
            damaged = archive.testzip()
        checkpoint = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise Problem(f"{path} is damaged or not a checkpoint") from error
    if not isinstance(checkpoint, dict):
        raise Problem(f"{path} is damaged or not a checkpoint")
    return checkpoint
