"""The modules of the simple layers and losses: torch.nn's own samples, then single behaviours."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

from layer_cases import FORMS, normal, probabilities
from torch_manual.functions.activation import gelu, relu
from torch_manual.functions.dropout import dropout
from torch_manual.functions.embedding import embedding
from torch_manual.functions.loss import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from torch_manual.functions.two_linear import two_linear
from torch_manual.modules import activation, loss
from torch_manual.modules.dropout import Dropout
from torch_manual.modules.embedding import Embedding
from torch_manual.modules.layer_norm import LayerNorm
from torch_manual.modules.linear import Linear
from torch_manual.modules.two_linear import TwoLinear

# ---------------------------------------------------------------- modules

OURS = {
    module: getattr(home, module)
    for home, modules in (
        (activation, ("Sigmoid", "Tanh", "ReLU", "GELU", "Softmax", "LogSoftmax")),
        (loss, ("MSELoss", "CrossEntropyLoss", "BCEWithLogitsLoss")),
    )
    for module in modules
}
OURS |= {"Linear": Linear, "Embedding": Embedding, "LayerNorm": LayerNorm, "Dropout": Dropout}
INFOS = {info.name.removeprefix("nn."): info for info in module_db}


def samples(name, dtype):
    info = INFOS[name]
    return info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=True
    )


def outcome(module, args, kwargs):
    """The output and every gradient; a fresh copy of the inputs, so that none is written to."""

    def fresh(value):
        if isinstance(value, torch.Tensor):
            return value.detach().clone().requires_grad_(value.requires_grad)
        return value

    args, kwargs = [fresh(a) for a in args], {k: fresh(v) for k, v in kwargs.items()}
    y = module(*args, **kwargs)
    leaves = [t for t in [*args, *kwargs.values()] if isinstance(t, torch.Tensor)]
    leaves = [t for t in [*leaves, *module.parameters()] if t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.sum(), leaves)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", [name for name in OURS if name != "Dropout"])
def test_pytorchs_own_samples(name, dtype):
    torch.manual_seed(0)
    count = 0
    for sample in samples(name, dtype):
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        stock = getattr(nn, name)(*args, **kwargs).to(dtype)
        ours = OURS[name](*args, **kwargs).to(dtype)
        ours.load_state_dict(stock.state_dict())
        assert repr(ours) == repr(stock)
        x, options = sample.forward_input.args, sample.forward_input.kwargs
        assert_close(outcome(ours, x, options), outcome(stock, x, options), equal_nan=True)
        count += 1
    assert count >= 2


@pytest.mark.parametrize("name", ["Embedding", "CrossEntropyLoss"])
def test_pytorchs_own_error_samples(name):
    info = INFOS[name]
    errors = info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=True, training=True
    )
    for error in errors:
        given = error.module_error_input
        args, kwargs = given.constructor_input.args, given.constructor_input.kwargs
        if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                OURS[name](*args, **kwargs)
        else:
            module = OURS[name](*args, **kwargs)
            with pytest.raises(error.error_type, match=error.error_regex):
                module(*given.forward_input.args, **given.forward_input.kwargs)
    assert len(errors) >= 3


@pytest.mark.parametrize("name", OURS)
def test_modules_are_stocks_and_override_only_forward(name):
    assert OURS[name].__mro__[1] is getattr(nn, name)
    added = {k for k in vars(OURS[name]) if not k.startswith("__")}
    assert added <= {"forward"}


def test_two_linear_module():
    torch.manual_seed(0)
    module = TwoLinear(3, 4, 2, dtype=torch.float64)
    assert repr(module) == "TwoLinear(in_features=3, hidden_features=4, out_features=2)"
    assert [(k, tuple(v.shape)) for k, v in module.state_dict().items()] == [
        ("weight_w", (3, 4)),
        ("weight_v", (4, 2)),
    ]
    assert 0 < module.weight_w.abs().max() <= 3**-0.5
    assert 0 < module.weight_v.abs().max() <= 4**-0.5
    x = normal(5, 3)
    assert_close(module(x), x @ module.weight_w @ module.weight_v)
    assert TwoLinear(3, 4, 2, device="meta")(x.to("meta").float()).shape == (5, 2)


# ---------------------------------------------------------------- single behaviours


@pytest.mark.parametrize("shape", [(3,), (5, 7), (2, 0), ()])
@pytest.mark.parametrize("p", [0.0, 0.45, 1.0])
def test_dropout_draws_stocks_numbers_and_as_many(p, shape):
    x = torch.randn(shape)
    results = []
    for module in (Dropout(p), nn.Dropout(p)):
        torch.manual_seed(5)
        results.append((outcome(module, [x.requires_grad_()], {}), torch.rand(3)))
    assert_close(results[0], results[1], rtol=0, atol=0, equal_nan=True)


def test_dropout_that_drops_nothing_returns_its_input():
    x = torch.randn(3)
    assert Dropout(0.0)(x) is x
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.5, inplace=True).eval()(x) is x


def test_dropout_of_a_batch_of_functions():
    x = torch.ones(400, dtype=torch.float64)
    f = torch.func.vmap(torch.func.grad(lambda x: dropout(x * 2, 0.5)), randomness="different")
    assert sorted(set(f(x).tolist())) == [0.0, 4.0]


@pytest.mark.parametrize(
    ("ours", "stock"),
    [(activation.ReLU(True), nn.ReLU(True)), (Dropout(0.4, True), nn.Dropout(0.4, True))],
)
def test_in_place(ours, stock):
    results = []
    for module in (ours, stock):
        torch.manual_seed(0)
        leaf = torch.randn(4, 3, requires_grad=True)
        x = leaf * 2
        y = module(x)
        assert y is x
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaf)])
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used"):
            module(leaf)
    assert_close(results[0], results[1])


def test_relu_passes_a_nan_on_and_stops_an_infinite_gradient():
    results = []
    for f in (relu, F.relu):
        x = torch.tensor([torch.nan, -1.0, 1.0], requires_grad=True)
        results.append(torch.autograd.grad(f(x), x, torch.tensor([2.0, torch.inf, 3.0])))
    assert_close(results[0], results[1], equal_nan=True)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_without_a_dim_and_with_a_dtype(name):
    ours, _, stock = FORMS[name]
    x = torch.randn(2, 3, 4)
    with pytest.warns(UserWarning, match=f"Implicit dimension choice for {name}"):
        assert_close(ours(x), stock(x, dim=0))
    assert_close(ours(x, 1, dtype=torch.float64), stock(x, 1, dtype=torch.float64))
    modules = {"softmax": "Softmax", "log_softmax": "LogSoftmax"}
    places = []
    for module in (getattr(activation, modules[name])(), getattr(nn, modules[name])()):
        with pytest.warns(UserWarning, match="Implicit dimension choice") as caught:
            module(x)
        places.append((caught[0].filename, caught[0].lineno))
    assert places[0] == places[1]


@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_embedding_renormalizes_as_stock_does(scale):
    index = torch.tensor([[1, 3], [3, 0]])
    weight = torch.randn(5, 3)
    modules = [
        cls.from_pretrained(weight.clone(), freeze=False, max_norm=scale, norm_type=1.0)
        for cls in (Embedding, nn.Embedding)
    ]
    results = [outcome(module, [index], {}) for module in modules]
    assert_close(results[0], results[1])
    assert_close(modules[0].weight, modules[1].weight)
    assert not torch.equal(modules[0].weight, weight)


def test_embedding_takes_int32_and_repeats_in_half_precision():
    index = torch.zeros(4000, dtype=torch.int32)
    weight = torch.ones(2, 1, dtype=torch.bfloat16, requires_grad=True)
    embedding(index, weight).sum().backward()
    assert weight.grad[:, 0].tolist() == [4000.0, 0.0]  # a bfloat16 sum would stop at 256


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_with_everything_ignored(smoothing):
    target = torch.full((4,), -100)
    results = []
    for f in (cross_entropy, F.cross_entropy):
        x = torch.ones(4, 3, requires_grad=True)
        y = f(x, target, torch.rand(3), label_smoothing=smoothing)
        results.append([y.detach(), *torch.autograd.grad(y, x)])
    assert results[0][0].isnan()
    assert_close(results[0], results[1], equal_nan=True)


@pytest.mark.parametrize("name", ["mse_loss", "cross_entropy", "bce"])
def test_losses_know_the_old_reduction_arguments(name):
    ours, _, stock = FORMS[name]
    x, t = normal(4, 3), probabilities(4, 3)
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        y = ours(x, t, reduce=False)
    assert_close(y, stock(x, t, reduction="none"))
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        y = ours(x, t, size_average=False)
    assert_close(y, stock(x, t, reduction="sum"))


def test_mse_broadcasts_with_stocks_warning():
    results = []
    for f in (mse_loss, F.mse_loss):
        x, t = torch.ones(4, 1, requires_grad=True), torch.arange(3.0).requires_grad_()
        with pytest.warns(UserWarning, match="Using a target size"):
            y = f(x, t)
        results.append([y.detach(), *torch.autograd.grad(y, (x, t))])
    assert_close(results[0], results[1])


EMPTY = {
    "linear": [(0, 3), (4, 3), (4,)],
    "two_linear": [(0, 3), (3, 4), (4, 2)],
    "gelu": [(0, 3)],
    "layer_norm": [(0, 3), (3,), (3,)],
    "mse_loss": [(0, 3), (0, 3)],
    "cross_entropy": [(0, 3), (0, 3)],
    "bce": [(0, 3), (0, 3)],
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_batch_of_none(name):
    results = []
    for f in (FORMS[name][0], FORMS[name][2]):
        leaves = [torch.zeros(shape, requires_grad=True) for shape in EMPTY[name]]
        x, *rest = leaves
        y = f(x, [3], *rest) if name == "layer_norm" else f(x, *rest)
        results.append([y.detach(), *torch.autograd.grad(y.sum(), leaves)])
    assert_close(results[0], results[1], equal_nan=True)


# ---------------------------------------------------------------- errors

x = torch.zeros(2, 3)
k = torch.tensor([0, 1])
w = torch.ones(3, requires_grad=True)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: two_linear(x, torch.zeros(4, 5), torch.zeros(5, 2)),
            ValueError,
            r"two_linear: weight_w must be (I, H) = (3, H), got (4, 5)",
        ),
        (
            lambda: two_linear(x, torch.zeros(3, 5), torch.zeros(4, 2)),
            ValueError,
            r"two_linear: weight_v must be (H, O) = (5, O), got (4, 2)",
        ),
        (
            lambda: TwoLinear(3, 0, 2),
            ValueError,
            "TwoLinear: hidden_features must be at least 1, got 0",
        ),
        (
            lambda: Embedding(4, 3, sparse=True)(k),
            ValueError,
            "embedding: sparse must be False (gradients are dense), got True",
        ),
        (
            lambda: embedding(k, torch.zeros(4, 3), padding_idx=4),
            AssertionError,
            "Padding_idx must be within num_embeddings",
        ),
        (
            lambda: dropout(x, 1.5),
            ValueError,
            "dropout probability has to be between 0 and 1, but got 1.5",
        ),
        (
            lambda: binary_cross_entropy_with_logits(x, x, w),
            RuntimeError,
            "The function 'binary_cross_entropy_with_logits' is not differentiable with respect to "
            "argument 'weight'. This input cannot have requires_grad True.",
        ),
        (
            lambda: cross_entropy(x, k, w),
            RuntimeError,
            "The function 'cross_entropy' is not differentiable with respect to argument 'weight'. "
            "This input cannot have requires_grad True.",
        ),
        (
            lambda: mse_loss(x, x, reduction="max"),
            ValueError,
            "max is not a valid value for reduction",
        ),
        (
            lambda: gelu(x, approximate="sin"),
            RuntimeError,
            "approximate argument must be either none",
        ),
    ],
)
def test_error_texts(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(text)
