"""One step at a time: the cells' gradients, every order and mode, and their use in a loop."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

import reference
import torch_manual
from torch_manual.functions import lstm_cell

KINDS = {
    "plain": (torch_manual.LSTMCell, {}),
    "no-bias": (torch_manual.LSTMCell, {"bias": False}),
    "diagonal": (torch_manual.PeepholeLSTMCell, {"peephole": "diagonal"}),
    "full": (torch_manual.PeepholeLSTMCell, {"peephole": "full"}),
}
T, B, I, H = 3, 2, 3, 4


def chain(step, x, h, c):
    """The h of all steps over x (T, B, I), and the last c."""
    hs = []
    for x_t in x:
        h, c = step(x_t, (h, c))
        hs.append(h)
    return torch.stack(hs), c


@pytest.fixture(autouse=True, params=["step", "loop"])
def summed_by(request, monkeypatch):
    """Whether the weights' gradients are summed step by step or once for all steps of a loop."""
    if request.param == "loop":
        monkeypatch.setattr(lstm_cell, "_WORTH", -(1 << 40))


def as_functions(kind):
    """Ours and the reference, of (x, h, c, *parameters), and these."""
    torch.manual_seed(0)
    cls, options = KINDS[kind]
    cell = cls(I, H, **options).double()
    names = [name for name, _ in cell.named_parameters()]

    def ours(x, h, c, *params):
        named = dict(zip(names, params, strict=True))
        return chain(lambda x_t, hc: functional_call(cell, named, (x_t, hc)), x, h, c)

    def expected(x, h, c, *params):
        named = dict(zip(names, params, strict=True))
        return chain(lambda x_t, hc: reference.lstm_step(x_t, *hc, named), x, h, c)

    shapes = (T, B, I), (B, H), (B, H)
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    leaves = [t.detach().requires_grad_() for t in (*inputs, *cell.parameters())]
    return ours, expected, leaves


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    f, _, leaves = as_functions(kind)
    assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True, check_batched_grad=True)


@pytest.mark.parametrize("kind", KINDS)
def test_gradgradcheck(kind):
    f, _, leaves = as_functions(kind)
    assert torch.autograd.gradgradcheck(f, leaves, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_first_and_second_order_against_autograd_of_the_reference(kind):
    ours, expected, leaves = as_functions(kind)
    results = []
    for f in (ours, expected):
        hs, c = f(*leaves)
        first = torch.autograd.grad(
            (hs * hs.detach().cos()).sum() + (c**3).sum(), leaves, create_graph=True
        )
        second = torch.autograd.grad(sum((t * t).sum() for t in first), leaves)
        results.append([hs, c, *first, *second])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_jvp_and_per_sample_gradients(kind):
    f, expected, (x, h, c, *params) = as_functions(kind)

    def loss(params, x, h, c):
        hs, c = f(x.unsqueeze(1), h.unsqueeze(0), c.unsqueeze(0), *params)
        return hs.sin().sum() + (c**2).sum()

    each = vmap(grad(loss), in_dims=(None, 1, 0, 0))(params, x, h, c)
    for b in range(B):
        alone = torch.autograd.grad(loss(params, x[:, b], h[b], c[b]), params)
        for k in range(len(params)):
            torch.testing.assert_close(each[k][b], alone[k], rtol=1e-10, atol=1e-12)
    point = tuple(t.detach() for t in (x, h, c, *params))
    along = tuple(map(torch.randn_like, point))
    for a, b in zip(jvp(f, point, along)[1], jvp(expected, point, along)[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("used", ["h", "c", "both"])
@pytest.mark.parametrize("frozen", ["", "weight_hh", "all"])
def test_stocks_gradients_of_what_is_used_and_not_frozen(used, frozen):
    torch.manual_seed(0)
    stock, ours = nn.LSTMCell(I, H), torch_manual.LSTMCell(I, H)
    ours.load_state_dict(stock.state_dict())
    x, h0, c0 = torch.randn(B, I), torch.randn(B, H), torch.randn(B, H)
    results = []
    for cell in (stock, ours):
        for name, p in cell.named_parameters():
            p.requires_grad_(frozen not in ("all", name))
        leaves = [t.clone().requires_grad_() for t in (x, h0, c0)]
        h, c = cell(leaves[0], tuple(leaves[1:]))
        loss = (h.sin().sum() if used != "c" else 0) + ((c**2).sum() if used != "h" else 0)
        loss.backward()
        results.append([t.grad for t in (*leaves, *cell.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


def test_no_gradient_arrives():
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):
            return h.clone()

        @staticmethod
        def backward(ctx, _):
            return None

    for cell in (nn.LSTMCell(I, H), torch_manual.LSTMCell(I, H)):
        h, _ = cell(torch.randn(B, I))
        Stop.apply(h).sum().backward()
        assert all(p.grad is None for p in cell.parameters())


def test_outputs_may_be_changed_in_place():
    torch.manual_seed(0)
    stock, ours = nn.LSTMCell(I, H), torch_manual.LSTMCell(I, H)
    ours.load_state_dict(stock.state_dict())
    x, mask = torch.randn(T, B, I), torch.tensor([[0.0], [1.0]])
    results = []
    for cell in (stock, ours):
        h, c = torch.ones(B, H), torch.ones(B, H)
        for x_t in x:
            h, c = cell(x_t, (h, c))
            h.mul_(mask), c.mul_(mask)  # a new episode begins
        results.append(torch.autograd.grad(h.sum() + c.sum(), list(cell.parameters())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


def test_what_is_saved_passes_through_hooks():
    cell = torch_manual.LSTMCell(I, H)
    packed = []

    def pack(t):
        packed.append(t.shape)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        h, c = cell(torch.randn(B, I), (torch.randn(B, H), torch.randn(B, H)))
    assert (1, B, 4 * H) in packed  # the gates
    (h.sum() + c.sum()).backward()
    assert all(p.grad.abs().sum() > 0 for p in cell.parameters())


def test_use_after_a_transform_has_ended():
    cell = torch_manual.LSTMCell(I, H)
    kept = []

    def f(x):
        kept.append(x)
        return cell(x, (x.new_zeros(B, H), x.new_zeros(B, H)))[0].sum()

    x = torch.randn(B, I)
    grad(f)(x)
    h, _ = cell(kept[0], (torch.zeros(B, H), torch.zeros(B, H)))
    torch.testing.assert_close(h, cell(x)[0])
    h.sum().backward()
