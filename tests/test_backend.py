"""Choosing an implementation."""

import pytest
import torch

import torch_manual
from torch_manual.kernels import backend


def test_backends_says_what_is_there_and_why_not():
    status = torch_manual.backends()
    assert set(status) == {"eager", "cpu", "triton"}
    assert status["eager"] == "available"
    assert all(isinstance(s, str) and s for s in status.values())


def test_use_backend_sets_and_restores():
    assert backend.requested() == "auto"
    with torch_manual.use_backend("eager"):
        assert backend.requested() == "eager"
        with torch_manual.use_backend("auto"):
            assert backend.requested() == "auto"
        assert backend.requested() == "eager"
        y, _ = torch_manual.LSTM(3, 4)(torch.randn(5, 2, 3))
        y.sum().backward()
    assert backend.requested() == "auto"
    torch_manual.use_backend("eager")
    assert backend.requested() == "eager"
    torch_manual.use_backend("auto")


def test_use_backend_refuses(monkeypatch):
    with pytest.raises(ValueError, match="must be one of auto, eager, cpu, triton, got 'cuda'"):
        torch_manual.use_backend("cuda")
    monkeypatch.setattr(backend, "backends", lambda: {"triton": "no GPU"})
    with pytest.raises(RuntimeError, match="use_backend: 'triton' is not available: no GPU"):
        torch_manual.use_backend("triton")
    assert backend.requested() == "auto"
