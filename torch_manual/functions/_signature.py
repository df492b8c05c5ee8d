"""`autograd.Function.apply` asks for its forward's signature at every call; here it is kept."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def keep_signature(forward: Callable) -> Callable:
    """Decorate a `forward` so that `inspect.signature` need not derive it again."""
    kept: Any = forward
    kept.__signature__ = inspect.signature(forward)
    return forward
