"""Forward mode without a graph (functions/lstm_forward_mode.py) beside the autograd.Function's."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, jacfwd, jvp, vmap

import torch_manual
from cases import CASE_SAMPLES, IDS
from test_transforms import as_function
from torch_manual.functions import lstm as functions
from torch_manual.functions import lstm_forward_mode

lstm = torch_manual.LSTM(3, 4).double()


@pytest.fixture
def no_function(monkeypatch):
    def refuse(*_):
        raise AssertionError("an autograd.Function was applied")

    monkeypatch.setattr(functions.LSTMFunction, "apply", refuse)


def with_dual_level(f, args, tangents):
    with forward_ad.dual_level():
        outputs = f(*(forward_ad.make_dual(a, t) for a, t in zip(args, tangents, strict=True)))
        return zip(*(forward_ad.unpack_dual(t) for t in outputs), strict=True)


@pytest.mark.parametrize("api", [jvp, with_dual_level])
@pytest.mark.parametrize(("case", "sample"), CASE_SAMPLES, ids=IDS)
def test_is_what_the_function_gives(case, sample, api, monkeypatch):
    f, args = as_function(case, sample)
    args = tuple(a.detach() for a in args)
    generator = torch.Generator().manual_seed(0)
    tangents = tuple(torch.randn(a.shape, generator=generator, dtype=a.dtype) for a in args)
    ours = api(f, args, tangents)
    monkeypatch.setattr(functions, "lstm_forward_mode", lambda *_: None)
    for part, expected in zip(ours, api(f, args, tangents), strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("api", [jvp, with_dual_level])
def test_applies_no_function(api, no_function):
    f, args = as_function(*CASE_SAMPLES[0])
    args = tuple(a.detach() for a in args)
    api(f, args, args)


def test_a_gradient_may_be_taken_of_a_tangent():
    x, tx = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    parameters = dict(lstm.named_parameters())

    def tangent(*values):
        values = dict(zip(parameters, values, strict=True))
        return jvp(lambda x: functional_call(lstm, values, (x,))[0], (x,), (tx,))[1]

    assert torch.autograd.gradcheck(tangent, tuple(parameters.values()), fast_mode=True)


def test_an_input_may_require_grad():
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    frozen = {name: p.detach() for name, p in lstm.named_parameters()}
    tx = torch.randn_like(x)

    def tangent(x, tx):
        return jvp(lambda x: functional_call(lstm, frozen, (x,))[0], (x,), (tx,))[1]

    assert torch.autograd.gradcheck(tangent, (x, tx.requires_grad_()), fast_mode=True)


@pytest.mark.parametrize("api", [jvp, with_dual_level])
def test_without_gradients_parameters_need_not_be_frozen(api, no_function):
    x, tx = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        (y,), (ty,) = api(lambda x: (lstm(x)[0],), (x,), (tx,))
        ahead, behind = (lstm(x + e * tx)[0] for e in (1e-6, -1e-6))
        torch.testing.assert_close(y, lstm(x)[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ty, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-8)
    assert not y.requires_grad
    assert not ty.requires_grad


@pytest.mark.parametrize("size", [(5, 3), (5, 2, 3), (5, 0, 3), (0, 5, 3), (2, 5, 3)])
@pytest.mark.parametrize("api", [jvp, with_dual_level])
def test_shapes(size, api, no_function):
    batch_first = size in ((0, 5, 3), (2, 5, 3))
    module = torch_manual.LSTM(3, 4, 2, bidirectional=True, batch_first=batch_first)
    x = torch.randn(size)
    with torch.no_grad():
        y = module(x)[0]
        (same,), (ty,) = api(lambda x: (module(x)[0],), (x,), (x,))
    torch.testing.assert_close(same, y)
    assert ty.shape == y.shape


def test_an_error_leaves_the_transform_as_it_was(monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(lstm_forward_mode, "lstm_dual", fail)
    x, tx = torch.randn(2, 5, 2, 3, dtype=torch.float64)

    def sine(x):
        with torch.no_grad(), pytest.raises(MemoryError):
            lstm(x)
        return x.sin()

    y, ty = jvp(sine, (x,), (tx,))
    torch.testing.assert_close(y, x.sin())
    torch.testing.assert_close(ty, x.cos() * tx)


def test_other_transforms_beside_it():
    frozen = {name: p.detach() for name, p in lstm.named_parameters()}
    x, tx = torch.randn(2, 6, 5, 3, dtype=torch.float64)

    def f(x):
        return functional_call(lstm, frozen, (x,))[0]

    def one(x, tx):
        return jvp(f, (x,), (tx,))[1]

    expected = torch.stack([one(x[n], tx[n]) for n in range(6)])
    torch.testing.assert_close(vmap(one)(x, tx), expected)
    rows = jacfwd(f)(x[0])
    torch.testing.assert_close((rows * tx[0]).sum((-2, -1)), expected[0])


def test_cells_have_tangents_too(no_function):
    module = torch_manual.LSTM(3, 4, return_cells=True).double().requires_grad_(False)
    x, tx = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    cells, tcells = jvp(lambda x: module(x)[2], (x,), (tx,))
    ahead, behind = (module(x + e * tx)[2] for e in (1e-6, -1e-6))
    torch.testing.assert_close(tcells, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(cells, module(x)[2], rtol=1e-12, atol=1e-12)


def test_autocast_casts_first(no_function):
    module = torch_manual.LSTM(3, 4).requires_grad_(False)
    x, tx = torch.randn(2, 5, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y, ty = jvp(lambda x: module(x)[0], (x,), (tx,))
    _, expected = jvp(lambda x: module(x)[0], (x,), (tx,))
    assert y.dtype == ty.dtype == torch.bfloat16
    torch.testing.assert_close(ty.float(), expected, rtol=0.05, atol=0.02)
