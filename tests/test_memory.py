"""Large blocks of CPU memory come back when their tensor dies, and not before."""

from __future__ import annotations

import mmap
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import torch_manual
from torch_manual.kernels import memory

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")
LIKE = torch.empty(0)
ROWS = memory.SMALLEST // 4096  # of 1024 floats: the smallest block


@pytest.fixture(autouse=True)
def nothing_kept():
    torch_manual.empty_cache()
    assert memory.kept_bytes() == 0
    yield
    torch_manual.empty_cache()


def test_a_block_is_used_again():
    t = memory.empty(LIKE, ROWS, 1024)
    assert t.shape == (ROWS, 1024)
    assert t.is_contiguous()
    address = t.data_ptr()
    del t
    assert memory.kept_bytes() == memory.SMALLEST
    again = memory.empty(LIKE.double(), ROWS, 512)
    assert again.data_ptr() == address
    assert again.dtype is torch.float64
    assert memory.kept_bytes() == 0


def test_a_view_keeps_its_block():
    t = memory.empty(LIKE, ROWS, 1024).fill_(1.0)
    row = t[-1]
    del t
    other = memory.empty(LIKE, ROWS, 1024).fill_(2.0)
    assert (row == 1).all()
    assert other.data_ptr() != row.data_ptr()
    assert memory.kept_bytes() == 0


def test_sizes():
    assert memory.empty(LIKE, ROWS - 1, 1024).shape == (ROWS - 1, 1024)
    assert memory.kept_bytes() == 0  # malloc's
    large = memory.empty(LIKE, 2 * ROWS + 1, 1024)
    address = large.data_ptr()
    del large
    small = memory.empty(LIKE, ROWS, 1024)
    assert small.data_ptr() != address  # more than half of the block would lie idle
    memory.drop_free()
    del small
    memory.empty(LIKE, ROWS + 1, 1024).fill_(1.0)  # the block kept is too small
    assert memory.kept_bytes() > 2 * memory.SMALLEST


@pytest.mark.parametrize("rows", [ROWS + 1, 2 * ROWS + 1, 8 * ROWS + 1, 40 * ROWS + 1])
def test_blocks_are_at_most_a_quarter_larger_than_asked_for(rows):
    memory.empty(LIKE, rows, 1024)
    n_bytes = rows * 4096
    assert n_bytes <= memory.kept_bytes() <= 1.25 * n_bytes


def test_gradients_of_the_last_step_are_overwritten_only_when_freed():
    layer, x = torch_manual.LSTM(4, 512), torch.randn(3, 2, 4)
    layer(x)[0].sum().backward()
    before = layer.weight_hh_l0.grad
    address, kept = before.data_ptr(), before.clone()
    layer.zero_grad()
    layer(2 * x)[0].sum().backward()
    assert torch.equal(before, kept)
    another = layer.weight_hh_l0.grad.data_ptr()
    assert another != address
    del before
    layer.zero_grad()
    layer(x)[0].sum().backward()
    assert torch.equal(layer.weight_hh_l0.grad, kept)
    assert layer.weight_hh_l0.grad.data_ptr() in (address, another)


def test_no_more_is_kept_than_the_limit(monkeypatch):
    monkeypatch.setattr(memory, "MOST_KEPT", 2 * memory.SMALLEST)
    tensors = [memory.empty(LIKE, ROWS, 1024) for _ in range(4)]
    last = tensors[-1].data_ptr()
    for k in range(4):
        tensors[k] = None
    assert memory.kept_bytes() == 2 * memory.SMALLEST
    kept = {memory.empty(LIKE, ROWS, 1024).data_ptr() for _ in range(2)}
    assert last in kept


def test_threads():
    """Eight threads take and give back blocks; none is lent to two at once."""
    wrong = []

    def work(k):
        for _ in range(30):
            t = memory.empty(LIKE, ROWS, 1024)
            t[::256].fill_(float(k))
            if not (t[::256] == k).all():
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_a_call_computes_with_is_kept_and_given_back():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    m = torch_manual.LSTM(1024, 1024).requires_grad_(False)  # 32 MiB of packed weights
    x = torch.randn(4, 40, 1024, requires_grad=True)
    m(x)[0].sum().backward()
    memory.drop_free()
    kept = resident()
    torch_manual.empty_cache()
    assert kept - resident() > 30 << 20


def test_no_memory_is_torchs_error():
    with pytest.raises(RuntimeError, match="memory"):
        memory.empty(LIKE, 1 << 25, 1 << 25)


def test_training_uses_the_same_blocks():
    module = torch_manual.LSTM(64, 320)
    x = torch.randn(256, 32, 64)

    def step():
        module.zero_grad()
        module(x)[0].sum().backward()

    step()
    kept = memory.kept_bytes()
    gates = 4 * 256 * 32 * 4 * 320
    assert gates <= kept < 2 * gates  # no dpre of all steps beside them
    address = set(memory._free)
    step()
    assert memory.kept_bytes() == kept
    assert set(memory._free) == address


@torch.no_grad()
def test_outputs_use_the_same_blocks_and_stay_as_they_are():
    module = torch_manual.LSTM(64, 320, num_layers=2)
    x = torch.randn(64, 32, 64)
    y = module(x)[0]
    assert memory.kept_bytes() >= 4 * y.numel()  # what the first layer put out
    copy, between = y.clone(), set(memory._free)
    z = module(2 * x)[0]
    assert torch.equal(y, copy)
    assert set(memory._free) == between
    del y, z
    kept = set(memory._free)
    assert torch.equal(module(x)[0], copy)
    assert set(memory._free) == kept


def test_graph_alive_at_exit():
    script = (
        "import torch, torch_manual\n"
        "y, _ = torch_manual.LSTM(64, 256)(torch.randn(256, 32, 64))\n"
        "from torch_manual.kernels import memory\n"
        "assert memory._lent and not memory._free\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
