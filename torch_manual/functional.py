"""The layers as functions, with the signatures of torch.nn.functional's where it has them."""

from torch_manual.functions.activation import gelu, log_softmax, relu, sigmoid, softmax, tanh
from torch_manual.functions.dropout import dropout
from torch_manual.functions.embedding import embedding
from torch_manual.functions.layer_norm import layer_norm
from torch_manual.functions.linear import linear
from torch_manual.functions.loss import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    mse_loss,
)
from torch_manual.functions.lstm import LSTMWeights, lstm_layer
from torch_manual.functions.lstm_cell import lstm_cell
from torch_manual.functions.two_linear import two_linear

__all__ = [
    "LSTMWeights",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "dropout",
    "embedding",
    "gelu",
    "layer_norm",
    "linear",
    "log_softmax",
    "lstm_cell",
    "lstm_layer",
    "mse_loss",
    "relu",
    "sigmoid",
    "softmax",
    "tanh",
    "two_linear",
]
