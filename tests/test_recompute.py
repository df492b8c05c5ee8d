"""`recompute=K`: the same gradients to the bit, in less memory."""

import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import torch_manual
from torch_manual.functions import lstm_gradients
from torch_manual.kernels import cpu_gradients

AVAILABLE = [name for name, s in torch_manual.backends().items() if s == "available"]
CLASSES = [
    torch_manual.LSTM,
    torch_manual.PeepholeLSTM,
    pytest.param(partial(torch_manual.PeepholeLSTM, peephole="full"), id="full peepholes"),
]
KWARGS = [
    {},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"proj_size": 3, "bidirectional": True, "bias": False},
]


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("kwargs", KWARGS, ids=str)
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("backend", [b for b in AVAILABLE if b != "triton"])
def test_bit_identical(backend, cls, kwargs, packed, monkeypatch):
    monkeypatch.setattr(lstm_gradients, "BLOCK_ROWS", 300)
    monkeypatch.setattr(cpu_gradients, "chunk_rows", lambda *_: 50)
    plain = cls(5, 19, **kwargs)
    lean = cls(5, 19, recompute=20, **kwargs)
    lean.load_state_dict(plain.state_dict())
    n = plain.num_layers * (1 + plain.bidirectional)
    x = torch.randn(250, 4, 5, requires_grad=True)
    h0 = torch.randn(n, 4, plain.proj_size or 19, requires_grad=True)
    c0 = torch.randn(n, 4, 19, requires_grad=True)
    results = []
    with torch_manual.use_backend(backend):
        for module in (plain, lean):
            given = x.transpose(0, 1) if module.batch_first and not packed else x
            if packed:
                given = pack_padded_sequence(x, [250, 170, 33, 2])
            y, (h_n, c_n) = module(given, (h0, c0))
            outputs = [y.data if packed else y, h_n, c_n]
            torch.manual_seed(0)
            loss = sum((t * torch.randn_like(t)).sum() for t in outputs)
            grads = torch.autograd.grad(loss, [x, h0, c0, *module.parameters()])
            results.append([*outputs, *grads])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("T", "B", "I", "H", "K"), [(100, 1, 40, 30, 10), (130, 10, 14, 7, 3), (40, 16, 40, 40, 8)]
)
def test_bit_identical_on_two_threads(T, B, I, H, K):
    """Also where the work of one direction is little for two threads and that of both is not."""
    threads = torch.get_num_threads()
    plain = torch_manual.LSTM(I, H, 2, bidirectional=True)
    lean = torch_manual.LSTM(I, H, 2, bidirectional=True, recompute=K)
    lean.load_state_dict(plain.state_dict())
    x = torch.randn(T, B, I, requires_grad=True)
    try:
        torch.set_num_threads(2)
        results = [
            torch.autograd.grad(m(x)[0].square().sum(), [x, *m.parameters()]) for m in (plain, lean)
        ]
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_keeps_little():
    """Bytes kept for the backward pass beyond x, y and the parameters."""
    kept = []
    for recompute in (None, 50):
        module = torch_manual.LSTM(8, 16, recompute=recompute)
        saved = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t) or t, lambda t: t
        )
        with hooks:
            module(torch.randn(2000, 4, 8))
        known = {p.data_ptr() for p in module.parameters()}
        kept.append(sum(t.numel() for t in saved if t.data_ptr() not in known))
    everything, little = kept
    x_and_y = 2000 * 4 * (8 + 16)
    assert everything - x_and_y > 5 * 2000 * 4 * 16
    assert little - x_and_y < 3 * 2000 * 4 * 16 / 50


def test_trains_where_the_stock_module_runs_out_of_memory():
    """T = 20,000, B = 8, H = 128 in 700 MiB above what the import takes."""
    script = textwrap.dedent("""
        import resource, sys, torch, torch_manual
        torch.set_num_threads(1)
        kwargs = {"recompute": 200} if sys.argv[1] == "torch_manual" else {}
        cls = torch_manual.LSTM if kwargs else torch.nn.LSTM
        lstm = cls(128, 128, **kwargs)
        lstm(torch.randn(3, 8, 128))[0].sum().backward()
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (700 << 20),) * 2)
        try:
            y, _ = lstm(torch.randn(20000, 8, 128))
            (y * y.detach()).sum().backward()
        except (RuntimeError, MemoryError):
            sys.exit(3)
        sys.exit(0 if lstm.weight_hh_l0.grad.isfinite().all() else 1)
    """)
    code = {
        name: subprocess.run([sys.executable, "-c", script, name], check=False).returncode
        for name in ("torch_manual", "torch")
    }
    assert code["torch_manual"] == 0
    assert code["torch"] == 3


@pytest.mark.parametrize("kwargs", [{}, {"proj_size": 3}], ids=str)
@pytest.mark.parametrize(("T", "B", "K"), [(5, 0, 2), (40, 3, 2**63 - 1), (40, 3, 2**70)])
def test_empty_batches_and_segments_longer_than_any_sequence(T, B, K, kwargs):
    plain, lean = (
        torch_manual.LSTM(16, 64, **kwargs),
        torch_manual.LSTM(16, 64, recompute=K, **kwargs),
    )
    lean.load_state_dict(plain.state_dict())
    x = torch.randn(T, B, 16, requires_grad=True)
    results = [
        torch.autograd.grad(m(x)[0].square().sum(), [x, *m.parameters()]) for m in (plain, lean)
    ]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_second_order_is_refused():
    module = torch_manual.LSTM(3, 4, recompute=2)
    x = torch.randn(9, 2, 3, requires_grad=True)
    (dx,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second-order gradients"):
        dx.sum().backward()


@pytest.mark.parametrize("kwargs", [{}, {"proj_size": 2}], ids=str)
def test_batched_gradients_are_refused(kwargs):
    x = torch.randn(9, 2, 3, requires_grad=True)
    y, _ = torch_manual.LSTM(3, 4, recompute=2, **kwargs)(x)
    with pytest.raises(RuntimeError, match="with recompute gradients cannot be batched"):
        torch.autograd.grad(y, x, torch.ones(5, *y.shape), is_grads_batched=True)


def test_transforms_are_refused():
    module = torch_manual.LSTM(3, 4, recompute=2)
    x = torch.randn(9, 2, 3)
    with pytest.raises(RuntimeError, match="with recompute there is no forward mode"):
        torch.func.jvp(lambda x: module(x)[0], (x,), (x,))
    with pytest.raises(RuntimeError, match="with recompute there is no vmap"):
        torch.func.vmap(lambda x: module(x)[0], 1, 1)(x.unsqueeze(2))


def test_arguments():
    assert "recompute=7" in repr(torch_manual.LSTM(3, 4, recompute=7))
    for bad in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="recompute must be a positive int or None, got"):
            torch_manual.LSTM(3, 4, recompute=bad)
    with pytest.raises(ValueError, match="recompute saves nothing when return_cells=True"):
        torch_manual.LSTM(3, 4, recompute=5, return_cells=True)
