import pytest
import torch


@pytest.fixture
def one_thread_and_nan_where_unwritten():
    """Plain torch ops on one thread, for speed; and torch.empty filled with NaN."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
