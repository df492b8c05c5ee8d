"""What a model does to outputs, states and dtypes of nn.LSTM, done to ours."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import torch_manual

FREE = [
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"proj_size": 3},
    {"dtype": torch.float64},
    {"bidirectional": True, "recompute": 2},
    "packed",
]


def both(kwargs, I=4, H=4):
    kwargs = {} if kwargs == "packed" else dict(kwargs)
    ours = torch_manual.LSTM(I, H, **kwargs)
    kwargs.pop("recompute", None)
    stock = nn.LSTM(I, H, **kwargs)
    stock.load_state_dict(ours.state_dict())
    return ours, stock


@pytest.mark.parametrize("kwargs", FREE, ids=str)
def test_output_may_be_changed_in_place_where_stock_lets_it(kwargs):
    ours, stock = both(kwargs)
    x = torch.randn(5, 3, 4, dtype=ours.weight_hh_l0.dtype)
    results = []
    for module in (ours, stock):
        given = pack_padded_sequence(x, [5, 4, 2]) if kwargs == "packed" else x
        y = module(given)[0]
        y = y.data if kwargs == "packed" else y
        y += 0.1
        y.relu_()
        results.append(torch.autograd.grad(y.sum(), list(module.parameters())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_changed_output_is_refused_where_stock_refuses_it():
    for module in both({}):
        y = module(torch.randn(5, 3, 4))[0]
        y.relu_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("H", [4, 512])  # of the larger one memory is kept
def test_outputs_and_gradients_are_no_views(H):
    for module in both({}, 4, H):
        x = torch.randn(40, 20, 4)
        with torch.no_grad():
            y, _ = module(x)
        y += nn.Parameter(torch.zeros(()))
        frozen = module.requires_grad_(False)(x)[0].detach_()
        assert not frozen.requires_grad
        module.requires_grad_()
        for g in torch.autograd.grad(module(x)[0].sum(), list(module.parameters())):
            g.detach_()


@pytest.mark.parametrize("kwargs", [{}, {"proj_size": 3}, {"num_layers": 2, "bidirectional": True}])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("states", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_gives_stocks_dtypes_and_numbers(kwargs, packed, states, dtype):
    ours, stock = both(kwargs, 16, 16)
    exact = nn.LSTM(16, 16, dtype=torch.float64, **kwargs)
    exact.load_state_dict(ours.state_dict())
    x = torch.randn(12, 8, 16).to(dtype)
    layers = ours.num_layers * (1 + ours.bidirectional)
    sizes = ours.proj_size or 16, 16
    hx = None
    if states is not None:
        hx = tuple(torch.randn(layers, 8, n).to(states) for n in sizes)
    results = []
    for module in (ours, stock, exact):
        of_exact = module is exact
        given = x.double() if of_exact else x
        h0 = None if hx is None else tuple(t.double() if of_exact else t for t in hx)
        given = pack_padded_sequence(given, [12, 9, 5, 5, 4, 3, 1, 1]) if packed else given
        with torch.autocast("cpu", torch.bfloat16, enabled=not of_exact):
            y, (h_n, c_n) = module(given, h0)
        outputs = y.data, h_n, c_n
        leaves = list(module.parameters())
        gradients = torch.autograd.grad(sum(t.double().cos().sum() for t in outputs), leaves)
        results.append((*outputs, *gradients))
    errors = [
        [((t.double() - c).norm() / c.norm()).item() for t, c in zip(of, results[2], strict=True)]
        for of in results[:2]
    ]
    assert [t.dtype for t in results[0]] == [t.dtype for t in results[1]]
    assert max(errors[0]) <= 2 * max(errors[1])


def test_a_default_device_is_not_the_memorys():
    module = torch_manual.LSTM(64, 128)
    x = torch.randn(32, 8, 64)
    with torch.no_grad():
        expected = module(x)[0]
        with torch.device("meta"):
            for _ in range(2):
                assert torch.equal(module(x)[0], expected)


def test_tensors_without_memory_are_refused():
    module = torch_manual.LSTM(16, 32)
    x = torch.randn(50, 4, 16)
    y = module(x)[0]
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"a tensor of shape \(200, 16\) has no memory"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="has no memory"), torch.no_grad():
        module(x)


def test_zeros_without_memory_are_refused():
    """nn.LSTM computes with whatever it finds at their address."""
    lstm = torch_manual.LSTM(4, 4)
    with pytest.raises(RuntimeError, match=r"of shape \(15, 4\) is a ZeroTensor: clone it"):
        lstm(torch._efficientzerotensor((5, 3, 4)))


def test_a_parameter_that_negates():
    ours, stock = both({})
    x = torch.randn(5, 3, 4)
    h0 = nn.Parameter(torch._neg_view(torch.randn(1, 3, 4)))
    hx = h0, torch.randn(1, 3, 4)
    torch.testing.assert_close(ours(x, hx)[0], stock(x, hx)[0])


def test_states_of_packed_input_must_be_two():
    for module in both({}):
        with pytest.raises(RuntimeError, match="lstm expects two hidden states"):
            module(pack_padded_sequence(torch.randn(5, 3, 4), [5, 4, 2]), (torch.randn(1, 3, 4),))


def test_forward_ad_around_vmap_of_grad():
    lstm = torch_manual.LSTM(3, 4, dtype=torch.float64)
    x, v = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    weights = {name: p.detach() for name, p in lstm.named_parameters()}

    def per_sample(x):
        def loss(w, x):
            return functional_call(lstm, w, (x,))[0].square().sum()

        return vmap(grad(loss), (None, 1))(weights, x)["weight_hh_l0"]

    with forward_ad.dual_level():
        dual = per_sample(forward_ad.make_dual(x.clone(), v.clone()))
        tangent = forward_ad.unpack_dual(dual).tangent
    assert tangent is not None
    torch.testing.assert_close(tangent, jvp(per_sample, (x.clone(),), (v.clone(),))[1])


def test_forward_mode_gives_no_tangent_to_what_has_none():
    lstm, cell = torch_manual.LSTM(3, 4), torch_manual.LSTMCell(3, 4)
    x = torch.randn(5, 2, 3)
    for context in (torch.no_grad, torch.enable_grad):
        with context(), forward_ad.dual_level():
            for y in (lstm(x)[0], cell(x[0])[0]):
                assert forward_ad.unpack_dual(y).tangent is None
                forward_ad.make_dual(y, torch.ones_like(y))


def test_functionalize():
    lstm = torch_manual.LSTM(3, 4, 2)
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        y = torch.func.functionalize(lambda x: lstm(x)[0].relu_())(x)
        torch.testing.assert_close(y, lstm(x)[0].relu())


class FromStates(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = torch_manual.LSTM(3, 64)

    def forward(self, x):
        h = torch.zeros(1, x.shape[1], 64)
        return self.lstm(x, (h, h))[0]


def test_exported_modules_check_their_inputs():
    x = torch.randn(5, 20, 3)
    exported = torch.export.export(FromStates(), (x,)).module()
    for call in (exported, torch.no_grad()(exported)):
        with pytest.raises(RuntimeError, match="are not the same dtype"):
            call(x.double())
    plain = torch.export.export(torch_manual.LSTM(3, 4), (x,)).module()
    with pytest.raises(RuntimeError, match="are not the same dtype"):
        plain(x.double())


def test_exported_modules_under_autocast():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.lstm = nn.Linear(3, 3), torch_manual.LSTM(3, 4)

        def forward(self, x):
            return self.lstm(self.first(x))[0]

    net, x = Net(), torch.randn(5, 2, 3)
    exported = torch.export.export(net, (x,)).module()
    for context in (torch.enable_grad, torch.no_grad):
        with context(), torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(exported(x), net(x))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = exported(x), net(x)
    ours.float().sum().backward()
    theirs.float().sum().backward()
    torch.testing.assert_close(exported.lstm.weight_hh_l0.grad, net.lstm.weight_hh_l0.grad)
    gc.collect()


DROP_INS = {
    "layer": lambda: torch_manual.LSTM(8, 9),
    "two-directions": lambda: torch_manual.LSTM(8, 9, bidirectional=True),
    "projection": lambda: torch_manual.LSTM(8, 9, proj_size=2),
    "recompute": lambda: torch_manual.LSTM(8, 9, recompute=2),
    "peepholes": lambda: torch_manual.PeepholeLSTM(8, 9, peephole="full"),
    "cell": lambda: torch_manual.LSTMCell(8, 9),
    "peephole-cell": lambda: torch_manual.PeepholeLSTMCell(8, 9),
}


def _set_data(module, new):
    for p in module.parameters():
        p.data = new(p)


CHANGES = {
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "empty": lambda m: _set_data(m, lambda p: p.new_empty(0)),
    "smaller": lambda m: _set_data(m, lambda p: p.new_zeros(3)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("make", DROP_INS.values(), ids=DROP_INS)
def test_weights_that_have_changed_are_refused_in_the_backward_pass(make, change):
    """Autograd does not notice: the kernel would read past their end."""
    module = make()
    x = torch.randn(*(() if isinstance(module, nn.RNNCellBase) else (5,)), 3, 8)
    y = module(x)[0]
    change(module)
    with pytest.raises(RuntimeError, match="changed since the forward pass"):
        y.sum().backward()


def test_weights_that_have_changed_are_refused_in_a_double_backward():
    module, x = torch_manual.LSTM(8, 9), torch.randn(5, 3, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
    module.half()
    with pytest.raises(RuntimeError, match="changed since the forward pass"):
        dx.sum().backward()


HOOKS = {
    "dtype": lambda t: t.double() if t.is_floating_point() else t,
    "shape": lambda t: t[:1],
    "one": lambda t: t.double() if t.shape == (5 * 3, 8) or t.shape == (3, 8) else t,
}


@pytest.mark.parametrize("unpack", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("make", DROP_INS.values(), ids=DROP_INS)
def test_saved_tensors_that_a_hook_has_changed_are_refused(make, unpack):
    module = make()
    x = torch.randn(*(() if isinstance(module, nn.RNNCellBase) else (5,)), 3, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        y = module(x)[0]
    with pytest.raises(RuntimeError, match="changed since the forward pass"):
        y.sum().backward()


@pytest.mark.parametrize("make", [torch_manual.LSTM, torch_manual.PeepholeLSTM])
@pytest.mark.parametrize("proj_size", [0, 3])
def test_a_weight_that_is_none_is_refused(make, proj_size):
    module = make(4, 5, proj_size=proj_size)
    module.weight_hh_l0 = None
    with torch.no_grad(), pytest.raises(ValueError, match=r"weight_hh must be \(4H, P\).*got None"):
        module(torch.randn(2, 1, 4))


def test_the_gradient_of_a_narrow_projection_is_as_accurate_as_stock():
    """A sum over 8000 rows of one column, which BLAS adds up in one go."""
    errors = {}
    for seed in range(3):
        torch.manual_seed(seed)
        stock = nn.LSTM(3, 20, proj_size=1)
        x = torch.randn(100, 80, 3)
        exact = copy.deepcopy(stock).double()
        right = torch.autograd.grad(exact(x.double())[0].square().mean(), exact.weight_hr_l0)[0]
        for name, module in (
            ("stock", stock),
            ("ours", torch_manual.replace(copy.deepcopy(stock))),
        ):
            (dw,) = torch.autograd.grad(module(x)[0].square().mean(), module.weight_hr_l0)
            errors.setdefault(name, []).append((dw - right).norm() / right.norm())
    assert sum(errors["ours"]) <= 2 * sum(errors["stock"])
