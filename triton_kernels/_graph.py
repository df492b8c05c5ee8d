"""Many small launches as one CUDA graph."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

KEPT = 64  # graphs; the one used longest ago is dropped first

_graphs: OrderedDict[Hashable, torch.cuda.CUDAGraph | None] = OrderedDict()


def replay(launches: Callable[[], object], tensors: Sequence[Tensor], key: Hashable) -> None:
    """Do what `launches` does, by a CUDA graph from the second time on.

    A graph holds addresses. A training loop gets the same ones from the caching allocator again and
    again, so they are part of the key, and a graph is replayed only where every tensor stands where
    it stood; nothing is copied and nothing is kept alive. The first call with a key launches one by
    one (and compiles), the second captures. On a CPU, and inside a capture, it is plain launches.

    Args:
        launches: starts kernels on the current stream; it must not allocate.
        tensors: everything the kernels read and write.
        key: the values of their other arguments.
    """
    if not tensors[0].is_cuda or torch.cuda.is_current_stream_capturing():
        launches()
        return
    full_key = (key, tuple((t.data_ptr(), t.dtype) for t in tensors))
    if full_key not in _graphs:
        launches()
        _graphs[full_key] = None
    else:
        graph = _graphs[full_key]
        if graph is None:
            graph = _graphs[full_key] = _capture(launches)
        graph.replay()
    _graphs.move_to_end(full_key)
    if len(_graphs) > KEPT:
        _graphs.popitem(last=False)


def _capture(launches: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        launches()
    return graph
