"""A barrier over the programs of one grid, all resident at once (a cooperative launch)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

SPIN_LIMIT = tl.constexpr(1 << 24)  # some seconds: a barrier that never opens becomes an error flag


@triton.jit
def grid_barrier(arrived_ptr, expected, error_ptr):
    """Wait until `expected` programs have added 1; what they stored before is visible after.

    Only the first thread's atomics order memory across the device; the two block barriers extend
    that to all threads. After SPIN_LIMIT polls error becomes 1 and the program goes on.
    """
    tl.debug_barrier()
    tl.atomic_add(arrived_ptr, 1, sem="release", scope="gpu")
    spins = 0
    while (tl.atomic_add(arrived_ptr, 0, sem="acquire", scope="gpu") < expected) & (
        spins < SPIN_LIMIT
    ):
        spins += 1
    if spins >= SPIN_LIMIT:
        tl.store(error_ptr, 1)
    tl.debug_barrier()


def barrier(grid: tuple[int, int, int], device: torch.device) -> Tensor:
    """An error flag, and one counter for the programs of axis 0 that wait for each other."""
    return torch.zeros(1 + grid[1] * grid[2], dtype=torch.int32, device=device)


def check(barrier: Tensor) -> None:
    """Fail, on the device and without waiting for it, if the error flag is set."""
    torch._assert_async(barrier[0] == 0, "lstm: the programs of a persistent kernel did not meet")
