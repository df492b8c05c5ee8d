"""Fewer threads while another process has the core of one of them: when, and to the same bits."""

import math
import os
import subprocess
import sys

import pytest
import torch

from kernel_problems import BUILT, CLASSES, problem
from torch_manual.functions.lstm_gradients import Primal, lstm_gradients
from torch_manual.kernels import cpu_gradients, cpu_grid, cpu_library, crowding
from torch_manual.kernels.cpu_library import Grid
from torch_manual.kernels.lstm import lstm_backward, lstm_forward

pytestmark = pytest.mark.usefixtures("one_thread_and_nan_where_unwritten")


@pytest.fixture
def clock(monkeypatch):
    """The seconds that `crowding` reads, to be set."""
    now = [1000.0]
    for name, value in (("_since", -math.inf), ("_until", 0.0), ("_spared", 0)):
        monkeypatch.setattr(crowding, name, value)
    monkeypatch.setattr(crowding.time, "monotonic", lambda: now[0])
    return now


def crowded_call(clock, after, seconds):
    clock[0] += after + seconds
    crowding.note(clock[0] - seconds)


def test_crowded_calls_close_together_spare_a_thread_for_a_while(clock):
    crowded_call(clock, after=0, seconds=0.02)
    assert crowding.spared() == 0
    crowded_call(clock, after=0.05, seconds=0.02)
    assert crowding.spared() == 1
    for _ in range(2):  # with one thread less
        assert crowding.spared() == 1
        crowded_call(clock, after=0.01, seconds=0.1)
    assert crowding.spared() == 2
    clock[0] += 0.4
    assert crowding.spared() == 2
    clock[0] += 0.2
    assert crowding.spared() == 0


@pytest.mark.parametrize(
    ("after", "seconds", "calls"),
    [(0.3, 0.02, 9), (0.015, 0.004, 9), (0.001, 0.004, 2), (3, 0.5, 3), (0, 5, 1)],
)
def test_a_core_lost_now_and_then_spares_none(clock, after, seconds, calls):
    for _ in range(calls):
        crowded_call(clock, after, seconds)
        assert crowding.spared() == 0


@pytest.mark.parametrize(
    ("grid", "spared", "left"),
    [
        (Grid(2, 1, 4), 0, Grid(2, 1, 4)),
        (Grid(2, 1, 4), 1, Grid(2, 1, 3, threads=6)),
        (Grid(1, 1, 2), 1, Grid(1, 1, 1, threads=1)),
        (Grid(2, 3, 1), 1, Grid(2, 3, 1, threads=5)),
        (Grid(2, 1, 2), 1, Grid(2, 1, 1, threads=2)),
        (Grid(2, 1, 2), 3, Grid(2, 1, 1, threads=1)),
        (Grid(1, 4, 1), 9, Grid(1, 4, 1, threads=1)),
    ],
)
def test_threads_are_spared(monkeypatch, grid, spared, left):
    """Of those that share units first; then a thread takes on the places of several."""
    monkeypatch.setattr(crowding, "spared", lambda: spared)
    assert cpu_grid.thinned(grid) == left
    with cpu_library.override(grid=grid):
        assert cpu_grid.thinned(grid) == grid


def passes(p, grid):
    with cpu_library.override(grid=grid):
        forward = lstm_forward(*p[:5], True)
        return *forward, *lstm_backward(*p.outer, p.c0, p.batch_sizes, p.weights, *forward[3:])


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("instruction_set", BUILT)
def test_bits_do_not_depend_on_who_has_which_units(instruction_set, name):
    for sizes in ((4, 5, 9, 100), (3, 1, 5, 70), (1, 9, 5, 40)):
        for dtype in (torch.float32, torch.float64):
            p = problem(*sizes, **CLASSES[name]).to(dtype)
            with cpu_library.override(instruction_set=instruction_set):
                alone, *shared = (passes(p, Grid(1, 1, n)) for n in (1, 2, 3))
            for results in shared:
                assert all(map(torch.equal, results, alone)), (sizes, dtype)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("instruction_set", BUILT)
def test_bits_do_not_depend_on_who_has_which_sequences(instruction_set, name):
    D = CLASSES[name].get("D", 1)
    for sizes in ((4, 5, 9, 100), (3, 13, 5, 40), (6, 3, 5, 17)):
        p = problem(*sizes, **CLASSES[name]).to(torch.float32)
        with cpu_library.override(instruction_set=instruction_set):
            each, *several = (passes(p, Grid(D, 3, 1, n)) for n in (0, 1, 2))
        for results in several:
            assert all(map(torch.equal, results, each)), sizes


@pytest.mark.parametrize("instruction_set", BUILT)
@pytest.mark.parametrize(("I", "H"), [(40, 400), (300, 300)])
def test_bits_do_not_depend_on_where_the_input_part_is_made(instruction_set, I, H):
    """Two threads have few enough weights each to make it at its step, one has not."""
    p = problem(3, 8, I, H).to(torch.float32)
    with cpu_library.override(instruction_set=instruction_set):
        assert all(map(torch.equal, passes(p, Grid(1, 1, 1)), passes(p, Grid(1, 1, 2))))


@pytest.mark.parametrize("grid", [Grid(), Grid(1, 3, 1)])
@pytest.mark.parametrize("name", ["dense", "bidirectional", "packed", "diagonal"])
@pytest.mark.parametrize("instruction_set", BUILT)
def test_threads_take_on_the_shares_of_those_spared(monkeypatch, instruction_set, name, grid):
    monkeypatch.setattr(cpu_gradients, "chunk_rows", lambda *_: 9)
    monkeypatch.setattr(cpu_grid, "threads", lambda _: 4)
    monkeypatch.setattr(cpu_grid, "grid", lambda *_, **__: grid)
    for sizes in ((7, 5, 9, 50), (5, 3, 20, 17)):
        p = problem(*sizes, **CLASSES[name]).to(torch.float32)
        needs = True, True, True, *(w is not None for w in p.weights)
        y, _, _, gates, cells = lstm_forward(*p[:5], True)
        results = []
        for spared in (0, 1, 2, 5):
            monkeypatch.setattr(crowding, "spared", lambda n=spared: n)
            with cpu_library.override(instruction_set=instruction_set):
                found = lstm_gradients(
                    needs, p.outer, Primal(*p[:4], y, gates, cells, p.weights), keep_dpre=False
                )
            results.append([t for t in found if t is not None])
        for thinned in results[1:]:
            assert all(map(torch.equal, thinned, results[0])), sizes


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="only Linux keeps a process on one core"
)
@pytest.mark.parametrize(("T", "B", "shared"), [(1000, 1, "units"), (500, 16, "batches")])
def test_two_threads_on_one_core_notice(T, B, shared):
    """They would take turns. Soon there is one; and again two when asked later."""
    script = """
import os, sys
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
import torch, torch_manual
from torch_manual.kernels import cpu_grid, cpu_library, crowding
torch.set_num_threads(2)
T, B, two = int(sys.argv[1]), int(sys.argv[2]), cpu_library.Grid(**{sys.argv[3]: 2})
layer, x = torch_manual.LSTM(64, 64), torch.randn(T, B, 64)
def grid():
    return cpu_grid.thinned(cpu_grid.grid(T, B, T * B * 4 * 64 * 128, 64, 1))
assert grid() == two
with torch.no_grad():
    expected = layer(x)[0]
    for _ in range(40):
        assert torch.equal(layer(x)[0], expected)
assert grid().threads == 1
crowding._until = 0.0
assert grid() == two
"""
    subprocess.run([sys.executable, "-c", script, str(T), str(B), shared], check=True)
