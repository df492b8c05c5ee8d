"""The compiled CPU kernel: every shape class, sharing among threads, instruction set and dtype.

The plain-torch op in float64 says what is right; it is itself checked elsewhere against the
reference and finite differences. One test here goes round it, to `reference.py`.
"""

import copy
import gc
import itertools
import os
import platform
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import reference
import torch_manual
from kernel_problems import BUILT, CLASSES, GRIDS, SIZES, error, plain, problem
from torch_manual.kernels import cpu, cpu_grid, cpu_library
from torch_manual.kernels import lstm as ops
from torch_manual.kernels.cpu_library import Grid

pytestmark = pytest.mark.usefixtures("one_thread_and_nan_where_unwritten")


def compiled(p, saved):
    forward = cpu.lstm_forward(*p[:5], True)
    return forward, cpu.lstm_backward(*p.outer, p.c0, p.batch_sizes, p.weights, *saved)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("instruction_set", BUILT)
def test_agrees_with_plain_torch(instruction_set, name, dtype):
    for sizes in SIZES:
        p = problem(*sizes, **CLASSES[name])
        forward, backward = plain(p)
        bound = torch.full((9,), 1e-12)
        if dtype == torch.float32:
            forward_32, backward_32 = plain(p.to(dtype))
            bound = 3 * error([*forward_32, *backward_32], [*forward, *backward]) + 2e-6
        given = p.to(dtype)
        for grid, unpacked in itertools.product(GRIDS, (False, True)):
            with cpu_library.override(
                instruction_set=instruction_set, grid=grid, unpacked=unpacked
            ):
                ours = compiled(given, [t.to(dtype) for t in forward[3:]])
                inferred = cpu.lstm_forward(*given[:5], False)
            assert (error([*ours[0], *ours[1]], [*forward, *backward]) <= bound).all(), (
                sizes,
                grid,
            )
            for a, b in zip(inferred[:3], ours[0][:3], strict=True):
                assert torch.equal(a, b), (sizes, grid)


@pytest.mark.parametrize("instruction_set", BUILT)
def test_long_sums_and_many_chunks(instruction_set):
    for sizes, kind in itertools.product(
        ((150, 5, 3, 9), (3, 7, 300, 272)), ({}, {"packed": True})
    ):
        p = problem(*sizes, **kind)
        forward, backward = plain(p)
        for grid in GRIDS:
            with cpu_library.override(instruction_set=instruction_set, grid=grid):
                ours = compiled(p, forward[3:])
                inferred = cpu.lstm_forward(*p[:5], False)
            assert (error([*ours[0], *ours[1]], [*forward, *backward]) < 1e-10).all(), grid
            assert torch.equal(inferred[0], ours[0][0])


@pytest.mark.parametrize("sizes", [(3, 14, 521, 263), (1, 20, 30, 363), (1, 70, 5, 17)], ids=str)
@pytest.mark.parametrize("instruction_set", BUILT)
def test_agrees_where_weights_outgrow_the_caches_or_one_step_packs_them(instruction_set, sizes):
    """The next panel is prefetched above 1 MiB; a single step packs W_hh for many sequences."""
    p = problem(*sizes)
    forward, backward = plain(p)
    for grid in (Grid(), Grid(1, 1, 2)):
        with cpu_library.override(instruction_set=instruction_set, grid=grid, unpacked=False):
            ours = compiled(p, forward[3:])
        assert (error([*ours[0], *ours[1]], [*forward, *backward]) < 1e-11).all(), grid


@pytest.mark.parametrize("given", range(16))
def test_any_gradient_from_outside_may_be_missing(given):
    p = problem(4, 3, 2, 5, D=2, packed=True)
    outer = tuple(t if given >> k & 1 else None for k, t in enumerate(p.outer))
    p = p._replace(outer=outer)
    forward, backward = plain(p)
    assert (error(compiled(p, forward[3:])[1], backward) < 1e-12).all()


def test_outer_gradients_and_inputs_of_any_layout():
    p = problem(4, 6, 3, 5)
    dy = p.outer[0]
    layouts = {
        "one number": torch.ones(()).double().expand_as(dy),
        "one row": dy[:1].expand_as(dy),
        "one column": dy[:, :1].expand_as(dy),
        "transposed": dy.T.contiguous().T,
        "part of wider rows": torch.cat([dy, dy], 1)[:, : dy.shape[1]],
    }
    for name, laid_out in layouts.items():
        q = p._replace(
            x=p.x.T.contiguous().T,
            h0=p.h0.mT.contiguous().mT,
            weights=[w if w is None or w.dim() == 1 else w.T.contiguous().T for w in p.weights],
            outer=(laid_out, *p.outer[1:]),
        )
        forward, backward = plain(q)
        ours = compiled(q, forward[3:])
        assert (error([*ours[0], *ours[1]], [*forward, *backward]) < 1e-12).all(), name


def test_empty_batch():
    x, state, dpre = torch.zeros(0, 3), torch.zeros(1, 0, 4), torch.zeros(1, 0, 16)
    weights = problem(1, 1, 3, 4).to(torch.float32).weights
    y, h_n, _, gates, cells = cpu.lstm_forward(x, state, state, None, weights, True)
    assert (y.shape, h_n.shape, gates.shape) == ((0, 4), (1, 0, 4), (1, 0, 16))
    outer = (y, None, None, None)
    assert cpu.lstm_backward(*outer, state, None, weights, gates, cells)[0].shape == dpre.shape


@pytest.mark.parametrize("peepholes", [0, 1, 2])
def test_against_the_reference(peepholes):
    """The module on the forced kernel, against step equations under autograd."""
    T, B, I, H = 5, 4, 3, 7
    kind = {0: {}, 1: {"peephole": "diagonal"}, 2: {"peephole": "full"}}[peepholes]
    layer = torch_manual.PeepholeLSTM if peepholes else torch_manual.LSTM
    torch.manual_seed(0)
    m = layer(I, H, num_layers=2, bidirectional=True, proj_size=3, dtype=torch.float64, **kind)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    h0, c0 = (torch.randn(4, B, n, dtype=torch.float64, requires_grad=True) for n in (3, H))
    inputs = [x, h0, c0, *m.parameters()]
    lengths = [5, 3, 3, 1]
    with torch_manual.use_backend("cpu"):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths)
        y, (h_n, c_n) = m(packed, (h0, c0))
        y = nn.utils.rnn.pad_packed_sequence(y)[0]
        ours = (y, h_n, c_n)
        ours_grad = torch.autograd.grad(sum(t.cos().sum() for t in ours), inputs)
    params = dict(m.named_parameters())
    right = reference.lstm(x, h0, c0, params, 2, True, lengths)[:3]
    right_grad = torch.autograd.grad(sum(t.cos().sum() for t in right), inputs)
    assert (error([*ours, *ours_grad], [*right, *right_grad]) < 1e-12).all()


@pytest.mark.parametrize("sizes", [(30, 16, 64, 64), (10, 8, 512, 512), (100, 4, 16, 32)])
def test_no_less_accurate_than_stock(sizes):
    T, B, I, H = sizes
    errors = {"stock": 0, "ours": 0}
    for seed in range(8):
        torch.manual_seed(seed)
        exact = nn.LSTM(I, H, dtype=torch.float64)
        x = torch.randn(T, B, I, dtype=torch.float64)
        modules = {"exact": exact, "stock": nn.LSTM(I, H), "ours": torch_manual.LSTM(I, H)}
        results = {}
        for name, m in modules.items():
            m.load_state_dict(exact.state_dict())
            given = x.to(m.weight_ih_l0.dtype).requires_grad_()
            y, (h_n, c_n) = m(given)
            grads = torch.autograd.grad(y.cos().sum(), [given, *m.parameters()])
            results[name] = [y.detach(), h_n.detach(), c_n.detach(), *grads]
        for name in errors:
            errors[name] = errors[name] + error(results[name], results["exact"])
    # Sums of largest errors of y, h_n, c_n and the gradients; a tenth is the noise of few draws.
    assert (errors["ours"] <= 1.1 * errors["stock"]).all(), errors["ours"] / errors["stock"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("instruction_set", BUILT)
def test_input_part_beforehand_or_at_its_step(instruction_set, dtype):
    """A dense batch makes it in registers, one packed from equal lengths beforehand: equal bits."""
    for T, B, I, H in ((7, 6, 40, 33), (5, 13, 300, 100), (40, 4, 3, 8)):
        dense = problem(T, B, I, H, D=2, peepholes=1).to(dtype)
        packed = dense._replace(batch_sizes=torch.full((T,), B))
        with cpu_library.override(instruction_set=instruction_set):
            results = (cpu.lstm_forward(*p[:5], True) for p in (dense, packed))
            for a, b in zip(*results, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_go_where_they_go_in_stock(bad):
    torch.manual_seed(0)
    stock = nn.LSTM(5, 33)
    ours = torch_manual.LSTM(5, 33)
    ours.load_state_dict(stock.state_dict())
    clean = copy.deepcopy(stock.state_dict())
    for where in ("x", "h0", "c0", "weight_hh_l0", "bias_ih_l0"):
        x, h0, c0 = torch.randn(6, 9, 5), torch.randn(1, 9, 33), torch.randn(1, 9, 33)
        state = copy.deepcopy(clean)
        {"x": x, "h0": h0, "c0": c0, **state}[where].view(-1)[20] = bad
        results = []
        for m in (stock, ours):
            m.load_state_dict(state)
            x.grad = None
            y, (h_n, c_n) = m(x.requires_grad_(), (h0, c0))
            (dx,) = torch.autograd.grad(y.sum(), x)
            results.append((y, h_n, c_n, dx))
            x = x.detach()
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-5, msg=where)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("closed", ["i", "o"])
def test_a_closed_gate_hides_no_nan(closed, dtype):
    bias = torch.zeros(4, 5, dtype=dtype)  # i, f, g, o
    bias["ifgo".index(closed)] = -1000.0
    bias[2] = float("nan")
    results = []
    for cls in (torch_manual.LSTM, nn.LSTM):
        m = cls(1, 5, dtype=dtype)
        with torch.no_grad():
            m.bias_ih_l0.copy_(bias.flatten())
            y, (h_n, c_n) = m(torch.ones(3, 2, 1, dtype=dtype))
        results.append((y.isnan(), h_n.isnan(), c_n.isnan()))
    for ours, stock in zip(*results, strict=True):
        assert ours.all()
        assert stock.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("huge", [float("inf"), 1e30])
def test_closed_gates_pass_nothing_on(huge, dtype):
    """A gate at 1 has no slope at all, which an h_0 beyond all bounds would be multiplied with."""
    for seed in range(8):
        torch.manual_seed(seed)
        stock = nn.LSTM(4, 33, dtype=dtype)
        ours = torch_manual.LSTM(4, 33, dtype=dtype)
        ours.load_state_dict(stock.state_dict())
        x, h0, c0 = (torch.randn(1, 3, n, dtype=dtype) for n in (4, 33, 33))
        h0[0, 1, 3] = huge
        results = [
            torch.autograd.grad(m(x, (h0, c0))[0].square().sum(), m.weight_hh_l0)[0]
            for m in (stock, ours)
        ]
        torch.testing.assert_close(*results, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_a_library_of_other_sources_is_refused():
    with pytest.raises(RuntimeError, match="was compiled from other sources than these: build it"):
        cpu_library.call("lstm_forward", torch.float32, bytes(8 * cpu.FORWARD_WORDS - 8))


def test_views_that_negate():
    """`torch._neg_view`, as of `z.conj().imag`, is another number than its memory holds."""
    torch.manual_seed(0)
    m, cell = torch_manual.LSTM(3, 9), torch_manual.LSTMCell(3, 9)
    x, h0, c0, dy = (torch.randn(s) for s in ((5, 2, 3), (1, 2, 9), (1, 2, 9), (5, 2, 9)))
    negated = [torch._neg_view(t) for t in (x, h0, c0, dy)]
    results = []
    for x, h0, c0, dy in (negated, [t.resolve_neg() for t in negated]):
        y = m(x, (h0, c0))[0]
        with torch.no_grad():
            inferred = m(x, (h0, c0))[0]
        stepped = cell(x[0], (h0[0], c0[0]))
        gradients = torch.autograd.grad(y, [*m.parameters()], dy)
        results.append((y, inferred, *stepped, *gradients))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_freed_weights_are_refused():
    m, x = torch_manual.LSTM(3, 9), torch.randn(5, 2, 3)
    y, _ = m(x)
    m.weight_hh_l0.untyped_storage().resize_(0)
    for run in (lambda: m(x), y.sum().backward):
        with pytest.raises(RuntimeError, match=r"a tensor of shape \(36, 9\) has no memory"):
            run()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(dtype):
    p = problem(5, 4, 3, 17, D=2, packed=True).to(dtype)
    forward, backward = plain(p)
    ours = compiled(p, forward[3:])
    for a, b in zip([*ours[0], *ours[1]], [*forward, *backward], strict=True):
        assert a.dtype == dtype
        # one rounding to half precision apart
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def _change_by_optimizer(m):
    m(torch.randn(2, 3, 4))[0].sum().backward()
    torch.optim.SGD(m.parameters(), lr=0.5).step()


def _change_by_data(m):
    for p in m.parameters():
        p.data.copy_(torch.randn_like(p))


def _change_by_state_dict(m):
    m.load_state_dict({k: torch.randn_like(v) for k, v in m.state_dict().items()})


def _change_in_place(m):
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(-2)


def _change_through_numpy(m):
    for p in m.parameters():
        p.detach().numpy()[:] += 1


@pytest.mark.parametrize(
    "change",
    [
        _change_by_optimizer,
        _change_by_data,
        _change_by_state_dict,
        _change_in_place,
        _change_through_numpy,
    ],
)
def test_changed_weights_are_seen(change):
    torch.manual_seed(0)
    m = torch_manual.LSTM(4, 5)
    for T in (1, 2, 40):
        x = torch.randn(T, 3, 4)
        with torch.no_grad():
            before = m(x)[0]
            with torch.enable_grad():
                change(m)
            after = m(x)[0]
            with torch_manual.use_backend("eager"):
                right = m(x)[0]
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after, right)


def test_eight_threads_at_once():
    shapes = [(20, 8, 16, 40), (9, 3, 5, 100), (30, 1, 7, 64), (1, 4, 6, 33)] * 2
    problems = [problem(*s, D=2, seed=k) for k, s in enumerate(shapes)]
    rights = [plain(p) for p in problems]
    wrong = []

    def work(k):
        for n in range(12):
            ours = compiled(problems[k], rights[k][0][3:])
            if not (error([*ours[0], *ours[1]], [*rights[k][0], *rights[k][1]]) < 1e-11).all():
                wrong.append((k, n))

    for grid in (Grid(), Grid(1, 2, 1), Grid(1, 1, 2)):
        with cpu_library.override(grid=grid):
            threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
    assert wrong == []


@pytest.mark.parametrize("before", ["infers", "trains"])
def test_after_fork(before):
    """A forked child, whose OpenMP threads are gone, computes as its parent does, on new ones.

    Of a parent that has trained it finds no packed weights yet.
    """
    torch.manual_seed(0)
    m = torch_manual.LSTM(64, 256)
    x = torch.randn(20, 32, 64)
    torch.use_deterministic_algorithms(False)  # it fills with NaN, on torch's own threads
    torch.set_num_threads(2)
    torch_manual.empty_cache()
    two = Grid(units=2)  # chosen by shape, it may be thinned where a core is busy
    with torch.set_grad_enabled(before == "trains"), cpu_library.override(grid=two):
        right = m(x)[0].detach().numpy()
    with torch.no_grad(), cpu_library.override(grid=two):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                close = abs(m(x)[0].numpy() - right).max() < 1e-6
                tasks = Path("/proc/self/task")
                alone = tasks.exists() and len(list(tasks.iterdir())) < 3
                os.write(write, b"wrong" if not close else b"alone" if alone else b"right")
            finally:
                os._exit(0)
    os.close(write)
    answered = select.select([read], [], [], 60)[0]
    answer = os.read(read, 5) if answered else b"hangs"
    if not answered:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(read)
    assert answer == b"right"


def test_a_signal_in_a_forked_child_waits_for_the_kernel(monkeypatch):
    """What a handler raises would free the tensors that are being written."""
    written = []

    class Interrupted(Exception):
        pass

    def kernel():
        time.sleep(0.5)
        written.append(True)
        return 0

    def interrupt(*_):
        raise Interrupted

    torch.set_num_threads(2)
    monkeypatch.setattr(cpu_library, "_forked", True)
    monkeypatch.setattr(cpu_library, "_caller", None)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(Interrupted):
            cpu_library._run(kernel)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert written


def test_two_live_graphs_and_a_second_backward():
    torch.manual_seed(0)
    m = torch_manual.LSTM(3, 9, dtype=torch.float64)
    x1, x2 = (torch.randn(7, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with torch_manual.use_backend("eager"):
        right = [torch.autograd.grad(m(x)[0].sum(), x)[0] for x in (x1, x2)]
    y1, y2 = m(x1)[0], m(x2)[0]
    for _ in range(2):
        for x, y, dx in ((x2, y2, right[1]), (x1, y1, right[0])):
            (ours,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
            torch.testing.assert_close(ours, dx)


def test_memory_does_not_grow():
    m = torch_manual.LSTM(4, 8)
    x = torch.randn(3, 2, 4)

    def calls(n):
        for _ in range(n):
            m(x)[0].sum().backward()
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = calls(500)
    assert calls(10_000) - before < 4 << 10  # KiB; 430 bytes lost a call would show


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_large_calls_is_given_back():
    """A borrowed block is kept for the next call if not too large, until a larger one is."""
    layers = [torch_manual.LSTM(8, H) for H in (300, 600, 2100)]
    x = torch.randn(14, 1, 8)

    def calls(n):
        for _ in range(n):
            for m in layers:
                m(x)[0].sum().backward()
        pages = Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()

    before = calls(3)
    assert calls(9) - before < 24 << 20


def test_backend_choice():
    p = problem(3, 2, 4, 5)
    calls = []
    original = cpu.lstm_forward
    cpu.lstm_forward = lambda *a: calls.append(1) or original(*a)
    try:
        for name, expected in (("auto", 1), ("cpu", 1), ("eager", 0)):
            calls.clear()
            with torch_manual.use_backend(name):
                ops.lstm_forward(*p[:5], False)
            assert len(calls) == expected, name
    finally:
        cpu.lstm_forward = original
    odd = p.to(torch.complex64)
    with (
        torch_manual.use_backend("cpu"),
        pytest.raises(RuntimeError, match=r"'cpu' kernel has no code for torch\.complex64"),
    ):
        ops.lstm_forward(*odd[:5], False)


def test_threads_are_those_of_torch():
    """The number of threads that OpenMP makes follows torch.set_num_threads."""
    script = """
import os, torch, torch_manual
from torch_manual.kernels import cpu_grid, cpu_library
torch.set_num_threads(3)
with torch.no_grad():
    torch_manual.LSTM(64, 256)(torch.randn(20, 32, 64))
assert cpu_grid.grid(20, 32, 20 * 32 * 4 * 256 * 320, 256, 1) != cpu_library.Grid()
torch.set_num_threads(1)
assert cpu_grid.grid(20, 32, 20 * 32 * 4 * 256 * 320, 256, 1) == cpu_library.Grid()
with open("/proc/self/maps") as maps:
    runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line}
assert len(runtimes) <= 1, runtimes
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ})


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"),
    reason="elsewhere denormals are as fast, and kept",
)
@pytest.mark.parametrize("instruction_set", BUILT)
@pytest.mark.parametrize("grid", [Grid(), Grid(1, 1, 2)])
def test_denormals_are_zeros_within(instruction_set, grid):
    """In every thread of a call, and not after it."""
    layer = torch_manual.LSTM(5, 40)
    results = []
    with cpu_library.override(instruction_set=instruction_set, grid=grid):
        for scale in (0.0, 1e-40):
            x = torch.full((9, 3, 5), scale, requires_grad=True)
            h = c = torch.full((1, 3, 40), scale)
            layer.zero_grad()
            y, (h_n, c_n) = layer(x, (h, c))
            dy = torch.zeros_like(y)
            dy[-1] = 1e-36  # decays to denormals on its way
            y.backward(dy)
            results.append([y, h_n, c_n, x.grad, *(p.grad for p in layer.parameters())])
    for of_zero, of_denormal in zip(*results, strict=True):
        assert torch.equal(of_zero, of_denormal)
    gradients = torch.cat([t.flatten() for t in results[0][3:]]).abs()
    smallest = torch.finfo(torch.float32).tiny
    assert gradients.max() > smallest
    assert not ((gradients > 0) & (gradients < smallest)).any()
    assert (torch.full((4,), 1e-40) * 0.5 > 0).all()


@pytest.mark.parametrize(
    ("cache", "n", "B", "H", "forward", "backward"),
    [
        (1 << 20, 2, 8, 256, Grid(1, 2, 1), Grid(1, 2, 1)),
        (1 << 20, 2, 7, 256, Grid(1, 1, 2), Grid(1, 1, 2)),  # fewer than four rows for a thread
        (1 << 20, 2, 64, 300, Grid(1, 1, 2), Grid(1, 1, 2)),
        (2 << 20, 2, 64, 128, Grid(1, 2, 1), Grid(1, 2, 1)),
        (2 << 20, 2, 64, 256, Grid(1, 1, 2), Grid(1, 2, 1)),  # 2 MiB of weights; backward, 1 MiB
        (2 << 20, 8, 64, 256, Grid(1, 4, 2), Grid(1, 8, 1)),
        (2 << 20, 3, 64, 256, Grid(1, 1, 3), Grid(1, 3, 1)),
        (2 << 20, 2, 32, 512, Grid(1, 1, 2), Grid(1, 2, 1)),  # 4 MiB for sixteen rows
        (2 << 20, 2, 31, 512, Grid(1, 1, 2), Grid(1, 1, 2)),
        (2 << 20, 2, 64, 513, Grid(1, 1, 2), Grid(1, 1, 2)),
        (1 << 20, 2, 3, 33, Grid(1, 2, 1), Grid(1, 2, 1)),
        (1 << 20, 8, 3, 48, Grid(1, 3, 1), Grid(1, 3, 1)),
        (1 << 20, 2, 2, 96, Grid(1, 1, 2), Grid(1, 2, 1)),
        (1 << 20, 2, 1, 64, Grid(1, 1, 2), Grid(1, 1, 2)),
        (1 << 20, 2, 1, 96, Grid(1, 1, 2), Grid(1, 1, 2)),
        (1 << 20, 2, 1, 32, Grid(), Grid()),
    ],
)
def test_what_threads_share(monkeypatch, cache, n, B, H, forward, backward):
    monkeypatch.setattr(cpu_library, "second_level_cache", lambda: cache)
    monkeypatch.setattr(cpu_grid, "threads", lambda work: n)
    T = 100
    assert cpu_grid.grid(T, B, T * B * 4 * H * 2 * H, H, 1) == forward
    assert cpu_grid.grid(T, B, T * B * 4 * H * H, H, 1, backward=True) == backward


def test_says_why_it_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu_library, "FOLDER", tmp_path)
    monkeypatch.setattr(cpu_library, "_status", None)
    monkeypatch.setattr(cpu_library, "_libraries", {})
    assert "was not compiled" in torch_manual.backends()["cpu"]
    assert not cpu_library.serves(torch.float32)
    torch_manual.LSTM(3, 4)(torch.randn(5, 2, 3))[0].sum().backward()
    with pytest.raises(RuntimeError, match="'cpu' is not available: it was not compiled"):
        torch_manual.use_backend("cpu")
