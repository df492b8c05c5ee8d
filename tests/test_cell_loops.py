"""Cells in a loop over time, whose weights' gradients are summed once for all steps."""

import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional

import reference
import torch_manual
from torch_manual.functions import lstm_cell

T, B, I, H = 5, 2, 3, 4


@pytest.fixture(autouse=True)
def small_loops_pay(monkeypatch):
    monkeypatch.setattr(lstm_cell, "_WORTH", -(1 << 40))


@pytest.fixture
def products(monkeypatch):
    """The numbers of rows whose terms were summed, product after product."""
    rows = []
    sums_of = lstm_cell.sums_of

    def spy(need, dpre, *rest):
        rows.append(dpre.shape[0])
        return sums_of(need, dpre, *rest)

    monkeypatch.setattr(lstm_cell, "sums_of", spy)
    return rows


def pair(stock=nn.LSTMCell, dtype=torch.float64):
    """Stock's cell and ours, of the same weights."""
    torch.manual_seed(0)
    a, b = stock(I, H, dtype=dtype), torch_manual.LSTMCell(I, H, dtype=dtype)
    b.load_state_dict(a.state_dict())
    return a, b


def each_step(cell, x, between=lambda t: t):
    h, c = x.new_zeros(B, H), x.new_zeros(B, H)
    hs = []
    for x_t in x:
        h, c = cell(x_t, (between(h), between(c)))
        hs.append(h)
    return hs


def steps(*args, **options):
    return torch.stack(each_step(*args, **options))


def loss_of(hs):
    return (hs * torch.linspace(-1, 1, hs.numel(), dtype=hs.dtype).view_as(hs)).sum()


def inputs(dtype=torch.float64):
    return torch.randn(T, B, I, generator=torch.Generator().manual_seed(1), dtype=dtype)


def gradients(cell, x, **options):
    return torch.autograd.grad(loss_of(steps(cell, x, **options)), list(cell.parameters()))


def assert_nothing_is_left(hs):
    """The loop's node keeps neither sums nor terms of the backward passes that are over."""
    assert hs[-1].grad_fn.of_loop.grad_fn.sums == {}


def expect_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_all_steps_but_the_first_are_summed_at_once(products):
    stock, ours = pair()
    expect_same(gradients(ours, inputs()), gradients(stock, inputs()))
    assert products == [(T - 1) * B]


BETWEEN = {
    "mask": lambda t: torch.tensor([[0.0], [1.0]], dtype=t.dtype) * t,
    "dropout": lambda t: functional.dropout(t, 0.5),
    "two views": lambda t: t.unsqueeze(0).squeeze(0),
    "nothing of a step": lambda t: t.detach(),
    "more than is looked through": lambda t: t.sin().cos().sin().cos(),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_may_lie_between_two_steps(products, name):
    stock, ours = pair()
    results = []
    for cell in (ours, stock):
        torch.manual_seed(0)
        results.append(gradients(cell, inputs(), between=BETWEEN[name]))
    expect_same(*results)
    found = name in ("mask", "dropout", "two views")
    assert products == ([(T - 1) * B] if found else [])


def test_unbatched(products):
    stock, ours = pair()
    results = []
    for cell in (ours, stock):
        h, c = torch.zeros(2, H, dtype=torch.float64)
        for x_t in inputs()[:, 0]:
            h, c = cell(x_t, (h, c))
        results.append(torch.autograd.grad((h + c).sin().sum(), list(cell.parameters())))
    expect_same(*results)
    assert products == [T - 1]


def test_long_loops_are_summed_in_blocks(products, monkeypatch):
    monkeypatch.setattr(lstm_cell, "_BLOCK_ROWS", 3)
    stock, ours = pair()
    x = inputs().repeat(2, 1, 1)
    expect_same(gradients(ours, x), gradients(stock, x))
    assert products == [4, 4, 4, 4, 2]  # two steps each, then the one that is left


def test_every_backward_pass_has_its_own_sums(products):
    stock, ours = pair()
    results = []
    for cell in (ours, stock):
        hs = each_step(cell, inputs())
        parameters = list(cell.parameters())
        part, whole = hs[2].sum(), torch.stack(hs).sin().sum()
        first = torch.autograd.grad(part, parameters, retain_graph=True)
        second = torch.autograd.grad(whole, parameters, retain_graph=True)
        results.append([*first, *second, *torch.autograd.grad(part, parameters)])
        if cell is ours:
            assert_nothing_is_left(hs)
    expect_same(*results)
    assert products == [2 * B, (T - 1) * B, 2 * B]


def test_steps_that_go_on_after_a_backward_pass():
    stock, ours = pair()
    for cell in (ours, stock):
        h = c = torch.zeros(B, H, dtype=torch.float64)
        for k, x_t in enumerate(inputs()):
            h, c = cell(x_t, (h, c))
            if k % 2:
                h.sum().backward(retain_graph=True)
    expect_same([p.grad for p in ours.parameters()], [p.grad for p in stock.parameters()])


def test_nothing_is_summed_that_nobody_asks_for(products):
    stock, ours = pair()
    results = []
    for cell in (ours, stock):
        x = inputs().requires_grad_()
        hs = each_step(cell, x)
        results.append(torch.autograd.grad(loss_of(torch.stack(hs)), x, retain_graph=True))
        if cell is ours:
            assert_nothing_is_left(hs)
    expect_same(*results)
    assert products == []


@pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
def test_a_single_parameter_is_asked_for(products, name):
    stock, ours = pair()
    results = [
        torch.autograd.grad(loss_of(steps(cell, inputs())), getattr(cell, name))
        for cell in (ours, stock)
    ]
    expect_same(*results)
    assert products == [(T - 1) * B]


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "bias_hh"])
def test_a_parameter_is_frozen_halfway(name, at):
    stock, ours = pair()
    for cell in (ours, stock):
        h = c = torch.zeros(B, H, dtype=torch.float64)
        for k, x_t in enumerate(inputs()):
            getattr(cell, name).requires_grad_(k < at)
            h, c = cell(x_t, (h, c))
        getattr(cell, name).requires_grad_(True)
        h.sum().backward()
    expect_same([p.grad for p in ours.parameters()], [p.grad for p in stock.parameters()])


def test_loops_that_share_cells(products):
    """Two layers, and the first one's cell again, which goes on with the second's states."""
    results = []
    for kind in (torch_manual.LSTMCell, nn.LSTMCell):
        torch.manual_seed(0)
        first, second = (kind(n, H, dtype=torch.float64) for n in (I, H))
        x = inputs()
        states = [torch.zeros(B, H, dtype=torch.float64)] * 4
        for x_t in x:
            states[:2] = first(x_t, tuple(states[:2]))
            states[2:] = second(states[0], tuple(states[2:]))
        for x_t in x:
            states[2:] = first(x_t, tuple(states[2:]))
        parameters = [*first.parameters(), *second.parameters()]
        loss = sum(s.sin().sum() for s in states)
        results.append(torch.autograd.grad(loss, parameters))
    expect_same(*results)
    assert sorted(products) == [(T - 1) * B] * 3


@pytest.mark.parametrize("peephole", ["diagonal", "full"])
@pytest.mark.parametrize("bias", [True, False])
def test_peepholes(products, peephole, bias):
    torch.manual_seed(0)
    cell = torch_manual.PeepholeLSTMCell(I, H, bias, peephole=peephole, dtype=torch.float64)
    named = dict(cell.named_parameters())
    got = gradients(cell, inputs())
    expected = torch.autograd.grad(
        loss_of(steps(lambda x_t, hc: reference.lstm_step(x_t, *hc, named), inputs())),
        list(named.values()),
    )
    expect_same(got, expected)
    assert products == [(T - 1) * B]


def test_second_order_sums_step_by_step(products):
    stock, ours = pair()
    results = []
    for cell in (stock, ours):
        parameters = list(cell.parameters())
        first = torch.autograd.grad(loss_of(steps(cell, inputs())), parameters, create_graph=True)
        assert products == []
        norm = sum((g**2).sum() for g in first)
        results.append([*first, *torch.autograd.grad(norm, parameters)])
    expect_same(*results)


def test_a_step_called_by_hand_returns_its_term(products):
    _, ours = pair()
    x = inputs()
    h, c = ours(x[0])
    node = ours(x[1], (h, c))[0].grad_fn
    dh = torch.ones(B, H, dtype=torch.float64)
    alone = ours(x[1], (h.detach(), c.detach()))[0].grad_fn
    backward = lstm_cell.LSTMCellFunction.backward
    with torch.no_grad():
        expect_same(backward(node, dh, None)[4:], backward(alone, dh, None)[4:])
    assert products == []


@pytest.mark.parametrize("backend", ["", "eager"])
def test_compiled_autograd_sums_step_by_step(products, backend):
    from torch._dynamo import compiled_autograd  # heavy, and of this test alone

    stock, ours = pair()
    expected = gradients(stock, inputs())
    torch._dynamo.reset()
    compiled = torch.compile(backend=backend, fullgraph=True)
    compile_graph = compiled if backend else lambda graph: graph
    loss = loss_of(steps(ours, inputs()))
    with compiled_autograd._enable(compile_graph):
        loss.backward()
    expect_same([p.grad for p in ours.parameters()], list(expected))
    assert products == []


def test_backward_passes_side_by_side():
    _, ours = pair()
    hs = steps(ours, inputs())
    parameters = list(ours.parameters())
    expected = torch.autograd.grad(loss_of(hs), parameters, retain_graph=True)
    results = [None] * 4

    def run(k):
        for _ in range(20):
            results[k] = torch.autograd.grad(loss_of(hs), parameters, retain_graph=True)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        expect_same(result, expected)


def test_a_loop_is_freed_with_its_graph():
    _, ours = pair()
    x = inputs().requires_grad_()
    gc.collect()
    gc.disable()
    try:
        rows = [x_t.clone() for x_t in x]
        kept = [weakref.ref(t) for t in rows]
        h, c = ours(rows[0])
        for x_t in rows[1:]:
            h, c = ours(x_t, (h, c))
        h.sum().backward(retain_graph=True)
        del h, c, rows, x_t
        assert all(ref() is None for ref in kept)
    finally:
        gc.enable()


def test_float32_is_as_exact_as_stock():
    torch.manual_seed(0)
    stock = nn.LSTMCell(96, 128)
    x = torch.randn(50, 4, 96)
    results = {}
    for name, cell, dtype in (
        ("exact", nn.LSTMCell(96, 128), torch.float64),
        ("stock", stock, torch.float32),
        ("ours", torch_manual.LSTMCell(96, 128), torch.float32),
    ):
        cell.load_state_dict(stock.state_dict())
        cell.to(dtype)
        h = c = torch.zeros(4, 128, dtype=dtype)
        loss = 0
        for x_t in x.to(dtype):
            h, c = cell(x_t, (h, c))
            loss = loss + h.sin().sum()
        results[name] = torch.autograd.grad(loss, list(cell.parameters()))
    for exact, stocks, got in zip(results["exact"], results["stock"], results["ours"], strict=True):
        assert (got - exact).abs().max() <= 2 * (stocks - exact).abs().max()


def test_by_default_only_large_weights_of_few_rows(products, monkeypatch):
    monkeypatch.undo()
    counted = []
    apply = lstm_cell.LoopSumsFunction.apply
    monkeypatch.setattr(
        lstm_cell.LoopSumsFunction, "apply", lambda *w: counted.append(w[1].shape) or apply(*w)
    )
    for n_rows, width in ((1, 128), (1, 32), (64, 128), (16, 300)):
        cell = torch_manual.LSTMCell(width, width)
        h = c = torch.zeros(n_rows, width)
        for _ in range(3):
            h, c = cell(torch.zeros(n_rows, width), (h, c))
    assert counted == [(512, 128), (1200, 300)]
