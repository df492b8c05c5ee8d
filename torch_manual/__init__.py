"""Layers for PyTorch whose gradients are derived by hand."""

from torch_manual import init
from torch_manual.convert import replace, restore
from torch_manual.kernels.backend import backends, use_backend
from torch_manual.modules.lstm import LSTM, LSTMCell, PeepholeLSTM, PeepholeLSTMCell

__version__ = "0.1.0"
__all__ = [
    "LSTM",
    "LSTMCell",
    "PeepholeLSTM",
    "PeepholeLSTMCell",
    "backends",
    "init",
    "replace",
    "restore",
    "use_backend",
]
