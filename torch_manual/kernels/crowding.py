"""Whether other processes are on the cores of our threads.

Threads that share the hidden units of a sequence wait for one another some microseconds apart
(csrc/threads.h), those that share the sequences when they are done. One that has lost its core
keeps all of them waiting until the system gives it back, milliseconds later. So for a while after
that a call takes fewer threads, which gives the same bits: no sum is shared among them.
"""

from __future__ import annotations

import math
import time

CROWDED = 2  # what a call of csrc/lstm.cpp returns that spent much of its time so
_APART = 4  # times its own time: such a call says nothing so long after another
WHILE = 0.5  # seconds, for which threads are spared
_last = -math.inf
_until = 0.0
_spared = 0


def note(begun: float) -> None:
    """Note that a call was crowded that began at `begun`, by `time.monotonic`, and ends now."""
    global _last, _until, _spared
    now = time.monotonic()
    if begun - _last <= _APART * (now - begun):
        _spared, _until = spared() + 1, now + WHILE
    _last = now


def spared() -> int:
    """How many threads to leave out."""
    return _spared if time.monotonic() < _until else 0
