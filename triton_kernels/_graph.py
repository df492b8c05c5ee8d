"""Many small launches as one CUDA graph."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

KEPT = 64  # graphs; the one used longest ago is dropped first
WORTH = 3  # calls at the same addresses, before a graph is captured

# or how many calls there were so far
_graphs: OrderedDict[Hashable, torch.cuda.CUDAGraph | int] = OrderedDict()
_streams: dict[torch.device, torch.cuda.Stream] = {}  # to capture on
_lock = threading.Lock()  # autograd has a thread for each device


def replay(launches: Callable[[], object], tensors: Sequence[Tensor], key: Hashable) -> None:
    """Do what `launches` does, by a CUDA graph when it comes again and again.

    A graph holds addresses. A training loop gets the same ones from the caching allocator again and
    again, so they are part of the key, and a graph is replayed only where every tensor stands where
    it stood; nothing is copied and nothing is kept alive. The first calls with a key launch one by
    one (and compile), the next captures. On a CPU, and inside a capture, it is plain launches.

    Args:
        launches: starts kernels on the current stream; it must not allocate.
        tensors: everything the kernels read and write.
        key: the values of their other arguments.
    """
    if not tensors[0].is_cuda or torch.cuda.is_current_stream_capturing():
        launches()
        return
    full_key = (key, tuple((t.data_ptr(), t.dtype) for t in tensors))
    with _lock:
        found = _graphs.get(full_key, 0)
        if isinstance(found, int):
            found += 1
            _graphs[full_key] = found if found <= WORTH else _capture(launches, tensors[0].device)
        _graphs.move_to_end(full_key)
        graph = _graphs[full_key]
        if len(_graphs) > KEPT:
            _graphs.popitem(last=False)
    if isinstance(graph, int):
        launches()
    else:
        graph.replay()


def _capture(launches: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    """Capture on a stream of the device's own. Unlike `torch.cuda.graph` it leaves the allocator's
    cache alone, and with it the addresses."""
    graph = torch.cuda.CUDAGraph()
    stream = _streams.get(device) or _streams.setdefault(device, torch.cuda.Stream(device))
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            launches()
        finally:
            graph.capture_end()
    return graph
