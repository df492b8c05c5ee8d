"""Under torch.compile(fullgraph=True): dense and packed, forward and backward, in one graph."""

import subprocess
import sys

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import torch_manual

COMPILED = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"proj_size": 3, "batch_first": True},
    {"num_layers": 2, "dropout": 0.3, "bias": False},
]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend):
    for kwargs in COMPILED if backend == "aot_eager" else COMPILED[1:2]:
        torch._dynamo.reset()
        module = torch_manual.PeepholeLSTM(3, 4, **kwargs).eval()
        compiled = torch.compile(module, fullgraph=True, backend=backend)
        x = torch.randn(5, 2, 3, requires_grad=True)
        leaves = [x, *module.parameters()]
        results = []
        for m in (module, compiled):
            y, (h_n, c_n) = m(x)
            loss = y.sin().sum() + (h_n * c_n[..., : h_n.shape[-1]]).sum()
            results.append((y, *torch.autograd.grad(loss, leaves)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x)[0], module(x)[0])


def test_compile_with_states_and_cells():
    torch._dynamo.reset()
    module = torch_manual.LSTM(3, 4, return_cells=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    s = torch.randn(1, 2, 4)
    x = torch.randn(5, 2, 3)
    for states in ((s, s), (s, s.cos())):
        for a, b in zip(module(x, states), compiled(x, states), strict=True):
            torch.testing.assert_close(a, b)
    cell = torch_manual.LSTMCell(3, 4)
    h, c = torch.compile(cell, fullgraph=True, backend="aot_eager")(x[0])
    torch.testing.assert_close(h, cell(x[0])[0])


def test_compiled_gradients_are_the_eager_ones():
    """To the bit, whatever is asked for: a graph runs the same kernel on the same numbers."""
    torch._dynamo.reset()
    module = torch_manual.LSTM(3, 4, bidirectional=True)
    frozen = torch_manual.LSTM(3, 4, bidirectional=True).requires_grad_(False)
    frozen.weight_hh_l0.requires_grad_()
    for m in (module, frozen):
        compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
        for x in (torch.randn(5, 2, 3), torch.randn(5, 2, 3, requires_grad=True)):
            leaves = [t for t in (x, *m.parameters()) if t.requires_grad]
            eager, traced = (
                torch.autograd.grad(f(x)[0].square().sum(), leaves) for f in (m, compiled)
            )
            for a, b in zip(eager, traced, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("kwargs", [{}, {"num_layers": 2, "bidirectional": True, "proj_size": 3}])
def test_compiled_transforms(kwargs):
    """torch.func under fullgraph compilation."""
    module = torch_manual.PeepholeLSTM(3, 4, dtype=torch.float64, **kwargs)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    xs = torch.randn(3, 5, 2, 3, dtype=torch.float64)

    def loss(parameters, x):
        return functional_call(module, parameters, (x,))[0].square().sum()

    def along(x):
        return jvp(lambda x: module(x)[0], (x,), (x.cos(),))

    for f, args in (
        (lambda p, x: grad(loss)(p, x), (parameters, xs[0])),
        (lambda p, xs: vmap(grad(loss), (None, 0))(p, xs), (parameters, xs)),
        (lambda xs: vmap(lambda x: module(x)[0])(xs), (xs,)),
        (along, (xs[0].clone(),)),  # of a view: torch fails at plain operations too
    ):
        torch._dynamo.reset()
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*args), f(*args), rtol=1e-11, atol=1e-12)


def test_dynamo_is_imported_by_those_who_compile_only():
    code = "import sys, torch, torch_manual; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_one_compiled_graph_serves_three_lengths():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = torch_manual.LSTM(3, 4)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for T, B in ((4, 2), (6, 3), (9, 5)):
        x = torch.randn(T, B, 3)
        torch.testing.assert_close(compiled(x)[0], module(x)[0])
        compiled(x)[0].sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_one_compiled_gradient_serves_three_lengths():
    """A whole step, forward and backward pass, in one graph. (Weights are inputs of it: dynamic
    sizes that are equal when it is traced are taken for one, so T and B are none of theirs.)"""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = torch_manual.LSTM(3, 4, 2)

    def loss(parameters, x):
        return functional_call(module, parameters, (x,))[0].square().sum()

    compiled = torch.compile(grad(loss), fullgraph=True, dynamic=True, backend="aot_eager")
    for T, B in ((5, 2), (6, 3), (9, 5)):
        x = torch.randn(T, B, 3)
        found = compiled({name: p.detach() for name, p in module.named_parameters()}, x)
        module.zero_grad()
        module(x)[0].square().sum().backward()
        for name, p in module.named_parameters():
            assert torch.equal(found[name], p.grad)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


PACKED = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "proj_size": 3},
    {"return_cells": True},
    {"recompute": 2},
]


@pytest.mark.parametrize("states", [False, True], ids=["from zeros", "from states"])
@pytest.mark.parametrize("kwargs", PACKED, ids=str)
def test_compile_packed(kwargs, states):
    torch._dynamo.reset()
    module = torch_manual.LSTM(3, 4, **kwargs)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    layers = module.num_layers * (1 + module.bidirectional)
    for lengths in ([5, 2, 2, 1], [3, 6, 4]):
        x = torch.randn(max(lengths), len(lengths), 3, requires_grad=True)
        sizes = module.proj_size or 4, 4
        hx = tuple(torch.randn(layers, len(lengths), n, requires_grad=True) for n in sizes)
        leaves = [x, *module.parameters(), *(hx if states else ())]
        results = []
        for m in (module, compiled):
            packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
            y, (h_n, c_n), *cells = m(packed, hx if states else None)
            loss = sum(t.data.cos().sum() for t in (y, h_n, c_n, *cells))
            results.append((y.data, h_n, c_n, *torch.autograd.grad(loss, leaves)))
        for ours, eager in zip(*results, strict=True):
            assert torch.equal(ours, eager)


def test_compiled_packed_input_of_another_batch_is_refused():
    torch._dynamo.reset()
    module = torch_manual.LSTM(3, 4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    packed = pack_padded_sequence(torch.randn(5, 3, 3), [5, 2, 1])
    for n in (2, 4):
        with pytest.raises(RuntimeError, match=f"the first {n} .the sequences of h_0"):
            compiled(packed, (torch.randn(1, n, 4), torch.randn(1, n, 4)))


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        {"proj_size": 3, "bidirectional": True},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_compiled_recompute_is_the_eager_one(kwargs):
    """To the bit, and one graph serves every length of more than one segment."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = torch_manual.LSTM(5, 19, recompute=20, **kwargs)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for T, B in ((2500, 8), (2200, 6), (3000, 7)):
        shape = (B, T, 5) if module.batch_first else (T, B, 5)
        x = torch.randn(shape, dtype=module.weight_hh_l0.dtype, requires_grad=True)
        eager, traced = (
            torch.autograd.grad(m(x)[0].square().sum(), [x, *module.parameters()])
            for m in (module, compiled)
        )
        assert all(map(torch.equal, eager, traced))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_recompute_keeps_little():
    torch._dynamo.reset()
    kept = []
    for recompute in (None, 50):
        module = torch_manual.LSTM(8, 16, recompute=recompute)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        saved = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.setdefault(t.data_ptr(), t.numel()) and t, lambda t: t
        )
        with hooks:
            compiled(torch.randn(2000, 4, 8, requires_grad=True))
        kept.append(sum(saved.values()))
    everything, little = kept
    assert everything - little > 4.5 * 2000 * 4 * 16
