"""`nn.LSTM` and `nn.LSTMCell` with hand-derived gradients, and the article's peephole LSTM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from torch_manual.functions.lstm import LSTMWeights, lstm_layer
from torch_manual.functions.lstm_arguments import check_recompute
from torch_manual.functions.lstm_cell import lstm_cell

CELL_PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
PEEPHOLES = ("weight_ci", "weight_cf", "weight_co")


class LSTM(nn.RNNBase):
    r"""A drop-in for `torch.nn.LSTM`: same arguments, parameters, state_dict, results and errors.

    For each layer and step (i, f, g, o in this order in every weight)::

        i_t = σ(x_t W_iiᵀ + b_ii + h_{t-1} W_hiᵀ + b_hi)
        f_t = σ(x_t W_ifᵀ + b_if + h_{t-1} W_hfᵀ + b_hf)
        g_t = tanh(x_t W_igᵀ + b_ig + h_{t-1} W_hgᵀ + b_hg)
        o_t = σ(x_t W_ioᵀ + b_io + h_{t-1} W_hoᵀ + b_ho)
        c_t = f_t ⊙ c_{t-1} + i_t ⊙ g_t
        h_t = (o_t ⊙ tanh(c_t)) W_hrᵀ        (W_hr only with proj_size)

    The gradients are those of docs/derivations/lstm.md, computed by `torch_manual.functional`.

    Args:
        input_size: I, the number of features of the input.
        hidden_size: H, the number of features of the cell.
        num_layers: how many LSTMs are stacked, each reading the output of the one below.
        bias: whether the layers have `bias_ih` and `bias_hh`.
        batch_first: input and output are (B, T, ·) in place of (T, B, ·). States are not affected.
        dropout: probability with which outputs of every layer but the last are zeroed in training.
        bidirectional: run a second LSTM from the last step to the first and concatenate.
        proj_size: if > 0, h_t is a projection of the cell's output, of this size.
        device, dtype: of the parameters.
        return_cells: the forward pass returns every c_t of the last layer as well.
        recompute: train in little memory: keep h and c of every `recompute`-th step only, and run
            the steps between again in the backward pass.

    Inputs: `input` (T, B, I), (T, I) unbatched, or a PackedSequence; `hx` = (h_0, c_0), zeros if
    not given, of (layers·D, B, P) and (layers·D, B, H); without B when unbatched.

    Returns: `output, (h_n, c_n)`, or `output, (h_n, c_n), cells` with `return_cells`. `output`
    holds h_t of the last layer, (T, B, D·P); `cells` its c_t, (T, B, D·H); both are packed when
    the input is.
    """

    return_cells = False
    recompute: int | None = None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        return_cells: bool = False,
        recompute: int | None = None,
    ) -> None:
        if recompute is not None:
            check_recompute(recompute, return_cells)
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        self.return_cells = return_cells
        self.recompute = recompute

    get_expected_cell_size: Any = nn.LSTM.get_expected_cell_size
    check_forward_args: Any = nn.LSTM.check_forward_args
    permute_hidden: Any = nn.LSTM.permute_hidden

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        """The parameters as they are now, so that none is ever stale (parametrizations, vmap)."""
        own = self._parameters
        names = self._flat_weights_names
        return [own[name] if name in own else getattr(self, name, None) for name in names]

    @_flat_weights.setter
    def _flat_weights(self, _: list[Tensor | None]) -> None:
        """RNNBase keeps a list of its own; there is nothing to keep here."""

    def flatten_parameters(self) -> None:
        """Do nothing; the kernels read the parameters where they are."""

    def extra_repr(self) -> str:
        s = super().extra_repr()
        if self.return_cells:
            s += ", return_cells=True"
        return s if self.recompute is None else s + f", recompute={self.recompute}"

    def forward(self, input: Any, hx: Any = None) -> Any:
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(0 if self.batch_first else 1)
        h0, c0 = self._initial_states(x, None, hx, batched)
        if self.batch_first:
            x = x.transpose(0, 1)
        if x.shape[0] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        output, h_n, c_n, *cells = self._run(x, h0, c0, None)
        if self.batch_first:
            output, *cells = (t.transpose(0, 1) for t in (output, *cells))
        if not batched:
            output, *cells = (t.squeeze(0 if self.batch_first else 1) for t in (output, *cells))
            h_n, c_n = h_n.squeeze(1), c_n.squeeze(1)
        return output, (h_n, c_n), *cells

    def _forward_packed(self, input: PackedSequence, hx: Any) -> Any:
        x, batch_sizes, sorted_indices, unsorted_indices = input
        if hx is not None:
            hx = self.permute_hidden(hx, sorted_indices)
        h0, c0 = self._initial_states(x, batch_sizes, hx, True)
        output, h_n, c_n, *cells = self._run(x, h0, c0, batch_sizes)
        packed, *packed_cells = (
            PackedSequence(t, batch_sizes, sorted_indices, unsorted_indices)
            for t in (output, *cells)
        )
        return packed, self.permute_hidden((h_n, c_n), unsorted_indices), *packed_cells

    def _initial_states(
        self, x: Tensor, batch_sizes: Tensor | None, hx: Any, batched: bool
    ) -> tuple[Tensor, Tensor]:
        """Check the input and the states, as `nn.LSTM` does; zeros for states not given."""
        if hx is None:
            self.check_input(x, batch_sizes)
            c0 = x.new_zeros(self.get_expected_cell_size(x, batch_sizes))
            if not self.proj_size:
                return c0, c0
            return x.new_zeros(*c0.shape[:2], self.proj_size), c0
        if len(hx) > 2 or (batch_sizes is not None and len(hx) < 2):
            raise RuntimeError("lstm expects two hidden states")
        h0, c0 = hx[0], hx[1]
        if batch_sizes is None:
            dim, name = (3, "batched 3-D") if batched else (2, "unbatched 2-D")
            if h0.dim() != dim or c0.dim() != dim:
                raise RuntimeError(
                    f"For {name} input, hx and cx should "
                    f"also be {dim}-D but got ({h0.dim()}-D, {c0.dim()}-D) tensors"
                )
            if not batched:
                h0, c0 = h0.unsqueeze(1), c0.unsqueeze(1)
        traced = batch_sizes is not None and torch.compiler.is_compiling()
        # a graph cannot look into batch_sizes: the kernel compares them with h0 when it runs
        self.check_forward_args(x, (h0, c0), h0.shape[1:2] if traced else batch_sizes)
        return h0, c0

    def _run(
        self, x: Tensor, h0: Tensor, c0: Tensor, batch_sizes: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Run the layers, with dropout between them, over (T, B, ·) or packed rows."""
        D = 2 if self.bidirectional else 1
        h_n, c_n = [], []
        cells: list[Tensor] = []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout > 0:
                x = torch.dropout(x, self.dropout, self.training)
            states = slice(layer * D, (layer + 1) * D)
            last = layer == self.num_layers - 1
            x, h, c, *cells = lstm_layer(
                x,
                h0 if self.num_layers == 1 else h0[states],
                c0 if self.num_layers == 1 else c0[states],
                self._weights(states),
                batch_sizes,
                return_cells=self.return_cells and last,
                recompute=self.recompute,
            )
            h_n.append(h)
            c_n.append(c)
        if x.requires_grad and self._stock_lets_change(x, batch_sizes):
            x = x.clone()
        if self.num_layers == 1:
            return x, h_n[0], c_n[0], *cells
        return x, torch.cat(h_n), torch.cat(c_n), *cells

    def _stock_lets_change(self, output: Tensor, batch_sizes: Tensor | None) -> bool:
        """Whether it may be changed in place before the backward pass, for which we keep it.

        `nn.LSTM` keeps it on a GPU and in its float32 path of oneDNN, and refuses that there.
        """
        onednn = batch_sizes is None and output.dtype == torch.float32
        onednn = onednn and not self.bidirectional and not self.proj_size
        traced = torch.compiler.is_compiling()
        return output.is_cpu and not onednn and not traced

    def _weights(self, directions: slice) -> list[LSTMWeights]:
        """The parameters as they are now, in the order of LSTMWeights."""
        weights = []
        for names in self._all_weights[directions]:
            tensors = _parameters(self, names)
            if not self.bias:
                tensors[2:2] = None, None
            if not self.proj_size:
                tensors[4:4] = (None,)
            weights.append(LSTMWeights(*tensors))
        return weights


class PeepholeLSTM(LSTM):
    """The LSTM of Graves (2013), whose gates see the cell; the article's equations 11 to 15.

    `LSTM` with three more terms::

        i_t = σ(… + c_{t-1} ⊙ w_ci)    f_t = σ(… + c_{t-1} ⊙ w_cf)    o_t = σ(… + c_t ⊙ w_co)

    The output gate sees the new cell. With zero peepholes the results are exactly `LSTM`'s. The
    derivation, equation by equation, is docs/derivations/peephole_lstm.md.

    Args:
        peephole: `"diagonal"` as Graves has it: `weight_ci_l{k}`, `weight_cf_l{k}` and
            `weight_co_l{k}` are (H,); or `"full"` as the article has it: (H, H), the term c W_ciᵀ.

    All other arguments, inputs and results are those of `LSTM`. The peepholes come after its
    parameters, so that these are drawn alike for the same seed.

    Raises:
        ValueError: `peephole` is neither `"diagonal"` nor `"full"`.
    """

    def __init__(self, *args: Any, peephole: str = "diagonal", **kwargs: Any) -> None:
        dims = _peephole_dims(peephole)
        super().__init__(*args, **kwargs)
        self.peephole = peephole
        for names in self._all_weights:
            suffix = names[0].removeprefix("weight_ih")
            weight_ih = getattr(self, names[0])
            for name in PEEPHOLES:
                _add_peephole(self, name + suffix, weight_ih, dims)
            names.extend(name + suffix for name in PEEPHOLES)
            self._flat_weights_names.extend(names[-3:])
        self._init_flat_weights()

    def extra_repr(self) -> str:
        return super().extra_repr() + f", peephole={self.peephole!r}"


class LSTMCell(nn.RNNCellBase):
    """A drop-in for `torch.nn.LSTMCell`: one step of `LSTM`, same parameters, results and errors.

    Inputs: `input` (B, I) or (I,); `hx` = (h, c), (B, H) each or (H,), zeros if not given.
    Returns: h', c'. Both come of one node, as `torch.nn.LSTMCell`'s do on a GPU; on the CPU its h'
        is made of the returned c' and has a gradient with respect to it.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Tensor]:
        n_dims = input.dim()
        if n_dims not in (1, 2):
            raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {n_dims}D instead")
        batched = n_dims == 2
        x = input if batched else input.unsqueeze(0)
        if hx is None:
            h = c = x.new_zeros(x.shape[0], self.hidden_size)
        elif len(hx) != 2:
            raise RuntimeError("lstm_cell expects two hidden states")
        else:
            h, c = hx if batched else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        try:
            h, c = lstm_cell(x, (h, c), self._weights())
        except (RuntimeError, ValueError):  # only then: it takes 5 % of a small step
            self._check(x, h, c, batched)
            raise
        return (h, c) if batched else (h.squeeze(0), c.squeeze(0))

    def _check(self, x: Tensor, h: Tensor, c: Tensor, batched: bool) -> None:
        """Refuse what `nn.LSTMCell` refuses, in its words."""
        for k, state in enumerate((h, c)):
            n_dims = state.dim() - (not batched)
            if n_dims not in (1, 2):
                raise ValueError(
                    f"LSTMCell: Expected hx[{k}] to be 1D or 2D, got {n_dims}D instead"
                )
        if x.shape[1] != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {x.shape[1]} expected {self.input_size}"
            )
        for k, state in enumerate((h, c)):
            if state.shape[0] != x.shape[0]:
                raise RuntimeError(
                    f"Input batch size {x.shape[0]} doesn't match "
                    f"hidden{k} batch size {state.shape[0]}"
                )
            if state.shape[1] != self.hidden_size:
                raise RuntimeError(
                    f"hidden{k} has inconsistent hidden_size: "
                    f"got {state.shape[1]}, expected {self.hidden_size}"
                )

    def _weights(self) -> LSTMWeights:
        return LSTMWeights(*_parameters(self, CELL_PARAMETERS))


class PeepholeLSTMCell(LSTMCell):
    """One step of `PeepholeLSTM`; parameters `weight_ci`, `weight_cf`, `weight_co` after the rest.

    Args:
        peephole: `"diagonal"` or `"full"`, as in `PeepholeLSTM`.

    Raises:
        ValueError: `peephole` is neither `"diagonal"` nor `"full"`.
    """

    weight_ci: Tensor
    weight_cf: Tensor
    weight_co: Tensor

    def __init__(self, *args: Any, peephole: str = "diagonal", **kwargs: Any) -> None:
        dims = _peephole_dims(peephole)
        super().__init__(*args, **kwargs)
        self.peephole = peephole
        for name in PEEPHOLES:
            _add_peephole(self, name, self.weight_ih, dims)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", peephole={self.peephole!r}"

    def _weights(self) -> LSTMWeights:
        return (
            super()
            ._weights()
            ._replace(weight_ci=self.weight_ci, weight_cf=self.weight_cf, weight_co=self.weight_co)
        )


def _parameters(module: nn.Module, names: Sequence[str]) -> list[Any]:
    """The parameters as they are now; one that is parametrized or pruned is an attribute."""
    own = module._parameters
    return [own[name] if name in own else getattr(module, name) for name in names]


def _peephole_dims(peephole: str) -> int:
    """The number of dimensions of a peephole weight."""
    dims = {"diagonal": 1, "full": 2}
    if not isinstance(peephole, str) or peephole not in dims:
        raise ValueError(f"peephole must be 'diagonal' or 'full', got {peephole!r}")
    return dims[peephole]


def _add_peephole(module: Any, name: str, like: Tensor, dims: int) -> None:
    """Register a peephole weight, drawn as `reset_parameters` draws the others."""
    H = module.hidden_size
    weight = nn.Parameter(torch.empty((H,) * dims, device=like.device, dtype=like.dtype))
    nn.init.uniform_(weight, -(H**-0.5), H**-0.5)
    module.register_parameter(name, weight)
