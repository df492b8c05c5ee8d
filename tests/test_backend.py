"""Choosing an implementation."""

import os
import platform
import shutil
from types import SimpleNamespace

import pytest
import torch

import torch_manual
from torch_manual.kernels import backend, cpu_library


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


def on(device, dtype=torch.float32):
    return SimpleNamespace(
        device=torch.device(device), dtype=dtype, is_cuda=device == "cuda", is_cpu=device == "cpu"
    )


def test_a_backend_that_cannot_serve_says_why(monkeypatch):
    monkeypatch.setattr(backend, "_triton_status_once", lambda: "available")
    monkeypatch.setattr(backend, "_interpreted", lambda: False)
    assert backend.triton_serves(on("cuda"))
    assert not backend.triton_serves(on("cpu"))
    monkeypatch.setattr(backend, "_requested", "triton")
    assert backend.triton_serves(on("cuda"))
    with pytest.raises(RuntimeError, match="'triton' kernels serve CUDA tensors, got one on cpu"):
        backend.triton_serves(on("cpu"))
    with pytest.raises(RuntimeError, match=r"'triton' kernels have no code for torch\.complex64"):
        backend.triton_serves(on("cuda", torch.complex64))
    monkeypatch.setattr(backend, "_interpreted", lambda: True)
    assert backend.triton_serves(on("cpu"))
    monkeypatch.setattr(backend, "_requested", "cpu")
    with pytest.raises(RuntimeError, match="'cpu' kernel serves CPU tensors, got one on cuda"):
        backend.triton_serves(on("cuda"))
    assert not backend.triton_serves(on("cpu"))


def test_every_instruction_set_was_built():
    if shutil.which((os.environ.get("CXX") or "g++").split()[0]) is None:
        pytest.skip("no compiler")
    x86 = platform.machine() in ("x86_64", "AMD64")
    for name in cpu_library.INSTRUCTION_SETS if x86 else ("baseline",):
        assert (cpu_library.FOLDER / f"lstm_{name}.so").exists(), name


def test_a_kernel_of_the_baseline_alone_does_not_serve(tmp_path, monkeypatch):
    if cpu_library.status() != "available" or cpu_library.instruction_set() == "baseline":
        pytest.skip("there is no other")
    shutil.copy(cpu_library.FOLDER / "lstm_baseline.so", tmp_path)
    monkeypatch.setattr(cpu_library, "FOLDER", tmp_path)
    with pytest.raises(RuntimeError, match="it was compiled without avx"):
        cpu_library._best_instruction_set()
