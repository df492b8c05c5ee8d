"""TwoLinear, the article's toy layer, with the gradients of torch_manual.functions.two_linear."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_manual.functions.two_linear import two_linear


class TwoLinear(torch.nn.Module):
    """Y = X W V, two linear maps in a row (docs/derivations/two_linear.md).

    Parameters: weight_w (in_features, hidden_features), weight_v (hidden_features, out_features),
    in the article's row-vector convention: the transposes of torch.nn.Linear's. As in
    torch.nn.Linear, each is drawn from U(−k, k) with k = 1/√(its number of rows).
    Errors: ValueError for a size below 1.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.out_features = out_features
        for name in ("in_features", "hidden_features", "out_features"):
            if getattr(self, name) < 1:
                raise ValueError(f"TwoLinear: {name} must be at least 1, got {getattr(self, name)}")

        def parameter(rows: int, columns: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.empty(rows, columns, device=device, dtype=dtype))

        self.weight_w = parameter(in_features, hidden_features)
        self.weight_v = parameter(hidden_features, out_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.weight_w, self.weight_v):
            bound = 1 / math.sqrt(weight.shape[0])
            torch.nn.init.uniform_(weight, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        return two_linear(input, self.weight_w, self.weight_v)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, hidden_features={self.hidden_features}, "
            f"out_features={self.out_features}"
        )
