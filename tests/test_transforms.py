"""Second order, forward mode, vmap, per-sample gradients, torch.func, compile and export."""

import io

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import torch_manual
from cases import CASE_SAMPLES, CASES, IDS, SAMPLES, Sample, run_reference


def as_function(case, sample):
    """The layer as a function of (x, h0, c0, *parameters), and these; x is rows when packed."""
    module = case.build(sample, return_cells=True)
    names = [n for n, _ in module.named_parameters()]
    x, h0, c0 = sample.inputs()
    packed = None
    if sample.lengths is not None:
        packed = pack_padded_sequence(x.detach(), sample.lengths, enforce_sorted=False)
        x = packed.data.clone().requires_grad_()

    def f(x, h0, c0, *params):
        if packed is not None:
            x = PackedSequence(x, *packed[1:])
        y, (h_n, c_n), cells = functional_call(
            module, dict(zip(names, params, strict=True)), (x, (h0, c0))
        )
        if packed is not None:
            y, cells = y.data, cells.data
        return y, h_n, c_n, cells

    params = [p.detach().clone().requires_grad_() for p in module.parameters()]
    return f, (x, h0, c0, *params)


@pytest.mark.parametrize(("case", "sample"), CASE_SAMPLES, ids=IDS)
def test_forward_mode(case, sample):
    f, args = as_function(case, sample)
    assert torch.autograd.gradcheck(
        f, args, check_forward_ad=True, check_backward_ad=False, fast_mode=True
    )


CLASSES = ("T1-B1-I1-H1", "T3-B2-I5-H7", "two-layers-reverse-proj", "packed-reverse-proj")


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.id in CLASSES], ids=lambda s: s.id)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_second_order(case, sample):
    f, args = as_function(case, sample)
    assert torch.autograd.gradgradcheck(f, args, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.id in CLASSES], ids=lambda s: s.id)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_batched_gradients(case, sample):
    f, args = as_function(case, sample)
    assert torch.autograd.gradcheck(
        f,
        args,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        fast_mode=True,
    )
    assert torch.autograd.gradgradcheck(f, args, check_batched_grad=True, fast_mode=True)


@pytest.mark.parametrize("sample", [s for s in SAMPLES if not s.lengths], ids=lambda s: s.id)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_second_order_against_autograd_of_the_reference(case, sample):
    f, args = as_function(case, sample)
    module = case.build(sample)
    names = [n for n, _ in module.named_parameters()]

    def g(x, h0, c0, *params):
        return run_reference(case, sample, dict(zip(names, params, strict=True)), x, h0, c0)

    results = []
    for function in (f, g):
        loss = sum((t * t.detach().cos()).sum() + (t**3).sum() for t in function(*args))
        first = torch.autograd.grad(loss, args, create_graph=True)
        penalty = sum((t * t).sum() + (t * t.detach().sin()).sum() for t in first)
        results.append(torch.autograd.grad(penalty, args))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * max(1.0, b.abs().max().item()))


SMALL = Sample("small", 3, 2, 2, 3)
SMALL_DEEP = Sample(
    "small-deep", 3, 2, 2, 3, {"num_layers": 2, "bidirectional": True, "proj_size": 2}
)


@pytest.mark.parametrize("sample", [SMALL, SMALL_DEEP], ids=lambda s: s.id)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_hessian_both_ways(case, sample):
    f, args = as_function(case, sample)
    args = [a.detach() for a in args]

    def loss(x, w):
        y, h_n, c_n, cells = f(x, *args[1:4], w, *args[5:])
        return (y.sin().sum() + (c_n**2).sum() + cells.sum()) * h_n.sum()

    expected = jacrev(jacrev(loss, 1), 1)(args[0], args[4])
    for other in (hessian(loss, 1), jacrev(jacfwd(loss, 1), 1)):
        torch.testing.assert_close(other(args[0], args[4]), expected, rtol=1e-9, atol=1e-10)
    reference = torch.autograd.functional.hessian(lambda w: loss(args[0], w), args[4])
    torch.testing.assert_close(reference, expected, rtol=1e-9, atol=1e-10)


def test_forward_over_forward_is_refused():
    f, args = as_function(CASES[0], SMALL)
    args = [a.detach() for a in args]
    with pytest.raises(RuntimeError, match="forward mode over forward mode is not supported"):
        jacfwd(jacfwd(lambda x: f(x, *args[1:])[0].sum()))(args[0])


def test_third_order_is_refused():
    f, args = as_function(CASES[0], SMALL)
    (d1,) = torch.autograd.grad(f(*args)[0].pow(2).sum(), args[0], create_graph=True)
    (d2,) = torch.autograd.grad(d1.pow(2).sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="third order are not supported"):
        torch.autograd.grad(d2.pow(2).sum(), args[0])


def expect_vmap(function, in_dims, args):
    """`vmap(function)` equals applying it to one slice after the other."""
    n = next(a.shape[d] for a, d in zip(args, in_dims, strict=True) if d is not None)
    got = vmap(function, tuple(in_dims))(*args)
    each = [
        function(*(a if d is None else a.select(d, k) for a, d in zip(args, in_dims, strict=True)))
        for k in range(n)
    ]
    expected = [torch.stack(t) for t in zip(*each, strict=True)]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "sample",
    [
        s
        for s in SAMPLES
        if s.id in ("T3-B2-I5-H7", "two-layers-reverse-proj", "packed-reverse-proj")
    ],
    ids=lambda s: s.id,
)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_vmap(case, sample):
    f, args = as_function(case, sample)
    args = [a.detach() for a in args]
    many = [torch.stack([a, a.cos(), a * 0.5]) for a in args]
    none = [None] * len(args)
    over_inputs = [0, 0, 0, *none[3:]]
    expect_vmap(f, over_inputs, many[:3] + args[3:])
    expect_vmap(f, [0, *none[1:]], many[:1] + args[1:])
    expect_vmap(f, [1, *none[1:]], [many[0].movedim(0, 1), *args[1:]])
    expect_vmap(f, [*none[:3], *(0 for _ in none[3:])], args[:3] + many[3:])
    expect_vmap(f, [0] * len(args), many)

    def gradients(*args):
        return grad(lambda *a: sum(t.sin().sum() for t in f(*a)), tuple(range(len(args))))(*args)

    expect_vmap(gradients, over_inputs, many[:3] + args[3:])
    expect_vmap(gradients, [0] * len(args), many)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"num_layers": 2, "bidirectional": True, "proj_size": 3}])
def test_per_sample_gradients_of_a_module(batch_first, kwargs):
    model = torch_manual.LSTM(3, 4, batch_first=batch_first, dtype=torch.float64, **kwargs)
    params = {n: p.detach() for n, p in model.named_parameters()}
    x = torch.randn(6, 5, 3, dtype=torch.float64)

    def loss(params, x):
        y, (h_n, c_n) = functional_call(model, params, (x,))
        return y.sin().sum() + c_n.sum()

    per_sample = vmap(grad(loss), (None, 0))(params, x)
    for k in range(6):
        one = grad(loss)(params, x[k])
        for name, g in one.items():
            torch.testing.assert_close(per_sample[name][k], g, rtol=1e-11, atol=1e-12)


def test_gradient_through_vmapped_gradients():
    f, args = as_function(CASES[0], SMALL)
    args = [a.detach() for a in args]
    xs = torch.stack([args[0], args[0].cos()])

    def penalty(w, run):
        inner = grad(lambda w, x: f(x, *args[1:4], w, *args[5:])[0].sin().sum())
        return (run(inner, w) ** 2).sum()

    by_vmap = grad(lambda w: penalty(w, lambda g, w: vmap(g, (None, 0))(w, xs)))(args[4])
    by_loop = grad(lambda w: penalty(w, lambda g, w: torch.stack([g(w, x) for x in xs])))(args[4])
    torch.testing.assert_close(by_vmap, by_loop, rtol=1e-10, atol=1e-12)


def test_nested_vmap():
    f, args = as_function(CASES[0], SMALL)
    args = [a.detach() for a in args]
    x = torch.randn(2, 3, *args[0].shape, dtype=torch.float64)

    def g(x):
        return grad(lambda w: f(x, *args[1:4], w, *args[5:])[0].sin().sum())(args[4])

    expected = torch.stack([torch.stack([g(b) for b in a]) for a in x])
    torch.testing.assert_close(vmap(vmap(g))(x), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("randomness", ["same", "different", "error"])
def test_randomness_of_dropout_under_vmap(randomness):
    model = torch_manual.LSTM(3, 4, 2, dropout=0.5)
    x = torch.ones(2, 5, 2, 3)
    f = vmap(lambda x: model(x)[0], randomness=randomness)
    if randomness == "error":
        with pytest.raises(RuntimeError, match="randomness"):
            f(x)
    else:
        y = f(x)
        assert torch.equal(y[0], y[1]) == (randomness == "same")


def test_jvp_and_vjp_agree():
    f, args = as_function(CASES[0], SAMPLES[1])
    args = [a.detach() for a in args]
    tangents = [torch.randn_like(a) for a in args]
    out, tout = jvp(f, tuple(args), tuple(tangents))
    cotangents = tuple(torch.randn_like(t) for t in out)
    _, pull = vjp(f, *args)
    left = sum((a * b).sum() for a, b in zip(tout, cotangents, strict=True))
    right = sum((a * b).sum() for a, b in zip(tangents, pull(cotangents), strict=True))
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_export_with_dynamic_length():
    module = torch_manual.LSTM(3, 4, 2, bidirectional=True).eval()
    T = torch.export.Dim("T", min=2, max=1000)
    exported = torch.export.export(module, (torch.randn(6, 2, 3),), dynamic_shapes=({0: T},))
    for n in (3, 11):
        x = torch.randn(n, 2, 3)
        torch.testing.assert_close(exported.module()(x), module(x))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [
        (torch_manual.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 2}),
        (torch_manual.LSTM, {"recompute": 2}),
        (torch_manual.PeepholeLSTM, {"return_cells": True}),
        (torch_manual.LSTMCell, {}),
    ],
)
def test_exported_modules_train(cls, kwargs, strict):
    """Loaded, decomposed or compiled as well, with the eager gradients to the bit."""
    module = cls(3, 4, **kwargs)
    shape = (3,) if cls is torch_manual.LSTMCell else (2, 3)
    n = torch.export.Dim("n", min=2, max=100)
    example = torch.randn(5, *shape)
    exported = torch.export.export(module, (example,), dynamic_shapes=({0: n},), strict=strict)
    file = io.BytesIO()
    torch.export.save(exported, file)
    loaded = torch.export.load(io.BytesIO(file.getvalue()))
    x = torch.randn(7, *shape)
    expected = torch.autograd.grad(module(x)[0].square().sum(), [*module.parameters()])
    for program in (loaded, exported.run_decompositions(), exported):
        for backend in ("eager", "aot_eager"):
            trained = torch.compile(program.module(), backend=backend, dynamic=True)
            torch.testing.assert_close(trained(x), module(x), rtol=0, atol=0)
            found = torch.autograd.grad(trained(x)[0].square().sum(), [*trained.parameters()])
            assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("strict", [False, True])
def test_transforms_of_exported_modules(strict):
    module = torch_manual.LSTM(3, 4, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    exported = torch.export.export(module, (x,), strict=strict).module()

    def of(f):
        return lambda x: f(x)[0].sin().sum()

    for transform in (grad, hessian, lambda f: vmap(grad(f)), lambda f: vmap(f), jacfwd):
        given = torch.stack([x, -x]) if "lambda" in transform.__name__ else x
        found, expected = (transform(of(f))(given) for f in (exported, module))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_saved_tensors_hooks():
    module = torch_manual.LSTM(3, 4)
    x = torch.randn(5, 2, 3)
    packed = []

    def pack(t):
        packed.append(t.shape)
        return t.numpy().copy() if not t.requires_grad else t

    def unpack(t):
        return torch.from_numpy(t) if not isinstance(t, torch.Tensor) else t

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y, _ = module(x)
    y.sum().backward()
    got = [p.grad.clone() for p in module.parameters()]
    assert torch.Size([1, 10, 16]) in packed
    module.zero_grad()
    module(x)[0].sum().backward()
    for a, p in zip(got, module.parameters(), strict=True):
        assert torch.equal(a, p.grad)


def test_gradient_penalty_trains():
    """WGAN-GP: the norm of a critic's input gradient as a loss, beside torch.nn's."""
    grads = []
    for cls in (torch_manual.LSTM, nn.LSTM):
        torch.manual_seed(0)
        critic = cls(3, 4, dtype=torch.float64)
        x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
        (dx,) = torch.autograd.grad(critic(x)[0].sum(), x, create_graph=True)
        ((dx.norm(dim=2) - 1) ** 2).mean().backward()
        grads.append([p.grad for p in critic.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
