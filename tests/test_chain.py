"""The article, runnable: equations (1)-(10) against autograd in float64."""

import pytest
import torch

from torch_manual.chain import (
    MSE,
    Chain,
    Derivative,
    Layer,
    Linear,
    Sigmoid,
    Tanh,
    TwoLinear,
    Value,
)
from torch_manual.chain import derivative as derivative_of


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_the_toy_layer_is_equations_8_to_10():
    x, W, V, z = leaf(5, 3), leaf(3, 4), leaf(4, 2), torch.randn(5, 2, dtype=torch.float64)
    f = TwoLinear(W, V)
    assert torch.equal(f(x), x @ W @ V)
    values = f.d_x[z], f.d_W[z], f.d_V[z]
    torch.testing.assert_close(
        [v.value for v in values], list(torch.autograd.grad(x @ W @ V, (x, W, V), z))
    )
    assert [v.order for v in values] == ["∂f/∂x[z]", "∂f/∂W[z]", "∂f/∂V[z]"]
    assert f.d_theta[z].order == "∂f/∂θ[z]"
    assert list(f.d_theta[z].value) == ["W", "V"]


def deep_network():
    x, target = leaf(5, 3), torch.randn(5, 2, dtype=torch.float64)
    W1, b1, W2, V2, W3, b3, W4, V4 = parameters = [
        leaf(*shape) for shape in [(3, 4), (4,), (4, 6), (6, 3), (3, 5), (5,), (5, 1), (1, 2)]
    ]
    layers = [
        Linear(W1, b1),
        Tanh(),
        TwoLinear(W2, V2),
        Tanh(),
        Linear(W3, b3),
        Sigmoid(),
        TwoLinear(W4, V4),
    ]
    states = [x]
    for f in (
        lambda x: x @ W1 + b1,
        torch.tanh,
        lambda x: x @ W2 @ V2,
        torch.tanh,
        lambda x: x @ W3 + b3,
        torch.sigmoid,
        lambda x: x @ W4 @ V4,
    ):
        states.append(f(states[-1]))
    J = ((states[-1] - target) ** 2).mean()
    return layers, target, parameters, states, J


def test_every_gradient_of_a_deep_network_equals_autograd():
    layers, target, parameters, states, J = deep_network()
    expected = torch.autograd.grad(J, [*parameters, *states])

    gradients = Chain(layers, MSE(target))(states[0])

    torch.testing.assert_close(gradients.J, J.detach())
    thetas = [
        gradients.d_theta[k].value[name] for k in (1, 3, 5, 7) for name in layers[k - 1].names
    ]
    xs = [gradients.d_x[k].value for k in range(1, 9)]
    assert list(gradients.d_theta) == [7, 5, 3, 1]
    torch.testing.assert_close([*thetas, *xs], list(expected), rtol=1e-12, atol=1e-14)
    assert not any(g.requires_grad for g in [gradients.J, *thetas, *xs])


def test_no_autograd_is_used(monkeypatch):
    layers, target, _, states, _ = deep_network()
    chain = Chain(layers, MSE(target))

    def refuse(*args, **kwargs):
        raise AssertionError("autograd was called")

    monkeypatch.setattr(torch.autograd, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    with torch.enable_grad():
        assert chain(states[0]).J.grad_fn is None
        assert all(layer.y.grad_fn is None for layer in chain.layers)


def test_the_order_of_operation_is_printed():
    layers = [Linear(leaf(3, 4), leaf(4)), TwoLinear(leaf(4, 2), leaf(2, 2))]
    gradients = Chain(layers, MSE(torch.zeros(5, 2)))(leaf(5, 3))
    assert str(gradients).splitlines() == [
        "∂J/∂θ₂ = ∂x₃/∂θ₂[∂J/∂x₃]",
        "∂J/∂θ₁ = ∂x₂/∂θ₁[∂x₃/∂x₂[∂J/∂x₃]]",
        "∂J/∂x₂ = ∂x₃/∂x₂[∂J/∂x₃]",
        "∂J/∂x₁ = ∂x₂/∂x₁[∂x₃/∂x₂[∂J/∂x₃]]",
    ]


def test_a_b_c_is_c_then_b_then_a():
    calls = []

    def record(name, scale):
        def rule(z):
            calls.append(name)
            return z * scale

        return Derivative(name, rule, torch.zeros(2))

    A, B, C = record("A", 2.0), record("B", 3.0), Value(torch.ones(2), "C")
    result = A[B[C]]
    assert calls == ["B", "A"]
    assert result.order == "A[B[C]]"
    torch.testing.assert_close(result.value, torch.full((2,), 6.0))


def test_one_layer_twice_is_two_layers():
    W, b, target = leaf(3, 3), leaf(3), torch.zeros(4, 3, dtype=torch.float64)
    x, layer = leaf(4, 3), Linear(W, b)
    gradients = Chain([layer, Tanh(), layer], MSE(target))(x)
    (dW,) = torch.autograd.grad(((torch.tanh(x @ W + b) @ W + b) ** 2).mean(), W)
    shared = sum(gradients.d_theta[k].value["W"] for k in (1, 3))
    torch.testing.assert_close(shared, dW)
    assert layer.k is None


class WrongTranspose(TwoLinear):
    @derivative_of
    def d_W(self, z):
        return self.V @ z.T @ self.x


def test_a_gradient_of_the_wrong_shape_is_refused():
    chain = Chain([WrongTranspose(leaf(3, 4), leaf(4, 2))], MSE(torch.zeros(5, 2)))
    with pytest.raises(
        ValueError, match=r"^chain: ∂x₂/∂W₁\[z\] must have shape \(3, 4\), got \(4, 3\)"
    ):
        chain(leaf(5, 3))


def test_a_target_of_the_wrong_shape_is_refused():
    chain = Chain([Tanh()], MSE(torch.zeros(5)))
    with pytest.raises(
        ValueError, match=r"^chain: the target of MSE must have shape \(5, 3\), got \(5,\)"
    ):
        chain(leaf(5, 3))


def test_derivatives_before_the_call_are_refused():
    f = TwoLinear(torch.randn(3, 4), torch.randn(4, 2))
    with pytest.raises(AttributeError, match="call the TwoLinear before its derivatives"):
        f.d_W  # noqa: B018
    assert isinstance(TwoLinear.d_W, derivative_of)


def test_an_empty_chain_and_a_layer_without_f_are_refused():
    with pytest.raises(ValueError, match=r"^chain: layers must hold at least one layer, got none$"):
        Chain([], MSE(torch.zeros(1)))
    with pytest.raises(NotImplementedError, match=r"^Layer must define f\(x\)$"):
        Layer()(torch.zeros(1))
