"""Layers for PyTorch whose gradients are derived by hand."""

import torch_manual.functions.lstm_exported  # noqa: F401  # an op that exported programs call
from torch_manual import chain, functional, init
from torch_manual.convert import replace, restore
from torch_manual.gradcheck import GradcheckReport, GradcheckRow, gradcheck
from torch_manual.kernels.backend import backends, use_backend
from torch_manual.kernels.packed import empty_cache
from torch_manual.modules.activation import GELU, LogSoftmax, ReLU, Sigmoid, Softmax, Tanh
from torch_manual.modules.dropout import Dropout
from torch_manual.modules.embedding import Embedding
from torch_manual.modules.layer_norm import LayerNorm
from torch_manual.modules.linear import Linear
from torch_manual.modules.loss import BCEWithLogitsLoss, CrossEntropyLoss, MSELoss
from torch_manual.modules.lstm import LSTM, LSTMCell, PeepholeLSTM, PeepholeLSTMCell
from torch_manual.modules.two_linear import TwoLinear
from torch_manual.override import override

__version__ = "0.1.0"
__all__ = [
    "GELU",
    "LSTM",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "Dropout",
    "Embedding",
    "GradcheckReport",
    "GradcheckRow",
    "LSTMCell",
    "LayerNorm",
    "Linear",
    "LogSoftmax",
    "MSELoss",
    "PeepholeLSTM",
    "PeepholeLSTMCell",
    "ReLU",
    "Sigmoid",
    "Softmax",
    "Tanh",
    "TwoLinear",
    "backends",
    "chain",
    "empty_cache",
    "functional",
    "gradcheck",
    "init",
    "override",
    "replace",
    "restore",
    "use_backend",
]
