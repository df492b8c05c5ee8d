"""The benchmark suite itself: statistics, refusals, files. No test asserts a time."""

import csv
import ctypes
import gc
import math
import os
import resource
from dataclasses import fields, replace
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import torch_manual
from benchmarks import __main__ as command
from benchmarks import cases, machine, measure, memory, products, report, table, worker
from benchmarks.cases import CASES, TARGETS, Case, Target
from benchmarks.check import Workload
from benchmarks.measure import Block, Round
from benchmarks.workload import Side, side
from torch_manual.kernels import cpu_library

SMALL = Case("dense", 3, 2, 4, 5)
ROW = report.Row(
    *("dense", "training", 3, 2, 4, 5, 5, "float32", 2, "training, dense float32"),
    stock_ms=3.0,
    ours_ms=2.0,
    ratio=1.5,
    limit_share=0.5,
    fma_peak_gflops=100.0,
    stock_mib=1.0,
    ours_mib=0.5,
)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_ratio_is_the_median_of_the_rounds_ratios():
    rounds = [Round(4.0, 2.0, True), Round(9.0, 3.0, True), Round(100.0, 10.0, True)]
    timing = measure.summarize(rounds)
    assert (timing.stock_ms, timing.ours_ms, timing.ratio) == (9e3, 3e3, 3.0)


def test_rejected_rounds_do_not_count():
    rounds = [Round(2.0, 1.0, True)] * 3 + [Round(50.0, 1.0, False)] * 9
    timing = measure.summarize(rounds)
    assert (timing.ratio, timing.rounds, timing.rejected, timing.noisy) == (2.0, 12, 9, False)


def test_too_few_clean_rounds_are_called_noisy():
    timing = measure.summarize([Round(2.0, 1.0, True)] * 2 + [Round(5.0, 1.0, False)] * 3)
    assert (timing.ratio, timing.noisy) == (5.0, True)


def test_rounds_alternate_and_both_blocks_are_to_be_clean():
    order = []
    clean = cycle([True, True, True, False])

    def stock():
        order.append("stock")
        return Block(2.0, next(clean))

    def ours():
        order.append("ours")
        return Block(1.0, next(clean))

    rounds = measure.interleaved(stock, ours, seconds=0.01)
    assert order[:8] == ["stock", "ours", "ours", "stock"] * 2
    assert [r.clean for r in rounds[:4]] == [True, False, True, False]
    assert {(r.stock, r.ours) for r in rounds} == {(2.0, 1.0)}


@pytest.mark.parametrize(
    ("clean", "expected"),
    [([True], 3), ([False, True], 6), ([False], 9)],
    ids=["all", "half", "none"],
)
def test_rounds_that_take_long_are_repeated_until_enough_are_clean(clean, expected):
    clean = cycle(clean)
    rounds = measure.interleaved(
        lambda: Block(1.0, next(clean)), lambda: Block(1.0, True), seconds=0.0
    )
    assert len(rounds) == expected


@pytest.mark.parametrize(
    ("lost", "ours", "clean"),
    [
        ((0.0, 0.0), (True, True), True),
        ((0.0, 100.0), (True, True), False),
        ((0.0, 0.0), (False, True), False),
        ((0.0, 0.0), (True, False), False),
    ],
    ids=["calm", "time lost", "shared before", "shared after"],
)
def test_lost_time_and_shared_cores_spoil_a_block(lost, ours, clean, monkeypatch):
    lost, ours = iter(lost), iter(ours)
    monkeypatch.setattr(measure, "lost_seconds", lambda: next(lost))
    monkeypatch.setattr(machine, "cores_are_ours", lambda: next(ours))
    calls = []
    run = measure.block(lambda: calls.append("step"), lambda: calls.append("before"), seconds=0.0)
    calls.clear()
    result = run()
    assert result.clean is clean
    assert result.seconds > 0
    assert calls == ["before", "step"]


@pytest.mark.parametrize(("threads", "lost", "clean"), [(1, 2, False), (2, 2, True), (2, 3, False)])
def test_a_block_may_lose_a_hundredth_of_the_time_of_its_threads(threads, lost, clean, monkeypatch):
    now, total = [0], iter((0, lost))
    monkeypatch.setattr(measure, "lost_seconds", lambda: next(total))
    monkeypatch.setattr(machine, "cores_are_ours", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def step():
        now[0] += 100

    assert measure.block(step)().clean is clean


def test_a_block_of_several_calls_is_warmed_up(monkeypatch):
    """And their number is not that of the first call of all, which takes long."""
    monkeypatch.setattr(machine, "cores_are_ours", lambda: True)
    calls, now = [], [0]

    def step():
        now[0] += 1 if calls else 1000
        calls.append("step")

    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    run = measure.block(step, seconds=3)
    assert len(calls) == 1 + (1 + 2 + 4)
    assert run().seconds == 1
    assert len(calls) == 1 + (1 + 2 + 4) + (1 + 4)


@pytest.mark.parametrize(
    ("alone", "together", "ours"), [(100, 200, True), (100, 100, False), (50, 100, False)]
)
def test_two_threads_on_one_core_are_noticed(alone, together, ours, monkeypatch):
    monkeypatch.setattr(machine.cpu_library, "status", lambda: "available")
    monkeypatch.setattr(machine, "_best_alone", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(machine, "_rate", lambda _, threads: {1: alone, 2: together}[threads])
    assert machine.cores_are_ours() is ours


def test_a_busy_machine_ends_the_row():
    rounds = measure.interleaved(lambda: Block(1.0, False), lambda: Block(1.0, True), 0.001)
    assert len(rounds) >= measure.MIN_ROUNDS
    assert measure.summarize(rounds).noisy


def test_lost_seconds_only_grow():
    before = measure.lost_seconds()
    assert 0.0 <= before <= measure.lost_seconds()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_every_case_agrees_with_stock(case):
    tiny = replace(case, T=min(case.T, 4), B=min(case.B, 3), I=min(case.I, 6), H=min(case.H, 8))
    if case.proj_size:
        tiny = replace(tiny, proj_size=3)
    workload = Workload(tiny)
    for pass_ in cases.PASSES:
        assert workload.disagreement(pass_) == ""
        assert cases.group(case, pass_) in {"", *TARGETS}


def test_labels_are_unique_and_every_target_has_cases():
    assert len({case.label for case in CASES}) == len(CASES)
    assert {cases.group(case, p) for case in CASES for p in cases.PASSES} == {"", *TARGETS}
    assert len(cases.quick(CASES)) == len(cases.QUICK_KINDS)


def test_lengths_are_long_tailed_and_flops_count_real_rows():
    packed = Case("packed", 400, 32, 8, 8, packed=True)
    lengths = packed.lengths()
    assert lengths[0] == 400
    assert lengths.median() < 100
    assert packed.flops("inference") == 2 * 4 * 8 * (8 + 8) * int(lengths.sum())
    assert packed.flops("training") == 3 * packed.flops("inference")


class WrongOutput(torch_manual.LSTM):
    def forward(self, input, hx=None):
        y, states = super().forward(input, hx)
        return y * 1.001, states


class NoNumbers(torch_manual.LSTM):
    def forward(self, input, hx=None):
        y, states = super().forward(input, hx)
        return y * math.nan, states


def with_layer(layer):
    workload = Workload(SMALL)
    torch.manual_seed(0)
    workload.ours = Side(SMALL, layer(SMALL.I, SMALL.H), torch.float32)
    return workload


@pytest.mark.parametrize("layer", [WrongOutput, NoNumbers])
def test_a_wrong_output_is_named(layer):
    assert with_layer(layer).disagreement("inference").startswith("y: error")


def test_a_wrong_gradient_is_named():
    workload = Workload(SMALL)
    workload.ours.module.weight_hh_l0.register_hook(lambda grad: grad * 1.01)
    assert workload.disagreement("inference") == ""
    assert workload.disagreement("training").startswith("dweight_hh_l0: error")


def test_a_wrong_case_is_not_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "Workload", lambda case: with_layer(WrongOutput))
    monkeypatch.setattr(command, "timed", lambda *_: pytest.fail("timed a wrong result"))
    assert command.main(["--filter", "dense T128 B16 ", "--out", str(tmp_path)]) == 1
    with (tmp_path / "cpu.csv").open() as file:
        assert all(row["status"].startswith("WRONG: y") for row in csv.DictReader(file))
    assert "WRONG" in capsys.readouterr().out


def test_reports_parse(tmp_path):
    rows = [ROW, replace(ROW, pass_="inference", ratio=0.5), replace(ROW, T=9, status="noisy")]
    report.write(tmp_path, "cpu", rows, {"CPU": "a test"}, TARGETS)
    with (tmp_path / "cpu.csv").open() as file:
        parsed = list(csv.DictReader(file))
    assert list(parsed[0])[:3] == ["case", "pass", "T"]
    assert len(parsed[0]) == len(fields(report.Row))
    assert [row["ratio"] for row in parsed] == ["1.5", "0.5", "1.5"]
    text = (tmp_path / "cpu.md").read_text()
    assert "**0.50 ▼**" in text
    assert "1.50 (noisy)" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("| dense")}) == 1
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu.csv", "cpu.md", "cpu.png"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    (tmp_path / "a.md").write_text("old")
    with pytest.raises(OSError, match="disk full"):
        table.write_atomically(tmp_path / "a.md", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["a.md"]
    assert (tmp_path / "a.md").read_text() == "old"


def test_ratios_with_memory_kept_stand_beside_the_verdict():
    rows = [replace(ROW, ratio_kept=2.0), replace(ROW, ratio_kept=8.0)]
    (verdict,) = report.verdicts(rows, {ROW.group: Target(1.0, 1.5)})
    assert (verdict.minimum_kept, verdict.mean_kept) == (2.0, pytest.approx(4.0))
    assert verdict.cells[-2:] == ("2.00", "4.00")
    (verdict,) = report.verdicts([ROW], {ROW.group: Target(1.0, 1.5)})
    assert verdict.cells[-2:] == ("—", "—")


@pytest.mark.parametrize(
    ("ratios", "status", "outcome"),
    [
        ((1.0, 4.0), "", "met"),
        ((0.9, 9.0), "", "missed"),
        ((1.0, 1.1), "", "missed"),
        ((1.0, None), "WRONG: y", "missed"),
        ((1.0, 4.0), "noisy", "unknown: 1 noisy"),
    ],
)
def test_verdicts(ratios, status, outcome):
    rows = [replace(ROW, ratio=ratios[0]), replace(ROW, ratio=ratios[1], status=status)]
    other = [replace(ROW, threads=1, ratio=0.1), replace(ROW, group="", ratio=0.1)]
    (verdict,) = report.verdicts(rows + other, {ROW.group: Target(1.0, 1.5)})
    assert verdict.outcome == outcome
    assert verdict.minimum == min(r or 0.0 for r in ratios)
    assert verdict.mean == pytest.approx(math.sqrt(ratios[0] * (ratios[1] or 0.0)))


def test_an_unknown_filter_is_one_clear_line(capsys):
    assert command.main(["--filter", "no such case"]) == 2
    assert capsys.readouterr().err == "benchmarks: no case matches --filter 'no such case'\n"


def test_the_filter_takes_a_case_and_a_pass(monkeypatch, tmp_path):
    seen = []

    def rows_of(case, passes, threads, seconds):
        seen.append((case.label, passes))
        return [ROW]

    monkeypatch.setattr(command, "rows_of", rows_of)
    arguments = ["--filter", "proj_size t100 b8 i64 h128 p32 TRAINING", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    assert seen == [("proj_size T100 B8 I64 H128 P32", ["training"])]


def test_only_a_full_run_replaces_the_published_results():
    assert command.parse([]).out == command.RESULTS
    assert command.parse(["--quick"]).out == command.PARTIAL_RESULTS
    assert command.parse(["--filter", "dense"]).out == command.PARTIAL_RESULTS


def fresh_pages_of_a_large_block():
    """As many as 40 MiB have, unless malloc has kept those of the block before."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = libc.malloc(40 << 20)
        ctypes.memset(block, 1, 40 << 20)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_both_sides_run_in_processes_of_their_own():
    timing, peak = command.timed(SMALL, "training", 1, 0.001, keep_memory=False)
    assert timing.rounds >= measure.MIN_ROUNDS
    assert timing.ratio > 0
    assert (peak is None) == (cpu_library.status() != "available")
    with worker.worker(SMALL, "ours", "training", 2, keep_memory=False) as process:
        assert process.submit(os.getpid).result() != os.getpid()
        assert process.submit(torch.get_num_threads).result() == 2
        assert process.submit(gc.isenabled).result() is False


@pytest.mark.skipif(not worker.malloc_can_keep_memory(), reason="needs glibc's mallopt")
@pytest.mark.parametrize("keep_memory", [False, True], ids=["default", "memory kept"])
def test_malloc_keeps_memory_where_it_is_told_to(keep_memory):
    with worker.worker(SMALL, "ours", "training", 1, keep_memory) as process:
        fresh_pages = process.submit(fresh_pages_of_a_large_block).result()
    assert (fresh_pages < 100) is keep_memory


@pytest.mark.skipif(not memory.RESET_PEAK.exists(), reason="needs Linux's /proc")
def test_memory_counts_what_training_keeps():
    case = Case("dense", 200, 32, 64, 64)
    kept = 200 * 32 * 64 * 4 / 2**20  # y alone
    inference, training = (memory.peak_mib(case, "stock", p, 1) for p in cases.PASSES)
    assert inference > 0.5 * kept
    assert training > inference + 4 * kept


def test_sides_start_alike():
    stock, ours = side(SMALL, "stock"), side(SMALL, "ours")
    for a, b in zip(stock.leaves, ours.leaves, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(cpu_library.status() != "available", reason="no CPU kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_multiply_adds_are_counted(dtype):
    for instruction_set in cpu_library.INSTRUCTION_SETS[
        cpu_library.INSTRUCTION_SETS.index(cpu_library.instruction_set()) :
    ]:
        with cpu_library.override(instruction_set=instruction_set):
            one = cpu_library.multiply_add(dtype, 1, 100)
            assert one > 0
            assert cpu_library.multiply_add(dtype, 2, 300) == 6 * one


def test_products_are_the_operations_that_are_counted():
    with FlopCounterMode(display=False) as counter:
        products.products(SMALL)()
    assert counter.get_total_flops() == SMALL.flops("training")


def test_rows_are_printed_and_written(tmp_path, capsys):
    path = tmp_path / "new" / "a.md"
    table.print_and_write(path, "Title", ("what", "ms"), iter([("a", "1"), ("b", "2")]))
    assert capsys.readouterr().out == f"a  1\nb  2\nwritten: {path}\n"
    title, *facts, head, rule, a, b = [s for s in path.read_text().splitlines() if s]
    assert (title, head, rule) == ("# Title", "| what | ms |", "| --- | --- |")
    assert (a, b) == ("| a | 1 |", "| b | 2 |")
    assert "- threads: 1" in facts
