"""The gradients of the simple layers and losses, each against gradcheck, an independent reference
and torch.nn; that nothing is computed unasked; and torch.func, torch.compile and autocast.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import torch_manual
from layer_cases import CASES, Case, cast, each, normal, some
from torch_manual.functional import cross_entropy
from torch_manual.functions.layer_norm import layer_norm
from torch_manual.functions.linear import linear
from torch_manual.functions.two_linear import two_linear

# ---------------------------------------------------------------- gradients


@each
def test_gradcheck(case):
    if "padding_idx" not in case.constants:  # its gradient is, by definition, not the derivative
        assert torch.autograd.gradcheck(case.ours, case.leaves())
    assert torch.autograd.gradgradcheck(case.ours, case.leaves())


@each
def test_against_the_reference(case):
    ours, ref, _ = case.forms
    assert_close(case(ours, case.inputs), case(ref, case.inputs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@each
def test_against_stock(case, dtype):
    ours, _, stock = case.forms
    inputs = cast(case.inputs, dtype)
    assert_close(case(ours, inputs, dtype), case(stock, inputs, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each
def test_half_precision_is_as_near_the_reference_as_stock(case, dtype):
    ours, ref, stock = case.forms
    inputs = cast(case.inputs, dtype)
    rounded = Case(case.id, case.inputs, cast(cast(case.constants, dtype), torch.float64))
    exact = rounded(ref, cast(inputs, torch.float64))
    mine, theirs = case(ours, inputs, dtype), case(stock, inputs, dtype)
    for a, b, e in zip(mine, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        assert (a.double() - e).abs().max() <= 2 * (b.double() - e).abs().max()


class Record(TorchDispatchMode):
    """The names of the aten operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def backward_operations(f, tensors, wanted):
    """The operations that run for the gradients of the `wanted` ones of the tensors alone."""
    leaves = [t.detach().clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    y = f(*leaves)
    with Record() as record:
        y.backward(torch.ones_like(y))
    assert [t.grad is not None for t in leaves] == [i in wanted for i in range(len(leaves))]
    return record.names


@each
def test_no_backward_is_pytorchs(case):
    names = backward_operations(case.ours, case.leaves(), range(len(case.inputs)))
    assert names
    assert not [name for name in names if "backward" in name]


@each
def test_each_gradient_alone_is_the_same(case):
    leaves = case.leaves()
    together = torch.autograd.grad(case.ours(*leaves).sum(), leaves)
    for k, expected in enumerate(together):
        alone = [t.detach().requires_grad_(i == k) for i, t in enumerate(leaves)]
        (grad,) = torch.autograd.grad(case.ours(*alone).sum(), [alone[k]])
        assert_close(grad, expected)


# ---------------------------------------------------------------- only what is asked for


@pytest.mark.parametrize(
    ("function", "shapes", "wanted", "saved", "products"),
    [
        (linear, [(5, 3), (4, 3), (4,)], {0, 1, 2}, {0, 1}, 2),
        (linear, [(5, 3), (4, 3), (4,)], {0}, {1}, 1),
        (linear, [(5, 3), (4, 3), (4,)], {1}, {0}, 1),
        (linear, [(5, 3), (4, 3), (4,)], {2}, set(), 0),
        (two_linear, [(5, 3), (3, 4), (4, 2)], {0, 1, 2}, {0, 1, 2}, 5),
        (two_linear, [(5, 3), (3, 4), (4, 2)], {0}, {1, 2}, 2),
        (two_linear, [(5, 3), (3, 4), (4, 2)], {1}, {0, 2}, 2),
        (two_linear, [(5, 3), (3, 4), (4, 2)], {2}, {0, 1}, 2),
    ],
)
def test_a_frozen_input_is_neither_saved_nor_worked_for(function, shapes, wanted, saved, products):
    leaves = [normal(*shape).requires_grad_(i in wanted) for i, shape in enumerate(shapes)]
    kept = function(*leaves).grad_fn.saved_tensors
    assert {i for i, t in enumerate(leaves) if any(t is k for k in kept)} == saved
    assert sum(k is not None for k in kept) == len(saved)
    assert backward_operations(function, leaves, wanted).count("mm") == products


@pytest.mark.parametrize(
    ("wanted", "saved", "statistics"), [({0}, {0, 1}, 1), ({1}, {0}, 1), ({2}, set(), 0)]
)
def test_a_layer_norm_takes_statistics_only_if_needed(wanted, saved, statistics):
    leaves = [normal(*s).requires_grad_(i in wanted) for i, s in enumerate([(4, 5), (5,), (5,)])]

    def f(x, w, b):
        return layer_norm(x, [5], w, b)

    kept = f(*leaves).grad_fn.saved_tensors
    assert {i for i, t in enumerate(leaves) if any(t is k for k in kept)} == saved
    assert backward_operations(f, leaves, wanted).count("rsqrt") == statistics


# ---------------------------------------------------------------- transforms


@some
def test_per_sample_gradients(case):
    """vmap of grad, and grad of vmap, over a batch of every input, against one at a time."""
    batch = [torch.stack([t, t.roll(1, -1), t.roll(2, -1)]) for t in case.inputs.values()]
    every = tuple(range(len(batch)))

    def total(*tensors):
        return case.ours(*tensors).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(total, every))(*batch)
    of_sum = torch.func.grad(lambda *t: torch.func.vmap(total)(*t).sum(), every)(*batch)
    for n in range(3):
        leaves = [t[n].clone().requires_grad_() for t in batch]
        one = torch.autograd.grad(total(*leaves), leaves)
        assert_close([g[n] for g in per_sample], list(one))
        assert_close([g[n] for g in of_sum], list(one))


@some
def test_hessian_by_function_transforms(case):
    leaves = case.leaves()

    def total(x):
        return case.ours(x, *leaves[1:]).square().sum()

    ours = torch.func.jacrev(torch.func.jacrev(total))(leaves[0])
    assert_close(ours, torch.autograd.functional.hessian(total, leaves[0]))


@some
def test_compiles_to_one_graph(case):
    torch._dynamo.reset()
    compiled = torch.compile(case.ours, fullgraph=True, backend="aot_eager")
    leaves = case.leaves()
    y, expected = compiled(*leaves), case.ours(*leaves)
    assert_close(y, expected)
    cotangent = torch.ones_like(y)
    assert_close(
        torch.autograd.grad(y, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent)
    )


@pytest.mark.parametrize("id", ["linear-2d", "two_linear-2d"])
def test_autocast(id):
    case = next(case for case in CASES if case.id == id)
    ours, _, stock = case.forms
    inputs = cast(case.inputs, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = case(ours, inputs), case(stock, inputs)
    assert [t.dtype for t in mine] == [torch.bfloat16] + [torch.float32] * len(inputs)
    assert_close(mine, theirs)


def test_negative_label_smoothing_is_none():
    """As in stock, in the backward pass as in the forward pass."""
    x, target = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), torch.arange(4)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, target, label_smoothing=-0.1), x)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
def test_classes_of_any_integer_dtype(dtype):
    """-100, the class that is ignored, is 156 in uint8, which is a class like others."""
    target = torch.tensor([156, 3, 255]).to(dtype)
    results = []
    for function in (cross_entropy, F.cross_entropy):
        x = torch.linspace(-1, 1, 768).view(3, 256).requires_grad_()
        loss = function(x, target)
        results.append((loss, *torch.autograd.grad(loss, x)))
    torch.testing.assert_close(*results)


def test_linear_of_one_output_with_a_bias():
    x, w, b = torch.randn(2, 5, 3), torch.randn(3), torch.randn(())
    results = []
    for function in (linear, F.linear):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        y = function(*leaves)
        results.append((y, *torch.autograd.grad(y.sin().sum(), leaves)))
    torch.testing.assert_close(*results)


def test_complex_tensors_are_refused():
    z = torch.randn(2, 3, dtype=torch.complex64)
    functional = torch_manual.functional
    for call in (
        lambda: functional.sigmoid(z),
        lambda: functional.tanh(z),
        lambda: functional.linear(z, z),
        lambda: functional.embedding(torch.tensor([0]), z),
        lambda: functional.two_linear(z, z.T, z),
        lambda: torch_manual.LSTM(3, 4, dtype=z.dtype)(z),
        lambda: torch_manual.LSTMCell(3, 4, dtype=z.dtype)(z),
    ):
        with pytest.raises(TypeError, match=r"tensors must be real, got torch\.complex64"):
            call()
