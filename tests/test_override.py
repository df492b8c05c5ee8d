"""torch_manual.override(): PyTorch's own LSTM ops on our kernels, and back."""

import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence

from torch_manual.override import override

MODULE = sys.modules["torch_manual.override"]
OPS = ("aten::lstm.input", "aten::lstm.data", "aten::lstm_cell")


@pytest.fixture
def calls(monkeypatch):
    """The names of our functions, in the order in which they are called."""
    made = []
    for name in ("lstm_layer", "lstm_cell"):
        function = getattr(MODULE, name)

        def spy(*args, name=name, function=function):
            made.append(name)
            return function(*args)

        monkeypatch.setattr(MODULE, name, spy)
    return made


def dispatcher():
    return [
        dump(op) for op in OPS for dump in (torch._C._dispatch_dump, torch._C._dispatch_dump_table)
    ]


def results(module, *inputs):
    """Outputs and all gradients, dropout drawn from seed 0."""
    torch.manual_seed(0)
    outputs = torch.utils._pytree.tree_leaves(module(*inputs))
    outputs = [t for t in outputs if t.requires_grad]
    leaves = [*module.parameters()]
    gradients = torch.autograd.grad(sum(t.sin().sum() for t in outputs), leaves)
    return [*outputs, *gradients]


def expect_same(calls, expected_calls, module, *inputs):
    """The module gives under override what it gives without, by so many calls of ours."""
    expected = results(module, *inputs)
    assert not calls
    with override():
        got = results(module, *inputs)
    assert len(calls) == expected_calls
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    calls.clear()
    results(module, *inputs)
    assert not calls


CONFIGURATIONS = [
    {},
    {"num_layers": 3, "dropout": 0.5},
    {"num_layers": 2, "bidirectional": True, "dropout": 0.3, "proj_size": 2},
    {"bias": False, "batch_first": True},
    {"bias": False, "proj_size": 3, "bidirectional": True},
]


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kwargs", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_stock_lstm(calls, kwargs, packed):
    module = nn.LSTM(3, 5, **kwargs)
    x = torch.randn(4, 6, 3)
    if packed:
        lengths = torch.tensor([2, 6, 4, 1] if module.batch_first else [4, 1, 3, 2, 2, 1])
        x = pack_padded_sequence(x, lengths, module.batch_first, enforce_sorted=False)
    expect_same(calls, module.num_layers, module, x)


@pytest.mark.parametrize("bias", [True, False])
def test_stock_cell(calls, bias):
    cell = nn.LSTMCell(3, 4, bias=bias)
    expect_same(calls, 1, cell, torch.randn(2, 3))
    expect_same(calls, 1, cell, torch.randn(2, 3), (torch.randn(2, 4), torch.randn(2, 4)))


class Subclass(nn.LSTM):
    def forward(self, x):
        return super().forward(x.flip(0))[0] * 2


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, 2)
        self.cell = nn.LSTMCell(4, 4)

    def forward(self, x):
        y, (h, c) = self.lstm(x)
        return self.cell(y[0], (h[0], c[1]))[0]


def test_subclass_script_and_trace(calls):
    x = torch.randn(5, 2, 3)
    expect_same(calls, 1, Subclass(3, 4), x)
    with warnings.catch_warnings():  # of torch.jit, deprecated and verbose
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(Wrapper())
        traced = torch.jit.trace(Wrapper(), (x,))
        with override():
            traced_by_ours = torch.jit.trace(Wrapper(), (x,))
    calls.clear()
    # A trace holds no lstm_cell, but what stock does in it.
    for module, made in ((scripted, 3), (traced, 2), (traced_by_ours, 2)):
        for _ in range(3):  # the profiling executor compiles at the second call
            expect_same(calls, made, module, x)


def test_functional_calls(calls):
    module = nn.LSTM(3, 4)
    x, states = torch.randn(5, 2, 3), [torch.zeros(1, 2, 4)] * 2
    flat = module._flat_weights
    with override():
        for call in (torch.lstm, torch._VF.lstm, torch.ops.aten.lstm.input):
            y, _, _ = call(x, states, flat, True, 1, 0.0, False, False, False)
            torch.testing.assert_close(y, module(x)[0])
        torch.lstm_cell(x[0], [t[0] for t in states], *flat)
        torch.lstm_cell(x[0], [t[0] for t in states], *flat[:2])
    assert calls == ["lstm_layer"] * 6 + ["lstm_cell"] * 2


def test_inference_mode_no_grad_and_other_threads(calls):
    module, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    with override():
        with torch.inference_mode():
            module(x)
        with torch.no_grad():
            module(x)
        thread = threading.Thread(target=module, args=(x,))
        thread.start()
        thread.join()
        nn.LSTM(3, 4, device="meta")(x.to("meta"))
    assert len(calls) == 4


def test_autocast(calls):
    module, x = nn.LSTM(3, 4).float(), torch.randn(5, 2, 3).float()
    with override(), torch.autocast("cpu", torch.bfloat16):
        y, _ = module(x)
    y.float().sum().backward()
    assert calls == ["lstm_layer"]
    assert y.dtype == torch.bfloat16
    assert module.weight_hh_l0.grad.dtype == torch.float32


def test_transforms_that_stock_has_not(calls):
    module = nn.LSTM(3, 4)
    params = {n: p.detach() for n, p in module.named_parameters()}
    x = torch.randn(6, 2, 5, 3)  # six batches of two sequences

    def loss(params, x):
        return functional_call(module, params, (x,))[0].sin().sum()

    with override():
        per_sample = vmap(grad(loss), (None, 0))(params, x)
        one = grad(loss)(params, x[3])
        out, tangent = jvp(lambda x: module(x)[0], (x[0],), (torch.ones_like(x[0]),))
        hessian(lambda x: module(x)[0].sum())(x[0, :, :1])
        y = x[0].requires_grad_()
        (dx,) = torch.autograd.grad(module(y)[0].sum(), y, create_graph=True)
        dx.pow(2).sum().backward()
    assert calls
    torch.testing.assert_close(per_sample["weight_hh_l0"][3], one["weight_hh_l0"])
    step = 1e-6
    difference = (module(x[0] + step)[0] - module(x[0] - step)[0]) / (2 * step)
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-8)


def test_it_leaves_no_trace(calls):
    before = dispatcher()
    module, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    with override():
        assert dispatcher() != before
        with override():
            module(x)
        module(x)
        assert len(calls) == 2
    assert dispatcher() == before
    with pytest.raises(ZeroDivisionError), override():
        raise ZeroDivisionError
    assert dispatcher() == before

    outer, inner = override(), override()
    outer.undo()
    module(x)
    inner.undo()
    inner.undo()
    assert len(calls) == 3
    assert dispatcher() == before


def test_it_stays_in_force_when_nobody_holds_it(calls):
    before = dispatcher()
    override()
    nn.LSTM(3, 4)(torch.randn(5, 2, 3))
    assert calls == ["lstm_layer"]
    MODULE._in_force.pop()._destroy()
    assert dispatcher() == before


def test_it_warns_of_nothing():
    code = "from torch_manual.override import override; override()"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_graph_outlives_the_block(calls):
    module, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    expected = results(module, x)
    with override():
        y, (h, c) = module(x)
    gradients = torch.autograd.grad(
        y.sin().sum() + h.sin().sum() + c.sin().sum(), [*module.parameters()]
    )
    torch.testing.assert_close([y, h, c, *gradients], expected)


def bad_calls():
    module, cell = nn.LSTM(3, 4), nn.LSTMCell(3, 4)
    x, s = torch.randn(5, 2, 3), torch.zeros(1, 2, 4)
    rest = (True, 1, 0.0, False, False, False)
    flat = module._flat_weights
    return {
        "states": lambda: torch.lstm(x, [s], flat, *rest),
        "parameters": lambda: torch.lstm(x, [s, s], flat[:3], *rest),
        "layers": lambda: torch.lstm(x, [s, s], flat * 2, *rest),
        "length": lambda: torch.lstm(x[:0], [s, s], flat, *rest),
        "cell states": lambda: torch.lstm_cell(x[0], [s[0]], *flat),
        "cell input": lambda: cell(x[0, :, :2]),
        "cell batch": lambda: cell(x[0], (s[0, :1], s[0])),
        "cell hidden": lambda: cell(x[0], (s[0], s[0, :, :2])),
    }


def test_enters_again_after_undo(calls):
    switch, module, x = override(), nn.LSTM(3, 4), torch.randn(5, 2, 3)
    switch.undo()
    for _ in range(2):
        with switch:
            module(x)
        module(x)
    assert calls == ["lstm_layer"] * 2


def test_a_switch_nests_in_itself(calls):
    switch, module, x = override(), nn.LSTM(3, 4), torch.randn(5, 2, 3)
    with switch:
        with switch:
            module(x)
        module(x)
    module(x)
    assert calls == ["lstm_layer"] * 2


@pytest.mark.parametrize("name", bad_calls())
def test_errors_are_stocks(name):
    with pytest.raises(RuntimeError) as expected:
        bad_calls()[name]()
    with pytest.raises(RuntimeError) as got, override():
        bad_calls()[name]()
    assert type(got.value) is type(expected.value)
    assert str(got.value).partition("\n")[0] == str(expected.value).partition("\n")[0]


def test_wrong_state_shapes_are_named():
    module, x, s = nn.LSTM(3, 4), torch.randn(5, 2, 3), torch.zeros(1, 3, 4)
    with override(), pytest.raises(ValueError, match=r"hx\[0\] must be .* = \(1, 2, ·\), got"):
        torch.lstm(x, [s, s], module._flat_weights, True, 1, 0.0, False, False, False)
