"""Packed weights are kept from one inference call to the next, and are never stale."""

from __future__ import annotations

import copy
import threading
import time

import pytest
import torch
from torch.nn import Parameter

import kernel_problems
import torch_manual
from kernel_problems import BUILT, CLASSES, GRIDS
from torch_manual.kernels import cpu, cpu_library, memory, packed

pytestmark = pytest.mark.usefixtures("one_thread_and_nan_where_unwritten")


@pytest.fixture(autouse=True)
def all_are_kept(monkeypatch):
    monkeypatch.setattr(packed, "SMALLEST", 0)
    torch_manual.empty_cache()
    yield
    torch_manual.empty_cache()


def problem(*sizes, dtype=torch.float32, **kwargs):
    """One whose weights are parameters."""
    p = kernel_problems.problem(*sizes, **kwargs).to(dtype)
    weights = [None if w is None else Parameter(w, requires_grad=False) for w in p.weights]
    return p._replace(weights=weights)


def infer(p):
    with cpu_library.override(unpacked=False):
        return cpu.lstm_forward(*p[:5], False)[:3]


def packed_anew(p, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(packed, "key_of", lambda *_: None)
        return infer(p)


def equal(a, b):
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("instruction_set", BUILT)
def test_agrees_with_weights_packed_anew(instruction_set, name, dtype, monkeypatch):
    for sizes in ((4, 13, 9, 33), (1, 3, 5, 17), (1, 14, 5, 100)):
        p = problem(*sizes, dtype=dtype, **CLASSES[name])
        other = [None if w is None else w.neg() for w in p.weights]
        for grid in GRIDS:
            with cpu_library.override(instruction_set=instruction_set, grid=grid):
                for _ in range(2):
                    assert equal(infer(p), packed_anew(p, monkeypatch)), (sizes, grid)
                for w, changed in zip(p.weights, other, strict=True):
                    if w is not None:
                        w.data.copy_(changed)  # unnoticed by the version of w
                assert equal(infer(p), packed_anew(p, monkeypatch)), (sizes, grid)


@pytest.mark.parametrize("instruction_set", BUILT)
def test_agrees_after_a_change_of_any_panel(instruction_set, monkeypatch):
    """Of a large weight, whose last panel's place serves the others (csrc/packing.h)."""
    p = problem(2, 3, 300, 301)
    with cpu_library.override(instruction_set=instruction_set):
        for row in (None, 0, 300, 17, 150, 301 * 4 - 1, 301 * 3 - 1):
            if row is not None:
                for w in p.weights[:2]:
                    w[row, -1] += 1
            for _ in range(2):
                assert equal(infer(p), packed_anew(p, monkeypatch)), row


def test_the_second_call_finds_them():
    """Then what lies in the block is what counts."""
    p = problem(3, 4, 5, 20)
    y = infer(p)[0]
    ((block,),) = packed._free.values()
    numbers = block.view(torch.float32)
    numbers[: 4 * 16 * 5].mul_(2)  # the first panel of W_ih, or a part of it
    assert not torch.equal(infer(p)[0], y)
    assert [b.data_ptr() for (b,) in packed._free.values()] == [block.data_ptr()]
    p.weights[0].data.mul_(2)
    p.weights[0].data.mul_(0.5)
    assert not torch.equal(infer(p)[0], y), "the same numbers again: nothing to pack"
    torch_manual.empty_cache()
    assert torch.equal(infer(p)[0], y)


@pytest.mark.parametrize("instruction_set", BUILT)
def test_forward_mode_shares_them(instruction_set, monkeypatch):
    p = problem(4, 13, 9, 33, D=2, dtype=torch.float64)
    tangents = [None if t is None else t.flip(0) for t in (*p[:3], *p.weights)]

    def dual():
        out, tout = cpu.lstm_dual(*tangents[:3], tangents[3:], *p[:5], False)
        return *out, *tout

    with cpu_library.override(instruction_set=instruction_set):
        infer(p)
        addresses = [b.data_ptr() for (b,) in packed._free.values()]
        for _ in range(2):
            results = dual()
            assert [b.data_ptr() for (b,) in packed._free.values()] == addresses
            with monkeypatch.context() as patch:
                patch.setattr(packed, "key_of", lambda *_: None)
                assert equal(results, dual())
            p.weights[1].data.neg_()


def test_written_while_it_is_packed():
    """By another thread, and back again: no copy of what was there between is kept."""
    m = torch_manual.LSTM(512, 512).requires_grad_(False)
    given = [w.clone() for w in m.parameters()]
    other = [0.05 * torch.randn_like(w) for w in given]
    x = torch.randn(3, 30, 512)
    right, _ = m(x)

    def swap():
        while not done.is_set():
            for numbers in (other, given):
                for w, n in zip(m.parameters(), numbers, strict=True):
                    w.copy_(n)
                time.sleep(0.0003)

    for _ in range(15):
        done = threading.Event()
        thread = threading.Thread(target=swap)
        thread.start()
        for _ in range(30):
            m(x)
        done.set()
        thread.join()
        assert all(map(torch.equal, m.parameters(), given))
        assert torch.equal(m(x)[0], right)


def single_changes(w):
    yield from (lambda k=k: w.view(-1)[k].neg_() for k in range(0, w.numel(), 7))


def structured_changes(w):
    yield w.neg_
    yield lambda: w.copy_(w.flip(0))
    yield lambda: w.copy_(w.flip(1))
    yield lambda: w.copy_(w.roll(1, 0))
    yield lambda: w.copy_(w.roll(8, 1))
    yield lambda: w.copy_(w.roll(64, 1))
    yield lambda: w[:2].copy_(w[:2].flip(0))
    yield lambda: w[:, :2].neg_()
    yield lambda: w[0, ::16].neg_()  # all of one lane
    yield lambda: w.zero_()
    yield lambda: w.view(torch.int32).add_(1)  # all by the last bit: 1e-45 instead of 0
    yield lambda: w.view(torch.int32).bitwise_xor_(1 << 31)


@pytest.mark.parametrize("changes", [single_changes, structured_changes])
@pytest.mark.parametrize("instruction_set", BUILT)
def test_digests_differ(instruction_set, changes):
    """After every change the digest of some panel is one that no call before has had."""
    p = problem(2, 3, 130, 17)
    seen = set()
    with cpu_library.override(instruction_set=instruction_set):
        infer(p)
        for change in changes(p.weights[0]):
            change()
            infer(p)
            ((block,),) = packed._free.values()
            digests = tuple(digests_in(block, instruction_set, I=130, P=17, H=17))
            assert digests not in seen
            seen.add(digests)
    assert len(seen) > 10


@pytest.mark.parametrize("instruction_set", BUILT)
def test_changed_signs_change_the_digest(instruction_set):
    """Of two to four numbers, which may be a vector, a block or a row of either set apart."""
    p = problem(2, 3, 130, 17)
    flat = p.weights[0].view(-1)

    def digests():
        infer(p)
        ((block,),) = packed._free.values()
        return digests_in(block, instruction_set, I=130, P=17, H=17)

    with cpu_library.override(instruction_set=instruction_set):
        before = digests()
        for apart in (1, 2, 4, 8, 16, 17, 32, 33, 64, 128, 130, 256):
            for others in ((apart,), (apart - 1, apart), (apart, apart + 1), (1, apart, apart + 1)):
                for start in (0, 1, 40, 513, 1025, 2049):  # the last begin blocks that are not full
                    numbers = torch.tensor([start, *(start + k for k in others)]).unique()
                    flat.index_copy_(0, numbers, -flat[numbers])
                    after = digests()
                    assert after != before, numbers
                    before = after


def digests_in(block, instruction_set, I, P, H):
    lanes = {"avx512": 16, "avx2": 8, "baseline": 4}[instruction_set]
    panels = -(-H // lanes)
    start = panels * lanes * 4 * (I + P) * 4
    return block[start : start + 2 * panels * 8].view(torch.int64).tolist()


def doubled(m):
    return {name: v * 2 for name, v in m.state_dict().items()}


WRITES = {
    "optimizer": lambda m, w: torch.optim.SGD([w], 1.0).step(),
    "data.copy_": lambda m, w: w.data.copy_(w.data * 2),
    "data": lambda m, w: setattr(w, "data", w.data * 2),
    "numpy": lambda m, w: w.detach().numpy().__imul__(2),
    "load_state_dict": lambda m, w: m.load_state_dict(doubled(m)),
    "assign": lambda m, w: m.load_state_dict(doubled(m), assign=True),
    "no_grad": lambda m, w: w.detach().add_(1),
    "storage": lambda m, w: w.untyped_storage().copy_((w.detach() * 2).untyped_storage()),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(
    ("cls", "shape"), [(torch_manual.LSTM, (3, 40, 6)), (torch_manual.LSTMCell, (40, 6))]
)
@torch.no_grad()
def test_no_write_is_missed(cls, shape, write):
    m = cls(6, 20)
    w = next(m.parameters())
    x = torch.randn(shape)
    w.grad = torch.ones_like(w)
    before = m(x)[0]
    assert packed.kept_bytes() > 0
    assert torch.equal(m(x)[0], before)
    WRITES[write](m, w)
    after = m(x)[0]
    assert not torch.equal(after, before)
    fresh = copy.deepcopy(m)  # at other addresses
    assert torch.equal(after, fresh(x)[0])


def test_layers_that_take_turns_at_one_address():
    """A block is found by the address of its weights, which may be another layer's by now."""
    memory_of_weights = torch.empty(2, 80, 20)
    p = problem(3, 4, 20, 20)
    q = problem(3, 4, 20, 20, seed=1)
    results = {}
    for turn in range(4):
        given = (p, q)[turn % 2]
        memory_of_weights.copy_(torch.stack(given.weights[:2]))
        matrices = [Parameter(w, requires_grad=False) for w in memory_of_weights]
        shared = p._replace(weights=[*matrices, *p.weights[2:]])
        y = infer(shared)[0]
        assert torch.equal(results.setdefault(turn % 2, y), y)
    assert len(packed._free) == 1
    assert not torch.equal(results[0], results[1])


def test_threads_beside_one_another(monkeypatch):
    p = problem(5, 14, 30, 40)
    right = packed_anew(p, monkeypatch)
    wrong = []

    def work():
        for _ in range(200):
            if not equal(cpu.lstm_forward(*p[:5], False)[:3], right):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    with cpu_library.override(unpacked=False):  # once: it is the whole process's
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert not wrong
    assert 1 <= len(next(iter(packed._free.values()))) <= 8


def test_the_memory_is_bounded(monkeypatch):
    problems = [problem(2, 3, 10, 20 + n) for n in range(8)]
    infer(problems[0])
    one = packed.kept_bytes()
    monkeypatch.setattr(packed, "MOST_KEPT", 6 * one)
    for _ in range(2):
        for p in problems:
            infer(p)
            assert 0 < packed.kept_bytes() <= 6 * one
    keys = list(packed._free)
    infer(problems[-2])
    assert list(packed._free)[-1] == keys[-2], "the one used last is dropped last"
    monkeypatch.setattr(packed, "MOST_KEPT", 100)
    torch_manual.empty_cache()
    assert packed.kept_bytes() == memory.kept_bytes() == 0
    infer(problems[0])
    assert packed.kept_bytes() == 0


@torch.no_grad()
def test_temporary_weights_are_not_kept():
    """They would be found by chance, and hold the memory meanwhile."""
    m = torch_manual.LSTM(20, 30)
    x = torch.randn(20, 3, 20)
    torch.func.functional_call(m, {k: v.clone() for k, v in m.named_parameters()}, (x,))
    copy.deepcopy(m).bfloat16()(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        m(x)
    torch.nn.utils.parametrizations.weight_norm(m, "weight_hh_l0")
    m(x)
    assert packed.kept_bytes() == 0


@torch.no_grad()
def test_short_calls_read_the_weights_where_they_are():
    """Of few rows; from eight steps on they are read too often for that."""
    m = torch_manual.LSTM(20, 30)
    for T, B, keeps in ((1, 24, False), (4, 3, False), (7, 1, False), (8, 1, True), (1, 25, True)):
        torch_manual.empty_cache()
        m(torch.randn(T, B, 20))
        assert (packed.kept_bytes() > 0) == keeps, (T, B)


def test_training_keeps_none():
    m = torch_manual.LSTM(20, 30)
    m(torch.randn(20, 3, 20))[0].sum().backward()
    assert packed.kept_bytes() == 0
    with torch.no_grad():
        m(torch.randn(20, 3, 20))
    assert packed.kept_bytes() > 0
