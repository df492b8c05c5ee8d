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
_SHARE = 0.25  # of the time is that of such calls while they belong together
_ENOUGH = 0.02  # seconds of such calls; a machine takes a core for a few milliseconds now and then
WHILE = 0.5  # seconds, for which threads are spared
_since = -math.inf  # the first of those that belong together
_calls = 0
_seconds = 0.0
_until = 0.0
_spared = 0


def note(begun: float) -> None:
    """Note that a call was crowded that began at `begun`, by `time.monotonic`, and ends now."""
    global _since, _calls, _seconds, _until, _spared
    now = time.monotonic()
    if _seconds < _SHARE * (begun - _since):
        _since, _calls, _seconds = begun, 0, 0.0
    _calls, _seconds = _calls + 1, _seconds + now - begun
    if _calls > 1 and _seconds >= _ENOUGH:
        _spared, _until = spared() + 1, now + WHILE
        _since = -math.inf


def spared() -> int:
    """How many threads to leave out."""
    return _spared if time.monotonic() < _until else 0
