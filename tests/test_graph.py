"""When the Triton kernels' launches become a CUDA graph. Something else stands in for CUDA."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch_manual.triton_kernels import _graph


class Graph:
    captured = replayed = 0

    def capture_begin(self, **_):
        Graph.captured += 1

    def capture_end(self):
        pass

    def replay(self):
        Graph.replayed += 1


@pytest.fixture
def cuda(monkeypatch):
    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "CUDAGraph": Graph,
        "Stream": lambda device: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device: None,
        "is_current_stream_capturing": lambda: False,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(_graph, "_graphs", type(_graph._graphs)())
    monkeypatch.setattr(_graph, "_streams", {})
    Graph.captured = Graph.replayed = 0


def tensor(address):
    return SimpleNamespace(
        is_cuda=True, data_ptr=lambda: address, dtype=torch.float32, device=torch.device("cuda", 0)
    )


def test_a_graph_is_captured_when_the_addresses_come_again_and_again(cuda):
    launched = []
    for n in range(1, 8):
        _graph.replay(lambda: launched.append(1), [tensor(1), tensor(2)], "key")
        plain = min(n, _graph.WORTH)
        assert len(launched) == plain + (n > _graph.WORTH)  # a capture launches once, for no device
        assert (Graph.captured, Graph.replayed) == (n > _graph.WORTH, n - plain)


def test_other_addresses_and_other_keys_are_other_graphs(cuda):
    for _ in range(_graph.WORTH + 2):
        for address, key in ((1, "a"), (2, "a"), (1, "b")):
            _graph.replay(lambda: None, [tensor(address)], key)
    assert (Graph.captured, Graph.replayed) == (3, 6)


def test_addresses_that_do_not_come_again_are_never_captured(cuda):
    for k in range(10 * _graph.KEPT):
        _graph.replay(lambda: None, [tensor(k)], "key")
    assert Graph.captured == 0
    assert len(_graph._graphs) == _graph.KEPT


def test_launches_are_plain_within_a_capture_and_on_the_cpu(cuda, monkeypatch):
    launched = []
    for _ in range(10):
        _graph.replay(lambda: launched.append(1), [torch.zeros(1)], "key")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for _ in range(10):
        _graph.replay(lambda: launched.append(1), [tensor(1)], "key")
    assert len(launched) == 20
    assert Graph.captured == 0
