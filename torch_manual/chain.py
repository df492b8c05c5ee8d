"""The article, runnable: reverse-mode differentiation with derivative functions.

A network is x_{k+1} = f_k(θ_k, x_k) (1) with a loss J = g(x_{n+1}) (2). In vector calculus the
order of multiplication matters, so a derivative is both a function and a value: ∂y/∂x[z] applies it
to z = ∂J/∂y, and what comes out is ∂J/∂x. Then, for every layer k (equation 5),

    ∂J/∂θ_k = ∂x_{k+1}/∂θ_k [ ∂J/∂x_{k+1} ]        ∂J/∂x_k = ∂x_{k+1}/∂x_k [ ∂J/∂x_{k+1} ]

and A[B[C]] means: C first, then B, then A. Nothing here uses autograd.

    >>> f = TwoLinear(W, V)
    >>> y = f(x)
    >>> f.d_W[z].value, f.d_W[z].order        # the function d_W, applied to z: a value
    (tensor(...), '∂f/∂W[z]')

    >>> chain = Chain([Linear(W1, b1), Tanh(), TwoLinear(W, V)], MSE(target))
    >>> gradients = chain(x)
    >>> gradients.d_theta[1].value["W"]       # ∂J/∂W of the first layer, the shape of W1
    >>> print(gradients)                      # ∂J/∂θ₃ = ∂x₄/∂θ₃[∂J/∂x₄], ... as they were computed

Row vectors: x is (B, I), and a linear map is x W.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def _sub(k: int) -> str:
    return str(k).translate(_SUBSCRIPTS)


@dataclass(frozen=True)
class Value:
    """A derivative as a value: ∂J/∂x as a tensor, or ∂J/∂θ as one tensor for each name in θ."""

    value: Any
    order: str  # how it came about: A[B[C]]

    def __str__(self) -> str:
        return self.order


@dataclass(frozen=True)
class Derivative:
    """A derivative as a function: `d[z]` applies it to the value z.

    `variable` is what the derivative is taken by; the result must have its shape.
    """

    symbol: str
    rule: Callable[[Tensor], Any]
    variable: Any

    @torch.no_grad()
    def __getitem__(self, z: Tensor | Value) -> Value:
        if isinstance(z, Tensor):
            z = Value(z, "z")
        result = Value(self.rule(z.value), f"{self.symbol}[{z.order}]")
        if isinstance(self.variable, Tensor):  # θ is checked tensor by tensor
            _check_shape(str(result), result.value, self.variable)
        return result


def _check_shape(what: str, gradient: Tensor, variable: Tensor) -> None:
    """The article's sanity check: a gradient has the shape of what it is the gradient of."""
    if gradient.shape != variable.shape:
        raise ValueError(
            f"chain: {what} must have shape {tuple(variable.shape)}, got {tuple(gradient.shape)}"
        )


class derivative:
    """Makes a rule `def d_v(self, z)` of a layer the derivative function `layer.d_v[z]`."""

    def __init__(self, rule: Callable[[Any, Tensor], Any]) -> None:
        self.rule = rule

    def __set_name__(self, owner: type, name: str) -> None:
        self.variable = name.removeprefix("d_")

    def __get__(self, layer: Layer | None, owner: type) -> Any:
        if layer is None:  # asked of the class
            return self
        if not hasattr(layer, "x"):
            raise AttributeError(f"chain: call the {owner.__name__} before its derivatives")
        by = "θ" if self.variable == "theta" else self.variable
        if layer.k is None:
            symbol = f"∂f/∂{by}"
        else:
            symbol = f"∂x{_sub(layer.k + 1)}/∂{by}{_sub(layer.k)}"
        variable = getattr(layer, self.variable)
        return Derivative(symbol, lambda z: self.rule(layer, z), variable)


class Layer:
    """x_{k+1} = f(θ, x_k). Calling it remembers x and y = f(θ, x), where its derivatives are taken.

    A layer is its `names` of the tensors in θ, `f`, and one derivative function for each variable.
    """

    names: ClassVar[tuple[str, ...]] = ()
    k: int | None = None  # its place in a chain
    x: Tensor
    y: Tensor

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        self.x, self.y = x, self.f(x)
        return self.y

    @property
    def theta(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.names}

    @derivative
    def d_theta(self, z: Tensor) -> dict[str, Tensor]:
        return {name: getattr(self, f"d_{name}")[z].value for name in self.names}

    d_x: derivative

    def f(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define f(x)")


class Linear(Layer):
    """f = x W + b, with W (I, O) and b (O)."""

    names = ("W", "b")

    def __init__(self, W: Tensor, b: Tensor) -> None:
        self.W, self.b = W, b

    def f(self, x: Tensor) -> Tensor:
        return x @ self.W + self.b

    @derivative
    def d_x(self, z: Tensor) -> Tensor:
        return z @ self.W.T

    @derivative
    def d_W(self, z: Tensor) -> Tensor:
        return self.x.T @ z

    @derivative
    def d_b(self, z: Tensor) -> Tensor:
        return z.sum(0)


class TwoLinear(Layer):
    """f = x W V, the article's toy layer, with W (I, H) and V (H, O)."""

    names = ("W", "V")

    def __init__(self, W: Tensor, V: Tensor) -> None:
        self.W, self.V = W, V

    def f(self, x: Tensor) -> Tensor:
        return x @ self.W @ self.V

    @derivative
    def d_x(self, z: Tensor) -> Tensor:
        return z @ self.V.T @ self.W.T  # (8)

    @derivative
    def d_W(self, z: Tensor) -> Tensor:
        return self.x.T @ z @ self.V.T  # (9)

    @derivative
    def d_V(self, z: Tensor) -> Tensor:
        return (self.x @ self.W).T @ z  # (10)


class Tanh(Layer):
    """f = tanh(x), element by element, as z ⊙ (1 − y²) is."""

    def f(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    @derivative
    def d_x(self, z: Tensor) -> Tensor:
        return z * (1 - self.y**2)


class Sigmoid(Layer):
    """f = σ(x), element by element; its derivative is equation (17)."""

    def f(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    @derivative
    def d_x(self, z: Tensor) -> Tensor:
        return z * self.y * (1 - self.y)  # (17)


class MSE:
    """g(x) = mean (x − target)². The end of the chain: its derivative ∂J/∂x is a value."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def __call__(self, x: Tensor) -> Tensor:
        _check_shape("the target of MSE", self.target, x)
        return ((x - self.target) ** 2).mean()

    def d_x(self, x: Tensor) -> Tensor:
        return 2 * (x - self.target) / x.numel()


@dataclass(frozen=True)
class Gradients:
    """J and, by the article's numbers k = 1, 2, ..., every ∂J/∂θ_k and ∂J/∂x_k."""

    J: Tensor
    d_theta: dict[int, Value]
    d_x: dict[int, Value]

    def __str__(self) -> str:
        """The order A[B[C]] in which each was computed."""
        values = {f"∂J/∂θ{_sub(k)}": value for k, value in self.d_theta.items()}
        values |= {f"∂J/∂x{_sub(k)}": value for k, value in self.d_x.items()}
        return "\n".join(f"{name} = {v}" for name, v in values.items() if name != v.order)


class Chain:
    """Layers f_1, ..., f_n and a loss g. Calling it gives J and all its gradients, by equation (5).

    The tensors of the layers are shared with the caller's, so a step of gradient descent on them is
    seen here. The same layer twice is two layers f_k, and its gradients are to be added.
    """

    def __init__(self, layers: Sequence[Layer], loss: MSE) -> None:
        if not layers:
            raise ValueError("chain: layers must hold at least one layer, got none")
        self.layers = [copy.copy(layer) for layer in layers]
        for k, layer in enumerate(self.layers, 1):
            layer.k = k
        self.loss = loss

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Gradients:
        for layer in self.layers:  # (1)
            x = layer(x)
        J = self.loss(x)  # (2)

        end = len(self.layers) + 1
        d_theta: dict[int, Value] = {}
        d_x = {end: Value(self.loss.d_x(x), f"∂J/∂x{_sub(end)}")}
        for layer in reversed(self.layers):  # (5)
            k = end - len(d_x)
            if layer.names:
                d_theta[k] = layer.d_theta[d_x[k + 1]]
            d_x[k] = layer.d_x[d_x[k + 1]]
        return Gradients(J, d_theta, d_x)
