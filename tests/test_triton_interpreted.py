"""The Triton kernels on CPU tensors, through the public modules, in Triton's interpreter.

TRITON_INTERPRET=1 must be set before the kernels are imported, so tests/test_triton.py runs this
file in a process of its own. By hand: `TRITON_INTERPRET=1 pytest tests/test_triton_interpreted.py`.
"""

import contextlib
import importlib.util
import os
import threading

import pytest
import torch
from torch.func import functional_call

import torch_manual
from cases import CASES, SAMPLES, Sample, cotangents, gradients, run, run_reference

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by tests/test_triton.py, interpreted", allow_module_level=True)

import triton
import triton.language as tl
from torch_manual.triton_kernels import _math
from torch_manual.triton_kernels.lstm import gates, sequence, step, step_backward

import triton_interpreter
from torch_manual.kernels import triton as launcher
from torch_manual.kernels.triton_levels import plan_at

triton_interpreter.mend_bfloat16()
triton_interpreter.keep_language_patched()

LSTM, DIAGONAL, FULL = CASES
BY_ID = {sample.id: sample for sample in SAMPLES}
# more sequences than a block has, units that are no power of two and more than a block has
ODD = Sample("T3-B17-I5-H21", 3, 17, 5, 21)
WIDE = Sample("T2-B9-I3-H37", 2, 9, 3, 37)  # L1 in fp32 takes 8 sequences from H = 33 on
LENGTHS = (3, 1, 2) * 5 + (2, 2)
PACKED = Sample("packed-B17-H21", 3, 17, 3, 21, {"bidirectional": True}, LENGTHS)
ONE_WAY = Sample("packed-B17-H21-one-way", 3, 17, 3, 21, {}, LENGTHS)
REVERSE = Sample("reverse", 2, 2, 2, 3, {"bidirectional": True})
SMALL = Sample("T2-B1-I1-H2", 2, 1, 1, 2, {"bias": False})
ONE = Sample("T1-B3-I2-H5", 1, 3, 2, 5)
SHAPES = [ODD, WIDE, PACKED, ONE, BY_ID["no-bias"], BY_ID["packed-reverse-proj"]]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def level(n, block=None, slices=1):
    """Let level `n` serve what it can; with `block`, in those blocks."""

    def choose(shape, chip):
        plan = plan_at(n, shape, chip)
        return plan if block is None else plan._replace(block=block, slices=slices)

    return launcher.override(choose)


@pytest.fixture(autouse=True)
def _triton_and_poison():
    """Serve from Triton; memory that no kernel has written is NaN."""
    torch.use_deterministic_algorithms(True)
    with torch_manual.use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


def outputs_and_gradients(case, sample, dtype):
    module = case.build(sample, dtype, return_cells=True)
    inputs = sample.inputs(dtype)
    outputs = run(module, sample, *inputs)
    return [
        *outputs,
        *gradients(outputs, [*inputs, *module.parameters()], cotangents(outputs)),
    ]


def expected(case, sample, dtype):
    """The same by the float64 reference, from the inputs and weights that `dtype` can hold."""
    module = case.build(sample, dtype).double()
    inputs = [t.detach().double().requires_grad_() for t in sample.inputs(dtype)]
    outputs = run_reference(case, sample, dict(module.named_parameters()), *inputs)
    draws = [w.to(dtype).double() for w in cotangents(outputs)]
    return [*outputs, *gradients(outputs, [*inputs, *module.parameters()], draws)]


def distance(ours, theirs):
    """The largest error, as a fraction of each tensor's largest element (or of 1)."""
    return max(
        ((a.double() - b).abs().max() / b.abs().max().clamp(min=1)).item()
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("sample", SHAPES, ids=lambda s: s.id)
@pytest.mark.parametrize("case", [LSTM, DIAGONAL], ids=lambda c: c.name)
def test_level_against_the_float64_reference(case, sample, n, dtype):
    theirs = expected(case, sample, dtype)
    with level(n):
        error = distance(outputs_and_gradients(case, sample, dtype), theirs)
    if dtype == torch.float64:
        assert error < 1e-13
        return
    with torch_manual.use_backend("eager"):
        plain = distance(outputs_and_gradients(case, sample, dtype), theirs)
    assert error <= 2 * plain + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["T3-B2-I5-H7", "proj", "packed-reverse-proj"])
def test_full_peepholes(name, dtype):
    theirs = expected(FULL, BY_ID[name], dtype)
    error = distance(outputs_and_gradients(FULL, BY_ID[name], dtype), theirs)
    assert error < (1e-13 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("case", [LSTM, DIAGONAL], ids=lambda c: c.name)
def test_streamed_product(case):
    """L2 with more summands than one block holds, cut into slices as well."""
    theirs = expected(case, PACKED, torch.float64)
    with level(2, block=(16, 16, 16), slices=2):
        assert distance(outputs_and_gradients(case, PACKED, torch.float64), theirs) < 1e-13


def test_no_gradients_and_views():
    """Nothing saved; a loss through c_n only, expanded, transposed gradients, strided weights."""
    for n in (0, 1, 2):
        with level(n):
            module = LSTM.build(ODD)
            x, h0, c0 = ODD.inputs()
            with torch.no_grad():
                y, (h_n, c_n) = module(x.transpose(0, 1).contiguous().transpose(0, 1), (h0, c0))
            z, (h_m, c_m) = module(x, (h0, c0))
            assert all(map(torch.equal, (y, h_n, c_n), (z, h_m, c_m)))
            with torch_manual.use_backend("eager"):
                z, (h_m, c_m) = module(x, (h0, c0))
            for of in (
                lambda y, h, c: y.sum(),
                lambda y, h, c: c.sum(),
                lambda y, h, c: y.mT.sum(),
            ):
                leaves = [x, h0, c0, *module.parameters()]
                y, (h_n, c_n) = module(x, (h0, c0))
                ours = torch.autograd.grad(of(y, h_n, c_n), leaves, allow_unused=True)
                theirs = torch.autograd.grad(
                    of(z, h_m, c_m), leaves, allow_unused=True, retain_graph=True
                )
                assert distance(ours, theirs) < 1e-13


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize(
    ("case", "sample"),
    [(DIAGONAL, SMALL), (DIAGONAL, REVERSE), (LSTM, BY_ID["packed"]), (FULL, BY_ID["proj"])],
    ids=lambda v: getattr(v, "name", None) or v.id,
)
def test_gradcheck(case, sample, n):
    """Element by element on a small sample, along random directions on the others."""
    module = case.build(sample, return_cells=True)
    names = [name for name, _ in module.named_parameters()]

    class Run(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, *inputs):
            return run(self.module, sample, *inputs)

    def f(x, h0, c0, *params):
        weights = {f"module.{k}": v for k, v in zip(names, params, strict=True)}
        return functional_call(runner, weights, (x, h0, c0))

    runner = Run()
    params = [p.detach().clone().requires_grad_() for p in module.parameters()]
    with level(n, block=(16, 16, 16) if n == 2 else None):
        assert torch.autograd.gradcheck(
            f, (*sample.inputs(), *params), fast_mode=sample is not SMALL
        )


@pytest.mark.parametrize("case", [LSTM, DIAGONAL], ids=lambda c: c.name)
@pytest.mark.parametrize("name", ["T3-B2-I5-H7", "packed-reverse-proj"])
def test_second_order(case, name):
    sample = BY_ID[name]
    module = case.build(sample)
    leaves = [*sample.inputs(), *module.parameters()]

    def second(backend):
        with torch_manual.use_backend(backend):
            outputs = run(module, sample, *leaves[:3])
            first = torch.autograd.grad(outputs, leaves, cotangents(outputs), create_graph=True)
            return torch.autograd.grad(first, leaves, cotangents(first, seed=3), allow_unused=True)

    pairs = [p for p in zip(second("triton"), second("eager"), strict=True) if p[1] is not None]
    assert distance(*zip(*pairs, strict=True)) < 1e-13


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_second_order_calls_the_kernels(monkeypatch, dtype):
    """A fault planted in R12 shows."""
    sample = BY_ID["T3-B2-I5-H7"]

    def second():
        module = LSTM.build(sample, dtype)
        leaves = [*sample.inputs(dtype), *module.parameters()]
        outputs = run(module, sample, *leaves[:3])
        first = torch.autograd.grad(outputs, leaves, cotangents(outputs), create_graph=True)
        return torch.autograd.grad(first, leaves, cotangents(first, seed=3), allow_unused=True)

    with torch_manual.use_backend("eager"):
        theirs = second()
    scale = 1e-13 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps
    assert distance(second(), theirs) < scale
    from torch_manual.triton_kernels.lstm import tangent

    plant(monkeypatch, gates, "- 2 * dm * o * tanh_c * tc", "", into=tangent)
    assert distance(second(), theirs) > 2 * scale


@contextlib.contextmanager
def persistent():
    """Let L3 run, its programs as threads."""
    with pytest.MonkeyPatch.context() as patch, triton_interpreter.thread_local_grid():
        for module, name in (
            (step, "_lstm_step_forward_kernel"),
            (step_backward, "_lstm_step_backward_kernel"),
        ):
            patch.setattr(module, name, triton_interpreter.Concurrent(getattr(module, name)))
        yield


def both_step_levels(case, sample, dtype, block=(16, 16, 32), slices=2):
    with persistent():
        with level(3, block, slices):
            all_at_once = outputs_and_gradients(case, sample, dtype)
        with level(2, block, slices):
            return all_at_once, outputs_and_gradients(case, sample, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", [ODD, PACKED], ids=lambda s: s.id)
def test_persistent_is_bit_equal_to_steps(sample, dtype):
    all_at_once, steps = both_step_levels(DIAGONAL, sample, dtype)
    assert all(map(torch.equal, all_at_once, steps))
    if dtype == torch.float64:
        assert distance(all_at_once, expected(DIAGONAL, sample, dtype)) < 1e-13


class Overtaken:
    """In a barrier's place: the program that comes first stays until all others are done."""

    def __init__(self):
        self.arrivals = {}
        self.changed = threading.Condition()

    def arrive(self, programs, steps):
        me = threading.current_thread()  # an ident is used again when its thread has ended
        with self.changed:
            self.arrivals[me] = self.arrivals.get(me, 0) + 1
            self.changed.notify_all()
            if self.arrivals[me] == 1 and next(iter(self.arrivals)) == me:
                others = steps * (programs - 1)
                assert self.changed.wait_for(lambda: sum(self.arrivals.values()) > others, 60)


overtaken = None


@pytest.mark.parametrize("module", [step, step_backward], ids=["forward", "backward"])
def test_persistent_without_its_barrier_is_wrong(monkeypatch, module):
    @triton.jit
    def no_barrier(arrived_ptr, expected, error_ptr):
        overtaken.arrive(programs=4, steps=3)
        tl.debug_barrier()

    monkeypatch.setitem(globals(), "overtaken", Overtaken())
    monkeypatch.setattr(module, "grid_barrier", no_barrier)
    # uninitialized memory is NaN, and a step that starts too early reads it
    all_at_once, steps = both_step_levels(LSTM, ODD, torch.float64)
    assert list(overtaken.arrivals.values()) == [3] * 4
    assert not all(map(torch.equal, all_at_once, steps))


@pytest.mark.parametrize("scale", [1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_small_numbers_keep_their_digits(n, scale, dtype):
    """Where 1 - e^-2x has lost them, tanh is a series."""
    module = torch_manual.LSTM(8, 16, bias=False, dtype=dtype)
    x = scale * torch.randn(6, 3, 8, dtype=dtype)
    with level(n):
        y, _ = module(x)
    with torch_manual.use_backend("eager"):
        exact, _ = module.double()(x.double())
    assert ((y - exact).abs().max() / exact.abs().max()).item() < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("how", ["expanded", "transposed"])
def test_second_order_and_forward_mode_of_a_step_from_any_state(how):
    """At T = 1 the cell before is c_0 itself, which may lie in any order."""
    module = torch_manual.PeepholeLSTM(2, 4, dtype=torch.float64)
    x, h0 = torch.randn(1, 3, 2, dtype=torch.float64), torch.randn(1, 3, 4, dtype=torch.float64)
    c0 = torch.randn(1, 4, 3, dtype=torch.float64).transpose(1, 2)
    if how == "expanded":
        c0 = torch.randn(1, 1, 4, dtype=torch.float64).expand(1, 3, 4)
    results = []
    for backend in ("triton", "eager"):
        with torch_manual.use_backend(backend):
            tangent = torch.func.jvp(lambda x: module(x, (h0, c0))[0], (x,), (x.cos(),))[1]
            z = x.clone().requires_grad_()
            (dx,) = torch.autograd.grad(module(z, (h0, c0))[0].sin().sum(), z, create_graph=True)
            results.append((tangent, *torch.autograd.grad(dx.square().sum(), z)))
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("module", [step, step_backward], ids=["forward", "backward"])
def test_a_barrier_that_never_opens_is_an_error(monkeypatch, module):
    @triton.jit
    def given_up(arrived_ptr, expected, error_ptr):
        tl.store(error_ptr, 1)

    monkeypatch.setattr(module, "grid_barrier", given_up)
    with pytest.raises(RuntimeError, match="the programs of a persistent kernel did not meet"):
        both_step_levels(LSTM, ONE_WAY, torch.float64)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_launches_on_the_device_of_its_tensors(monkeypatch, n):
    """Triton takes the current device, which may be another one."""
    entered, devices = [], []

    @contextlib.contextmanager
    def device_of(t):
        entered.append(t.device)
        yield
        entered.pop()

    def seen(function):
        def launch(*args, **options):
            devices.extend(entered[-1:] or ["current"])
            return function(*args, **options)

        return launch

    from torch_manual.triton_kernels.lstm import pointwise, tangent

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module in (pointwise, sequence, step):
        monkeypatch.setattr(module, "forward", seen(module.forward))
    for module in (pointwise, sequence, step_backward):
        monkeypatch.setattr(module, "backward", seen(module.backward))
    for name in ("step_tangent", "step_backward_tangent"):
        monkeypatch.setattr(tangent, name, seen(getattr(tangent, name)))
    module = LSTM.build(ODD, torch.float64)
    x = ODD.inputs(torch.float64)[0]
    with level(n):
        (dx,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        dx.square().sum().backward()
    assert len(devices) > 4
    assert set(devices) == {x.device}


def plant(monkeypatch, module, old, new, into=None):
    """Replace `old` by `new` in a kernel file's source; let `into` (or the launcher) use it."""
    source = open(module.__file__).read()  # noqa: SIM115
    assert old in source, f"{module.__name__} has no {old!r}"
    folder = monkeypatch.undo_folder
    path = folder / f"{module.__name__.rpartition('.')[2]}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"mutant_{path.stem}", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    if into is None:
        monkeypatch.setattr(f"torch_manual.triton_kernels.lstm.{path.stem}", mutant)
    for name in vars(mutant) if into is not None else ():
        if hasattr(into, name) and isinstance(getattr(mutant, name), type(gates.cell)):
            monkeypatch.setattr(into, name, getattr(mutant, name))


@pytest.fixture
def monkeypatch(monkeypatch, tmp_path):
    monkeypatch.undo_folder = tmp_path
    return monkeypatch


FAULTS = {
    "L1 mask of h dropped": (
        1,
        sequence,
        "tl.where(alive, m.to(h.dtype), h)",
        "m.to(h.dtype)",
        None,
    ),
    "L1 mask of dh dropped": (1, sequence, "tl.where(alive, dh_prev, dh_next)", "dh_prev", None),
    "L1 gates swapped": (1, _math, "i, g = tl.split(even)", "g, i = tl.split(even)", sequence),
    "L1 gates swapped backwards": (1, _math, "tl.join(f, o)", "tl.join(o, f)", sequence),
    "L2 gates swapped": (2, _math, "f, o = tl.split(odd)", "o, f = tl.split(odd)", step),
    "L2 partial sum missing": (2, step, "product += _product", "product = _product", None),
    "L2 slice missing": (
        2,
        step,
        "dtype), 0)",
        "dtype) * (tl.arange(0, 2) == 0)[:, None, None], 0)",
        None,
    ),
    "L2 gate missing in B9": (2, step_backward, "range(4)", "range(3)", None),
    "L2 mask of c dropped": (2, step, "tl.where(alive[:, None], c_new, c)", "c_new", None),
    "B8 without f": (0, gates, "dc_prev = dc * f", "dc_prev = dc", "pointwise"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(monkeypatch, fault):
    n, module, old, new, into = FAULTS[fault]
    if into == "pointwise":
        from torch_manual.triton_kernels.lstm import pointwise as into
    theirs = expected(LSTM, ONE_WAY, torch.float64)
    blocks = {"block": (16, 16, 16), "slices": 2} if n == 2 else {}
    with level(n, **blocks):
        assert distance(outputs_and_gradients(LSTM, ONE_WAY, torch.float64), theirs) < 1e-13
        plant(monkeypatch, module, old, new, into)
        assert not distance(outputs_and_gradients(LSTM, ONE_WAY, torch.float64), theirs) < 1e-6
