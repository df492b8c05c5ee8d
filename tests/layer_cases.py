"""The simple layers and losses: a `Case` for each form of input, and the references they meet.

A case has three forms of one function, called with the same keywords: ours, the reference (plain
autograd in float64, nothing of the project in it) and stock's.
"""

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F

from torch_manual.functions.activation import gelu, log_softmax, relu, sigmoid, softmax, tanh
from torch_manual.functions.dropout import dropout
from torch_manual.functions.embedding import embedding
from torch_manual.functions.layer_norm import layer_norm
from torch_manual.functions.linear import linear
from torch_manual.functions.loss import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from torch_manual.functions.two_linear import two_linear

# ---------------------------------------------------------------- references


def ref_linear(input, weight, bias=0.0):
    if weight.dim() == 1:
        return (input * weight).sum(-1)
    return (input.unsqueeze(-2) * weight).sum(-1) + bias


def ref_two_linear(input, weight_w, weight_v):
    return torch.einsum("...i,ih,ho->...o", input, weight_w, weight_v)


def stock_two_linear(input, weight_w, weight_v):
    return input @ weight_w @ weight_v


def ref_sigmoid(input):
    return 1 / (1 + torch.exp(-input))


def ref_tanh(input):
    return 1 - 2 / (torch.exp(2 * input) + 1)


def ref_relu(input):
    return (input + input.abs()) / 2


def ref_gelu(input, approximate="none"):
    if approximate == "tanh":
        u = (2 / torch.pi) ** 0.5 * (input + 0.044715 * input**3)
        return 0.5 * input * (1 + ref_tanh(u))
    return 0.5 * input * torch.special.erfc(-input / 2**0.5)


def ref_softmax(input, dim):
    return torch.exp(input) / torch.exp(input).sum(dim, keepdim=True)


def ref_log_softmax(input, dim):
    return torch.log(ref_softmax(input, dim))


def ref_embedding(input, weight, padding_idx=None, scale_grad_by_freq=False):
    rows = []
    for index in input.flatten().tolist():
        row = weight[index]
        if scale_grad_by_freq:  # the value of the row, 1 / count of its gradient
            part = row / (input == index).sum()
            row = part + (row - part).detach()
        if padding_idx is not None and index == padding_idx % len(weight):
            row = row.detach()
        rows.append(row)
    return torch.stack(rows).reshape(*input.shape, weight.shape[1])


def ref_layer_norm(input, normalized_shape, weight=1.0, bias=0.0):
    flat = input.reshape(-1, torch.Size(normalized_shape).numel())
    centred = flat - flat.mean(1, keepdim=True)
    normed = centred / torch.sqrt((centred**2).mean(1, keepdim=True) + 1e-5)
    return normed.reshape(input.shape) * weight + bias


def ref_dropout(input, p):
    return input * torch.empty_like(input).bernoulli_(1 - p) / (1 - p)


def reduced(loss, reduction, n):
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / n}[reduction]


def ref_mse_loss(input, target, weight=None, reduction="mean"):
    e = input - target
    if weight is None:
        return reduced(e**2, reduction, e.numel())
    return reduced(weight * e**2, reduction, weight.sum())


def ref_bce(input, target, weight=1.0, pos_weight=1.0, reduction="mean"):
    s = ref_sigmoid(input)
    loss = -weight * (pos_weight * target * torch.log(s) + (1 - target) * torch.log(1 - s))
    return reduced(loss, reduction, loss.numel())


def ref_cross_entropy(
    input, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0
):
    """Row by row, from the definition."""
    dim = min(1, input.dim() - 1)
    C = input.shape[dim]
    w = torch.ones(C, dtype=input.dtype) if weight is None else weight
    given = target.shape == input.shape
    targets = target.movedim(dim, -1).reshape(-1, C) if given else target.flatten()
    loss, n = [], 0.0
    for row, t in zip(input.movedim(dim, -1).reshape(-1, C), targets, strict=True):
        nll = w * (torch.log(torch.exp(row).sum()) - row)
        if given:
            loss.append((1 - label_smoothing) * (t * nll).sum() + label_smoothing * nll.mean())
            n = n + 1
        elif t != ignore_index:
            loss.append((1 - label_smoothing) * nll[t] + label_smoothing * nll.mean())
            n = n + w[t]
        else:
            loss.append(0 * row.sum())
    loss = torch.stack(loss).reshape(input.shape[:dim] + input.shape[dim + 1 :])
    return reduced(loss, reduction, n)


# ---------------------------------------------------------------- cases


def seeded(function):
    def call(**kwargs):
        torch.manual_seed(3)
        return function(**kwargs)

    return call


FORMS = {  # ours, reference, stock
    "linear": (linear, ref_linear, F.linear),
    "two_linear": (two_linear, ref_two_linear, stock_two_linear),
    "sigmoid": (sigmoid, ref_sigmoid, F.sigmoid),
    "tanh": (tanh, ref_tanh, F.tanh),
    "relu": (relu, ref_relu, F.relu),
    "gelu": (gelu, ref_gelu, F.gelu),
    "softmax": (softmax, ref_softmax, F.softmax),
    "log_softmax": (log_softmax, ref_log_softmax, F.log_softmax),
    "embedding": (embedding, ref_embedding, F.embedding),
    "layer_norm": (layer_norm, ref_layer_norm, F.layer_norm),
    "dropout": (seeded(dropout), seeded(ref_dropout), seeded(F.dropout)),
    "mse_loss": (mse_loss, ref_mse_loss, F.mse_loss),
    "cross_entropy": (cross_entropy, ref_cross_entropy, F.cross_entropy),
    "bce": (binary_cross_entropy_with_logits, ref_bce, F.binary_cross_entropy_with_logits),
}


@dataclass(frozen=True)
class Case:
    """`inputs` get gradients, `constants` are the other keywords; both follow a dtype."""

    id: str
    inputs: dict
    constants: dict = field(default_factory=dict)

    @property
    def name(self):
        return self.id.partition("-")[0]

    @property
    def forms(self):
        return FORMS[self.name]

    def __call__(self, form, inputs, dtype=torch.float64):
        """The value and the gradients for a fixed cotangent."""
        leaves = {k: t.detach().clone().requires_grad_() for k, t in inputs.items()}
        y = form(**leaves, **cast(self.constants, dtype))
        torch.manual_seed(1)
        cotangent = torch.randn(y.shape).bfloat16().to(y.dtype)  # one that every dtype holds
        return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), cotangent)]

    def ours(self, *tensors):
        """Ours as a function of the inputs, in their order."""
        return self.forms[0](**dict(zip(self.inputs, tensors, strict=True)), **self.constants)

    def leaves(self):
        return [t.clone().requires_grad_() for t in self.inputs.values()]


def cast(tensors, dtype):
    return {
        k: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for k, t in tensors.items()
    }


_g = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=_g, dtype=torch.float64)


def positive(*shape):
    return normal(*shape).abs() + 0.1


def probabilities(*shape):
    return normal(*shape).softmax(min(1, len(shape) - 1))


def linear_cases():
    w, b = normal(4, 3), normal(4)
    for id, x in {"2d": (5, 3), "1d": (3,), "4d": (2, 1, 3, 3)}.items():
        yield Case(f"linear-{id}", {"input": normal(*x), "weight": w, "bias": b})
        two = {"weight_w": normal(3, 4), "weight_v": normal(4, 2)}
        yield Case(f"two_linear-{id}", {"input": normal(*x), **two})
    yield Case("linear-no-bias", {"input": normal(5, 3), "weight": w})
    yield Case("linear-weight-1d", {"input": normal(2, 5, 3), "weight": normal(3)})
    yield Case("linear-non-contiguous", {"input": normal(3, 5).T, "weight": normal(3, 4).T})


def activation_cases():
    for name in ("sigmoid", "tanh", "relu", "gelu"):
        for shape in ((), (7, 3)):
            yield Case(f"{name}-{len(shape)}d", {"input": normal(*shape)})
    yield Case("gelu-tanh", {"input": normal(7, 3)}, {"approximate": "tanh"})
    for name in ("softmax", "log_softmax"):
        for shape, dim in ((), 0), ((3, 5), 0), ((2, 3, 4), 1), ((2, 3, 4), -1):
            yield Case(f"{name}-{len(shape)}d-dim{dim}", {"input": normal(*shape)}, {"dim": dim})


def layer_cases():
    index = torch.tensor([[1, 4, 1], [0, 4, 4]])
    for id, options in {
        "plain": {},
        "padding": {"padding_idx": 4},
        "frequency": {"scale_grad_by_freq": True, "padding_idx": -6},
    }.items():
        yield Case(f"embedding-{id}", {"weight": normal(6, 3)}, {"input": index, **options})
    for id, shape, inputs in (
        ("plain", (5,), {"input": normal(3, 5)}),
        ("no-bias", (5,), {"input": normal(2, 3, 5), "weight": normal(5)}),
        ("bias-only", (5,), {"input": normal(3, 5), "bias": normal(5)}),
        ("2d", (2, 3), {"input": normal(4, 2, 3), "weight": normal(2, 3), "bias": normal(2, 3)}),
        ("no-batch", (5,), {"input": normal(5), "weight": normal(5), "bias": normal(5)}),
    ):
        yield Case(f"layer_norm-{id}", inputs, {"normalized_shape": shape})
    for p in (0.3, 0.8):
        yield Case(f"dropout-{p}", {"input": normal(7, 5)}, {"p": p})


def loss_cases():
    for r in ("none", "mean", "sum"):
        x, t, w = normal(4, 3), normal(4, 3), positive(4, 3)
        yield Case(f"mse_loss-{r}", {"input": x, "target": t}, {"reduction": r})
        yield Case(f"mse_loss-weight-{r}", {"input": x, "target": t, "weight": w}, {"reduction": r})
        logits = {"input": normal(4, 3), "target": probabilities(4, 3)}
        for id, weights in {
            "": {},
            "weight-": {"weight": positive(3)},
            "pos_weight-": {"pos_weight": positive(4, 1)},
            "both-": {"weight": positive(4, 1), "pos_weight": positive(3)},
        }.items():
            yield Case(f"bce-{id}{r}", logits, {"reduction": r, **weights})
        for s in (0.0, 0.2) if r == "mean" else (0.2,):
            options = {"reduction": r, "label_smoothing": s}
            for id, x, t in (
                ("1d", normal(3), torch.tensor(1)),
                ("2d", normal(5, 3), torch.tensor([2, 0, -100, 1, 2])),
                ("3d", normal(2, 3, 4), torch.tensor([[0, 1, 1, 2], [2, 0, 2, -100]])),
            ):
                id = f"{id}-{r}-smoothing{s}"
                index = {"target": t, **options}
                yield Case(f"cross_entropy-{id}", {"input": x}, index)
                ignored = {**index, "target": t.where(t >= 0, 2), "ignore_index": 2}
                ignored["weight"] = positive(3)
                yield Case(f"cross_entropy-weight-{id}", {"input": x}, ignored)
                given = {"input": x, "target": probabilities(*x.shape)}
                yield Case(f"cross_entropy-probabilities-{id}", given, options)
                given = {**given, "weight": positive(3)}
                yield Case(f"cross_entropy-probabilities-weight-{id}", given, options)


CASES = [*linear_cases(), *activation_cases(), *layer_cases(), *loss_cases()]
KINDS = [  # one of each name, for what does not depend on the shapes
    case
    for case in CASES
    if case.id
    in {
        *("linear-2d", "two_linear-2d", "sigmoid-2d", "tanh-2d", "relu-2d", "gelu-2d", "gelu-tanh"),
        *("softmax-3d-dim1", "log_softmax-3d-dim1", "embedding-frequency", "layer_norm-2d"),
        *("mse_loss-weight-mean", "bce-both-mean", "cross_entropy-weight-3d-mean-smoothing0.2"),
        "cross_entropy-probabilities-weight-3d-mean-smoothing0.2",
    }
]
each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
some = pytest.mark.parametrize("case", KINDS, ids=lambda case: case.id)
