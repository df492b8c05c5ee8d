"""Parity with torch.nn: its own samples and error inputs, and what else a drop-in must do."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, rnn
from torch.testing._internal.common_modules import module_db

import torch_manual
from cases import CASES, SAMPLES, cotangents, gradients, run
from torch_manual.functional import LSTMWeights, lstm_cell, lstm_layer
from torch_manual.functions import lstm_gradients

OURS = {nn.LSTM: torch_manual.LSTM, nn.LSTMCell: torch_manual.LSTMCell}
INFOS = [info for info in module_db if info.module_cls in OURS]
DTYPES = [torch.float64, torch.float32]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def flatten(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, rnn.PackedSequence):
        return [value.data]
    return [t for v in value for t in flatten(v)]


def pair(ours, *args, seed=0, **kwargs):
    """Our module and torch.nn's with the same seed."""
    stock = {v: k for k, v in OURS.items()}[ours]
    modules = []
    for cls in (ours, stock):
        torch.manual_seed(seed)
        modules.append(cls(*args, **kwargs))
    return modules


def build_and_call(cls, constructor, forward):
    return cls(*constructor.args, **constructor.kwargs)(*forward.args, **forward.kwargs)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("info", INFOS, ids=lambda i: i.name)
def test_samples_of_module_db(info, dtype, training):
    samples = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=training
    )
    assert samples
    for sample in samples:
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        results = []
        for cls in (info.module_cls, OURS[info.module_cls]):
            torch.manual_seed(0)
            module = cls(*args, **kwargs).to(dtype).train(training)
            outputs = flatten(module(*sample.forward_input.args, **sample.forward_input.kwargs))
            leaves = list(module.parameters())
            leaves += [
                t
                for t in flatten([a for a in sample.forward_input.args if a is not None])
                if t.requires_grad
            ]
            grads = gradients(outputs, leaves, cotangents(outputs))
            results.append((*outputs, *grads))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(
                b, a, rtol=0, atol=TOLERANCE[dtype] * max(1, a.abs().max().item())
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("info", INFOS, ids=lambda i: i.name)
def test_error_inputs_of_module_db(info, dtype):
    errors = info.module_error_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=False, training=False
    )
    assert errors
    for error in errors:
        args = error.module_error_input
        raised = []
        for cls in (info.module_cls, OURS[info.module_cls]):
            with pytest.raises(error.error_type, match=error.error_regex) as caught:
                build_and_call(cls, args.constructor_input, args.forward_input)
            raised.append((caught.type, str(caught.value)))
        assert raised[0] == raised[1]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.id)
def test_same_seed_same_parameters_same_repr(sample):
    ours, stock = pair(torch_manual.LSTM, sample.I, sample.H, **sample.kwargs)
    assert repr(ours) == repr(stock)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert ours._flat_weights_names == stock._flat_weights_names
    assert [len(w) for w in ours.all_weights] == [len(w) for w in stock.all_weights]
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        assert torch.equal(a, b)
    ours.reset_parameters()
    stock.load_state_dict(ours.state_dict())
    ours.load_state_dict(stock.state_dict())


def test_same_seed_same_parameters_of_a_cell():
    ours, stock = pair(torch_manual.LSTMCell, 3, 4)
    assert repr(ours) == repr(stock)
    for (n, a), (m, b) in zip(ours.named_parameters(), stock.named_parameters(), strict=True):
        assert n == m
        assert torch.equal(a, b)


def test_peepholes_come_after_the_rest():
    torch.manual_seed(0)
    lstm = torch_manual.LSTM(3, 4, 2, bidirectional=True)
    torch.manual_seed(0)
    peep = torch_manual.PeepholeLSTM(3, 4, 2, bidirectional=True, peephole="full")
    names = list(peep.state_dict())
    assert names[: len(lstm.state_dict())] == list(lstm.state_dict())
    assert names[-3:] == ["weight_ci_l1_reverse", "weight_cf_l1_reverse", "weight_co_l1_reverse"]
    assert peep.weight_ci_l0.shape == (4, 4)
    for name, p in lstm.named_parameters():
        assert torch.equal(p, peep.get_parameter(name))
    torch.manual_seed(0)
    before = [p.clone() for p in peep.parameters()]
    peep.reset_parameters()
    for a, b in zip(before, peep.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (peep.weight_co_l1.abs() <= 4**-0.5).all()
    assert peep.weight_co_l1.std() > 0
    with pytest.raises(ValueError, match="peephole must be 'diagonal' or 'full', got 'none'"):
        torch_manual.PeepholeLSTM(3, 4, peephole="none")


BAD_CONSTRUCTOR = [
    {"dropout": 1.5},
    {"dropout": True},
    {"dropout": "x"},
    {"input_size": 0},
    {"input_size": 2.0},
    {"hidden_size": -1},
    {"hidden_size": 2.0},
    {"num_layers": 0},
    {"bias": 1},
    {"batch_first": 1},
    {"proj_size": -1},
    {"proj_size": 4},
]


@pytest.mark.parametrize("bad", BAD_CONSTRUCTOR, ids=str)
def test_constructor_errors_are_stocks(bad):
    raised = []
    for cls in (nn.LSTM, torch_manual.LSTM):
        with pytest.raises((ValueError, TypeError)) as caught:
            cls(**{"input_size": 3, "hidden_size": 4, **bad})
        raised.append((caught.type, str(caught.value)))
    assert raised[0] == raised[1]


def test_dropout_with_one_layer_warns():
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        torch_manual.LSTM(3, 4, dropout=0.5)


X, H0 = torch.randn(5, 2, 3), torch.zeros(1, 2, 4)
BAD_FORWARD = {
    "4-D": (torch.randn(1, 5, 2, 3),),
    "1-D": (torch.randn(5),),
    "features": (torch.randn(5, 2, 7),),
    "dtype": (X.double(),),
    "integers": (torch.ones(5, 2, 3, dtype=torch.long),),
    "T=0": (X[:0],),
    "T=0 unbatched": (X[:0, 0],),
    "h0 size": (X, (torch.zeros(1, 2, 5), H0)),
    "h0 layers": (X, (torch.zeros(2, 2, 4), H0)),
    "c0 batch": (X, (H0, torch.zeros(1, 3, 4))),
    "2-D states": (X, (H0[0], H0[0])),
    "3-D states unbatched": (X[:, 0], (H0, H0)),
    "one state": (X, (H0,)),
    "three states": (X, (H0, H0, H0)),
    "h0 device": (X, (H0.to("meta"), H0)),
    "c0 device": (X, (H0, H0.to("meta"))),
    "x device": (X.to("meta"),),
}


@pytest.mark.parametrize("args", BAD_FORWARD.values(), ids=BAD_FORWARD.keys())
def test_forward_errors_are_stocks(args):
    raised = []
    for cls in (nn.LSTM, torch_manual.LSTM):
        with pytest.raises((RuntimeError, ValueError, IndexError)) as caught:
            cls(3, 4)(*args)
        raised.append((caught.type, str(caught.value)))
    assert raised[0] == raised[1]


C, G = torch.randn(2, 3), torch.zeros(2, 4)
BAD_CELL = {
    "3-D": (torch.randn(2, 2, 3),),
    "features": (torch.randn(2, 5),),
    "h features": (C, (torch.zeros(2, 5), G)),
    "c features": (C, (G, torch.zeros(2, 5))),
    "h batch": (C, (torch.zeros(3, 4), G)),
    "c batch": (C, (G, torch.zeros(3, 4))),
    "3-D state": (C, (torch.zeros(1, 2, 4), G)),
    "one state": (C, (G,)),
    "three states": (C, (G, G, G)),
}


@pytest.mark.parametrize("args", BAD_CELL.values(), ids=BAD_CELL.keys())
def test_cell_errors_are_stocks(args):
    raised = []
    for cls in (nn.LSTMCell, torch_manual.LSTMCell):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            cls(3, 4)(*args)
        raised.append((caught.type, str(caught.value)))
    assert raised[0] == raised[1]


def test_state_of_another_dtype_is_refused():
    with pytest.raises(RuntimeError, match=r"not the same dtype, found input tensor with torch.fl"):
        torch_manual.LSTM(3, 4)(X, (H0.double(), H0.double()))
    with pytest.raises(RuntimeError, match="not the same dtype"):
        torch_manual.LSTMCell(3, 4)(C, (G.double(), G.double()))


WRONG_SHAPES = {  # (16, 3) and (3, 16) have as many numbers
    "weight_ih": ((3, 16), r"\(4H, I\) = \(16, 3\), got \(3, 16\)"),
    "weight_hh": ((16, 5), r"\(4H, P\) = \(16, [24]\), got \(16, 5\)"),
    "bias_ih": ((12,), r"\(4H,\) = \(16,\), got \(12,\)"),
    "bias_hh": ((16, 1), r"\(4H,\) = \(16,\), got \(16, 1\)"),
    "weight_hr": ((4, 2), r"\(P, H\) = \(2, 4\), got \(4, 2\)"),
    "weight_ci": ((5,), r"\(H,\) = \(4,\), got \(5,\)"),
    "weight_cf": ((1, 4), r"\(H,\) = \(4,\), got \(1, 4\)"),
    "weight_co": ((3,), r"\(H,\) = \(4,\), got \(3,\)"),
}


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    ("module", "x"),
    [
        (torch_manual.LSTM(3, 4), X),
        (torch_manual.LSTM(3, 4, proj_size=2), X),
        (torch_manual.PeepholeLSTM(3, 4), X),
        (torch_manual.LSTMCell(3, 4), C),
        (torch_manual.PeepholeLSTMCell(3, 4), C),
    ],
    ids=["LSTM", "proj_size", "PeepholeLSTM", "LSTMCell", "PeepholeLSTMCell"],
)
def test_weight_of_a_wrong_shape_or_dtype_is_refused(module, x, grad):
    """float32 nn.LSTM on the CPU does not look, and reads past the end."""
    for name in [name for name, _ in module.named_parameters()]:
        shape, message = WRONG_SHAPES[name.removesuffix("_l0")]
        wrong = copy.deepcopy(module)
        setattr(wrong, name, nn.Parameter(torch.zeros(shape)))
        with torch.set_grad_enabled(grad):
            with pytest.raises(ValueError, match=f"{name.removesuffix('_l0')} must be {message}"):
                wrong(x)
            setattr(wrong, name, nn.Parameter(getattr(module, name).double()))
            with pytest.raises((RuntimeError, ValueError), match=r"not the same dtype|input dtype"):
                wrong(x)


def bad_calls_of_the_functions():
    def weights(n=1):
        return [LSTMWeights(torch.randn(28, 5), torch.randn(28, 7)) for _ in range(n)]

    x, rows = torch.randn(6, 3, 5), torch.randn(18, 5)
    h = torch.randn(1, 3, 7)
    two = torch.randn(2, 3, 7)
    batch = r"lstm: x must be \(T, B, I\), or .*h0 and c0 \(D, B, ·\), got"
    cell = r"lstm: x must be \(B, I\), h and c \(B, ·\), got"
    return {
        "c0": (lambda: lstm_layer(x, h, h[:, :1], weights()), batch),
        "h0": (lambda: lstm_layer(x, h[:, :1], h, weights()), batch),
        "states": (lambda: lstm_layer(x, h[:, :2], h[:, :2], weights()), batch),
        "rows": (lambda: lstm_layer(rows[:16], h, h, weights()), batch),
        "no states": (lambda: lstm_layer(rows, h[:, :0], h[:, :0], weights()), batch),
        "weights": (
            lambda: lstm_layer(x, two, two, weights()),
            r"h0 and c0 .* D = 1, as many",
        ),
        "one state": (
            lambda: lstm_layer(x, h, h, weights(2)),
            r"h0 and c0 .* D = 2, as many",
        ),
        "c0 of one": (
            lambda: lstm_layer(x, two, h, weights(2)),
            r"h0 and c0 .* D = 2, as many",
        ),
        "2-D": (lambda: lstm_layer(x, h[0], h[0], weights()), r"h0 and c0 must be .*got \(3, 7\)"),
        "none": (lambda: lstm_layer(x, h, h, []), "weights must be of 1 or 2 directions, got 0"),
        "three": (lambda: lstm_layer(x, h, h, weights(3)), "of 1 or 2 directions, got 3"),
        "cell": (lambda: lstm_cell(x[0], (h[0, :1], h[0, :1]), *weights()), cell),
        "cell x": (lambda: lstm_cell(x[0, :1], (h[0], h[0]), *weights()), cell),
        "cell 3-D": (lambda: lstm_cell(x, (h, h), *weights()), cell),
        "recompute": (lambda: lstm_layer(x, h, h, grad(weights()), recompute=0), "positive int"),
        "recompute 2.5": (lambda: lstm_layer(x, h, h, weights(), recompute=2.5), "positive int"),
        "recompute and cells": (
            lambda: lstm_layer(x, h, h, weights(), recompute=2, return_cells=True),
            "recompute saves nothing when return_cells=True keeps every c_t",
        ),
    }


def grad(weights):
    return [LSTMWeights(*(t if t is None else t.requires_grad_() for t in w)) for w in weights]


@pytest.mark.parametrize("name", bad_calls_of_the_functions())
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_what_does_not_fit_a_function_is_refused(backend, name):
    call, message = bad_calls_of_the_functions()[name]
    with torch_manual.use_backend(backend), pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("name", "value"), [("bidirectional", True), ("recompute", 0)])
def test_attributes_that_do_not_fit_are_refused(name, value):
    module = torch_manual.LSTM(3, 4)
    setattr(module, name, value)
    with pytest.raises(ValueError, match=r"as many as there are weights|positive int or None"):
        module(X)


def test_h_of_another_width_than_c_needs_a_projection():
    weights = LSTMWeights(torch.zeros(16, 3), torch.zeros(16, 5))
    message = "without weight_hr, h0 must be as wide as c0, 4, got 5"
    with pytest.raises(ValueError, match=message):
        lstm_layer(X, torch.zeros(1, 2, 5), torch.zeros(1, 2, 4), [weights])
    with pytest.raises(ValueError, match=message):
        lstm_cell(X[0], (torch.zeros(2, 5), torch.zeros(2, 4)), weights)


def test_packed_arguments_are_checked():
    packed = rnn.pack_padded_sequence(torch.randn(5, 2, 7), [5, 3])
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        torch_manual.LSTM(3, 4)(packed)
    packed = rnn.pack_padded_sequence(X, [5, 3])
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(1, 2, 4\), got \[1, 3, 4"):
        torch_manual.LSTM(3, 4)(packed, (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)))


@pytest.mark.parametrize(
    "sizes",
    [
        torch.tensor([5, 5, 5]),
        torch.tensor([500, 500]),
        torch.tensor([5, 0, 5]),
        torch.tensor([2, 3, 5]),
        torch.tensor([11, -1]),
        torch.tensor([3, 2, 2]),
        torch.tensor([5.0, 5.0]),
        torch.tensor([5, 5], dtype=torch.int32),
        torch.tensor([5, 9, 3, 9, 2, 9])[::2],
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("kwargs", [{}, {"recompute": 2}, {"proj_size": 2}], ids=str)
def test_sizes_that_are_not_of_a_packed_batch_are_refused(kwargs, backend, sizes):
    module = torch_manual.LSTM(3, 4, **kwargs)
    packed = rnn.PackedSequence(torch.randn(10, 3), sizes)
    match = r"lstm: batch_sizes must be int64 .* and 10 in all \(the rows of the input\), got"
    with torch_manual.use_backend(backend):
        for grad in (False, True):
            with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=match):
                module(packed)


def agree(ours, stock, *args, tolerance=2e-6):
    a, b = flatten(ours(*args)), flatten(stock(*args))
    for p, q in zip(a, b, strict=True):
        assert p.shape == q.shape
        assert p.dtype == q.dtype
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance)
    return a, b


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"proj_size": 2}, {"num_layers": 2, "bidirectional": True}])
def test_layouts(kwargs, batch_first):
    ours, stock = pair(torch_manual.LSTM, 3, 4, batch_first=batch_first, **kwargs)
    n = stock.num_layers * (1 + stock.bidirectional)
    h, c = torch.randn(n, 2, stock.proj_size or 4), torch.randn(n, 2, 4)
    x = torch.randn(2, 2, 3)
    agree(ours, stock, x)
    agree(ours, stock, x, (h, c))
    agree(ours, stock, x, [h, c])
    agree(ours, stock, x[:, 0])
    agree(ours, stock, x[:, 0], (h[:, 0], c[:, 0]))
    agree(ours, stock, x.transpose(0, 1), (h.expand(n, 2, -1), c))
    agree(ours, stock, x[:1, :1].expand(2, 2, 3), (h, c.flip(1)))
    y, h_n, c_n = flatten(ours(x))
    assert h_n.untyped_storage().data_ptr() != y.untyped_storage().data_ptr()


def test_h0_and_c0_the_same_tensor():
    ours, stock = pair(torch_manual.LSTM, 3, 4, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    grads = []
    for module in (ours, stock):
        s = torch.ones(1, 2, 4, dtype=torch.float64, requires_grad=True)
        y, (h_n, c_n) = module(x, (s, s))
        grads.append(torch.autograd.grad(y.sum() + c_n.sum(), s)[0])
    torch.testing.assert_close(*grads)


def test_batch_of_zero():
    ours, stock = pair(torch_manual.LSTM, 3, 4, 2, bidirectional=True)
    x = torch.randn(5, 0, 3, requires_grad=True)
    outputs = flatten(ours(x))
    for a, b in zip(outputs, flatten(stock(x)), strict=True):
        assert a.shape == b.shape
    sum(t.sum() for t in outputs).backward()
    assert x.grad.shape == x.shape
    assert all((p.grad == 0).all() for p in ours.parameters())
    cell = torch_manual.LSTMCell(3, 4)
    assert cell(torch.randn(0, 3))[0].shape == (0, 4)


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed(enforce_sorted):
    ours, stock = pair(torch_manual.LSTM, 3, 4, 2, bidirectional=True, proj_size=2)
    lengths = [6, 6, 4, 1] if enforce_sorted else [4, 6, 1, 6]
    x = torch.randn(6, 4, 3)
    packed = rnn.pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
    states = torch.randn(4, 4, 2), torch.randn(4, 4, 4)
    agree(ours, stock, packed)
    agree(ours, stock, packed, states)
    y, _ = ours(packed)
    assert isinstance(y, rnn.PackedSequence)
    assert torch.equal(y.batch_sizes, packed.batch_sizes)


def test_dropout_draws_stocks_numbers():
    for kwargs in ({}, {"batch_first": True}, {"bidirectional": True}):
        ours, stock = pair(torch_manual.LSTM, 3, 8, 3, dropout=0.4, **kwargs)
        x = torch.randn(6, 4, 3)
        results = []
        for module in (ours, stock):
            torch.manual_seed(5)
            results.append(flatten(module(x)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        assert not torch.equal(ours(x)[0], ours(x)[0])
        agree(ours.eval(), stock.eval(), x)
        ours.train().dropout = 0.0
        assert torch.equal(ours(x)[0], ours(x)[0])


@pytest.mark.parametrize("grad", [False, True])
def test_cells_of_an_empty_batch(grad):
    module = torch_manual.LSTM(3, 4, bidirectional=True, return_cells=True)
    with torch.set_grad_enabled(grad):
        y, _, cells = module(torch.randn(5, 0, 3))
    assert y.shape == cells.shape == (5, 0, 8)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_return_cells(case):
    sample = next(s for s in SAMPLES if s.id == "packed-two-layers")
    module = case.build(sample, return_cells=True)
    assert ", return_cells=True" in repr(module)
    y, h_n, c_n, cells = run(module, sample, *sample.inputs())
    assert cells.shape == (*y.shape[:2], 2 * sample.H)
    for b, n in enumerate(sample.lengths):
        torch.testing.assert_close(cells[n - 1, b, : sample.H], c_n[2, b])
        torch.testing.assert_close(cells[0, b, sample.H :], c_n[3, b])
    x = torch.randn(2, 3, sample.I, dtype=torch.float64)
    module.batch_first = True
    assert module(x)[2].shape == (2, 3, 2 * sample.H)
    assert module(x[0])[2].shape == (3, 2 * sample.H)
    with torch.no_grad():
        without = module(x)[2]
    torch.testing.assert_close(without, module(x)[2])


@pytest.mark.parametrize("peephole", ["diagonal", "full"])
def test_cell_is_one_step_of_the_layer(peephole):
    layer = torch_manual.PeepholeLSTM(3, 4, peephole=peephole, dtype=torch.float64)
    cell = torch_manual.PeepholeLSTMCell(3, 4, peephole=peephole, dtype=torch.float64)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    y, (h_n, c_n) = layer(x)
    state = None
    for t in range(5):
        state = cell(x[t], state)
        torch.testing.assert_close(state[0], y[t])
    torch.testing.assert_close(state[1], c_n[0])
    assert "peephole=" in repr(cell)
    h, c = cell(x[0, 0])
    assert h.shape == c.shape == (4,)


def test_retain_graph_and_frozen_parts():
    ours, stock = pair(torch_manual.LSTM, 3, 4, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    for module in (ours, stock):
        module.weight_hh_l0.requires_grad_(False)
        loss = module(x)[0].sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert ours.weight_hh_l0.grad is None
    torch.testing.assert_close(ours.weight_ih_l0.grad, stock.weight_ih_l0.grad)
    torch.testing.assert_close(ours.bias_hh_l0.grad, stock.bias_hh_l0.grad)
    ours.requires_grad_(False)
    assert not ours(x)[0].requires_grad
    x.requires_grad_()
    ours(x)[0].sum().backward()
    stock.zero_grad()
    y = x.detach().requires_grad_()
    stock(y)[0].sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_no_work_for_what_nobody_asked_for(monkeypatch):
    """With only weight_ih to train, nothing that another gradient takes is computed."""
    calls = []
    monkeypatch.setattr(lstm_gradients, "previous", lambda *a: calls.append("h_prev"))
    monkeypatch.setattr(lstm_gradients, "dx_of", lambda *a: calls.append("dx"))
    monkeypatch.setattr(lstm_gradients.cpu_gradients, "serves", lambda *_: False)
    module = torch_manual.LSTM(3, 4).requires_grad_(False)
    module.weight_ih_l0.requires_grad_()
    module(X)[0].sum().backward()
    assert module.weight_ih_l0.grad is not None
    assert not calls
    module.weight_hh_l0.requires_grad_()
    module(X)[0].sum().backward()
    assert calls == ["h_prev"]


def test_bias_gradients_do_not_share_memory():
    module = torch_manual.LSTM(3, 4)
    grads = torch.autograd.grad(module(X)[0].sum(), [module.bias_ih_l0, module.bias_hh_l0])
    assert torch.equal(*grads)
    assert grads[0].data_ptr() != grads[1].data_ptr()


def test_in_place_change_of_a_saved_tensor_is_detected():
    module = torch_manual.LSTM(3, 4)
    for spoil in (lambda y: y.zero_(), lambda _: module.weight_hh_l0.add_(1)):
        y, _ = module(X)
        with torch.no_grad():
            spoil(y)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_copies_and_pickles(case):
    module = case.build(SAMPLES[1])
    x = SAMPLES[1].inputs()[0]
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    twins = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(buffer, weights_only=False),
    ]
    expected = module(x)[0]
    for twin in twins:
        assert torch.equal(twin(x)[0], expected)
        assert repr(twin) == repr(module)
        with torch.no_grad():
            twin.weight_hh_l0.zero_()
        assert not torch.equal(twin(x)[0], expected)
        assert torch.equal(module(x)[0], expected)


def test_functional_call_and_assignment():
    ours, stock = pair(torch_manual.LSTM, 3, 4)
    other = {k: torch.randn_like(v) for k, v in ours.state_dict().items()}
    a, b = functional_call(ours, other, (X,)), functional_call(stock, other, (X,))
    torch.testing.assert_close(a[0], b[0])
    agree(ours, stock, X)
    for module in (ours, stock):
        module.weight_hh_l0 = nn.Parameter(other["weight_hh_l0"])
    agree(ours, stock, X)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrizations(wrap):
    module = torch_manual.LSTM(3, 4)
    wrap(module, "weight_hh_l0")
    module.eval()
    expected = functional_call(
        nn.LSTM(3, 4),
        {
            n: getattr(module, n)
            for n in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        },
        (X,),
    )
    y, _ = module(X)
    torch.testing.assert_close(y, expected[0])
    y.sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    with torch.no_grad():
        original = next(module.parametrizations.weight_hh_l0.parameters())
        original.add_(torch.randn_like(original))
    assert not torch.equal(module(X)[0], y)


def test_devices_and_dtypes():
    with torch.device("meta"):
        module = torch_manual.LSTM(3, 4, 2, bidirectional=True, proj_size=2)
        y, (h_n, c_n) = module(torch.empty(5, 2, 3))
        assert (y.shape, h_n.shape, c_n.shape) == ((5, 2, 4), (4, 2, 2), (4, 2, 4))
        y.sum().backward()
        assert module.weight_hh_l0.grad.is_meta
    module.to_empty(device="cpu").reset_parameters()
    assert module(X)[0].isfinite().all()
    module.share_memory()
    assert module.weight_hh_l0.is_shared()
    for convert, dtype in ((nn.Module.double, torch.float64), (nn.Module.half, torch.float16)):
        y, (h_n, c_n) = convert(module)(X.to(dtype))
        assert y.dtype == h_n.dtype == c_n.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    ours, stock = pair(torch_manual.LSTM, 3, 4, 2)
    with torch.autocast("cpu", dtype=dtype):
        y, (h_n, c_n) = ours(X)
        assert y.dtype == h_n.dtype == c_n.dtype == dtype
        assert ours(X.to(dtype))[0].dtype == dtype
    torch.testing.assert_close(y.float(), stock(X)[0], rtol=0.02, atol=0.02)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())
    stock(X)[0].sum().backward()
    for p, q in zip(ours.parameters(), stock.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 0.03 * q.grad.abs().max()
    double = torch_manual.LSTM(3, 4, dtype=torch.float64)
    with torch.autocast("cpu", dtype=dtype):
        assert double(X.double())[0].dtype == torch.float64


@pytest.mark.parametrize("states", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_of_a_cell(x_dtype, states):
    """On the CPU its states keep their precision, as in stock."""
    ours, stock = pair(torch_manual.LSTMCell, 3, 4)
    x = X[0].to(x_dtype)
    hx = None if states is None else (torch.randn(len(x), 4, dtype=states),) * 2
    results = []
    for module in (ours, stock):
        with torch.autocast("cpu", torch.bfloat16):
            h, c = module(x, hx)
        (h.float().sum() + c.float().sin().sum()).backward()
        results.append((h, c, *(p.grad for p in module.parameters())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.05)


def test_scaled_gradients_train_alike():
    """GradScaler: the same steps as stock, and none where a gradient is infinite."""
    trained = []
    for module in pair(torch_manual.LSTM, 3, 4):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        scales = []
        for factor in (1.0, float("inf"), 1.0, 1.0):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = module(X)[0].float().square().mean() * factor
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        trained.append((scales, module.state_dict()))
    (ours, state), (stock, stock_state) = trained
    assert ours == stock == [1024.0, 512.0, 512.0, 1024.0]
    for name, p in state.items():
        torch.testing.assert_close(p, stock_state[name], rtol=0, atol=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("called", ["layer", "packed", "cell"])
def test_checkpointing_gives_the_same_gradients(called, reentrant):
    module = (torch_manual.LSTMCell if called == "cell" else torch_manual.LSTM)(3, 4)
    x = X.clone().requires_grad_()

    def run(x):
        if called == "packed":
            lengths = [5, *(3 for _ in range(x.shape[1] - 1))]
            return module(rnn.pack_padded_sequence(x, lengths))[0].data
        return module(x[0] if called == "cell" else x)[0]

    grads = []
    for f in (run, lambda x: torch.utils.checkpoint.checkpoint(run, x, use_reentrant=reentrant)):
        module.zero_grad()
        x.grad = None
        f(x).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_what_is_no_tensor_and_no_weights_is_refused():
    w, h = LSTMWeights(torch.randn(16, 3), torch.randn(16, 4)), torch.zeros(1, 2, 4)
    x = torch.randn(5, 2, 3)
    for call, message in (
        (lambda: lstm_layer(x, None, h, [w]), "x, h0 and c0 must be tensors, got Tensor, NoneType"),
        (lambda: lstm_layer(x, h, h, w), "weights must be a list of LSTMWeights"),
        (lambda: lstm_layer(x, h, h, [w[:2]]), "weights must be a list of LSTMWeights"),
        (lambda: torch_manual.functional.tanh([1.0]), "tanh: expected a tensor, got list"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    for weight in ("weight_ih", "weight_hh"):
        with pytest.raises(ValueError, match=f"{weight} must be .* got None"):
            lstm_layer(x, h, h, [w._replace(**{weight: None})])
