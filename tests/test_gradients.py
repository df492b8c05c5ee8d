"""Every gradient three ways: finite differences, the float64 reference, the stock module."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

import torch_manual
from cases import (
    CASE_SAMPLES,
    CASES,
    IDS,
    SAMPLES,
    Sample,
    cotangents,
    gradients,
    run,
    run_reference,
)


@pytest.mark.parametrize(("case", "sample"), CASE_SAMPLES, ids=IDS)
def test_gradcheck(case, sample):
    module = _Run(case.build(sample, return_cells=True), sample)
    names = [n for n, _ in module.named_parameters()]

    def f(x, h0, c0, *params):
        return functional_call(module, dict(zip(names, params, strict=True)), (x, h0, c0))

    params = [p.detach().clone().requires_grad_() for p in module.parameters()]
    deep = sample.layers * sample.D > 1
    assert torch.autograd.gradcheck(f, (*sample.inputs(), *params), fast_mode=deep)


class _Run(nn.Module):
    def __init__(self, module, sample):
        super().__init__()
        self.module, self.sample = module, sample

    def forward(self, x, h0, c0):
        return run(self.module, self.sample, x, h0, c0)


@pytest.mark.parametrize(("case", "sample"), CASE_SAMPLES, ids=IDS)
def test_against_reference(case, sample):
    module = case.build(sample, return_cells=True)
    inputs = sample.inputs()
    ours = run(module, sample, *inputs)
    expected = run_reference(case, sample, dict(module.named_parameters()), *inputs)
    for name, a, b in zip(("y", "h_n", "c_n", "cells"), ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    leaves = inputs + list(module.parameters())
    weights = cotangents(ours)
    for a, b in zip(
        gradients(ours, leaves, weights), gradients(expected, leaves, weights), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("only", range(4), ids=["y", "h_n", "c_n", "cells"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_loss_through_one_output_only(case, only):
    for sample in (s for s in SAMPLES if s.id in ("reverse", "packed-reverse-proj")):
        module = case.build(sample, return_cells=True)
        inputs = sample.inputs()
        leaves = inputs + list(module.parameters())
        a = run(module, sample, *inputs)[only]
        b = run_reference(case, sample, dict(module.named_parameters()), *inputs)[only]
        weight = cotangents([a])
        for leaf, p, q in zip(
            leaves, gradients(a, leaves, weight), gradients(b, leaves, weight), strict=True
        ):
            p, q = (torch.zeros_like(leaf) if t is None else t for t in (p, q))
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.id)
def test_error_is_at_most_twice_stocks(sample, dtype):
    """Root mean square error against float64 of every output and gradient, median of many draws.

    Saturated gates need more of them: of two equal modules either can err 2 × the other in a draw.
    """
    errors = []
    for seed in range(20 if sample.scale == 1 else 300):
        torch.manual_seed(seed)
        ours = torch_manual.LSTM(sample.I, sample.H, dtype=dtype, **sample.kwargs)
        stock = nn.LSTM(sample.I, sample.H, dtype=dtype, **sample.kwargs)
        exact = nn.LSTM(sample.I, sample.H, dtype=torch.float64, **sample.kwargs)
        results = []
        for module in (exact, ours, stock):
            module.load_state_dict(ours.state_dict())
            d = next(module.parameters()).dtype
            inputs = [t.detach().to(dtype).to(d) for t in sample.inputs(seed=seed)]
            outputs = run(module, sample, *(t.requires_grad_() for t in inputs))
            grads = gradients(outputs, inputs + list(module.parameters()), cotangents(outputs))
            results.append([t.detach().double() for t in (*outputs, *grads)])
        errors.append(
            [
                [(t - truth).square().mean().sqrt() for t in (a, b)]
                for truth, a, b in zip(*results, strict=True)
            ]
        )
    for own, stocks in torch.tensor(errors).median(0).values:
        assert own <= 2 * stocks


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.id)
def test_against_stock(sample):
    ours = torch_manual.LSTM(sample.I, sample.H, dtype=torch.float64, **sample.kwargs)
    stock = nn.LSTM(sample.I, sample.H, dtype=torch.float64, **sample.kwargs)
    stock.load_state_dict(ours.state_dict())
    inputs = sample.inputs()
    a, b = run(ours, sample, *inputs), run(stock, sample, *inputs)
    ga = gradients(a, inputs + list(ours.parameters()), cotangents(a))
    gb = gradients(b, inputs + list(stock.parameters()), cotangents(b))
    for p, q in zip((*a, *ga), (*b, *gb), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.id)
@pytest.mark.parametrize("peephole", ["diagonal", "full"])
def test_zero_peepholes_are_the_lstm_exactly(sample, peephole):
    lstm = torch_manual.LSTM(sample.I, sample.H, **sample.kwargs)
    peep = torch_manual.PeepholeLSTM(sample.I, sample.H, peephole=peephole, **sample.kwargs)
    for name, p in peep.named_parameters():
        p.data = lstm.state_dict()[name] if name in lstm.state_dict() else torch.zeros_like(p)
    inputs = sample.inputs(torch.float32)
    for a, b in zip(run(lstm, sample, *inputs), run(peep, sample, *inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("peephole", ["diagonal", "full"])
def test_every_gate_of_the_article(peephole):
    """dU, dW, dV and db of i, f, o and c, each by central differences of the reference's loss."""
    T, B, I, H = 3, 2, 3, 4
    module = torch_manual.PeepholeLSTM(I, H, peephole=peephole, dtype=torch.float64)
    sample = Sample("article", T, B, I, H)
    inputs = [t.detach() for t in sample.inputs()]
    case = next(c for c in CASES if c.name == f"peephole-{peephole}")
    weights = cotangents(run(module, sample, *inputs))

    def loss(params):
        outputs = run_reference(case, sample, params, *inputs)
        return sum((a * b).sum() for a, b in zip(outputs, weights, strict=False)).item()

    torch.autograd.backward(run(module, sample, *inputs), weights)
    params = {n: p.detach().clone() for n, p in module.named_parameters()}
    blocks = 0
    for name, p in params.items():
        n_gates = 4 if p.shape[0] == 4 * H else 1
        for gate in range(n_gates):
            rows = slice(gate * p.shape[0] // n_gates, (gate + 1) * p.shape[0] // n_gates)
            numeric = torch.empty_like(p[rows])
            for k in range(numeric.numel()):
                entry = p[rows].view(-1)
                before, eps = entry[k].item(), 1e-6
                entry[k] = before + eps
                up = loss(params)
                entry[k] = before - eps
                down = loss(params)
                entry[k] = before
                numeric.view(-1)[k] = (up - down) / (2 * eps)
            got = module.get_parameter(name).grad[rows]
            torch.testing.assert_close(got, numeric, rtol=1e-6, atol=1e-8)
            blocks += 1
    assert blocks == 4 * 4 + 3


def test_reference_is_the_stock_module():
    for sample in SAMPLES:
        stock = nn.LSTM(sample.I, sample.H, dtype=torch.float64, **sample.kwargs)
        inputs = sample.inputs()
        expected = run(stock, sample, *inputs)
        got = CASES[0].reference(
            *inputs,
            dict(stock.named_parameters()),
            sample.layers,
            sample.D == 2,
            sample.lengths,
        )
        for a, b in zip(expected, got[:3], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
