"""What every kernel is made of: activations that are stable everywhere, and gates side by side."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    NEAR: tl.constexpr = 0.05 if x.dtype == tl.float64 else 0.25
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)  # at most 1: nothing overflows
    t = (1.0 - e) / (1.0 + e)
    s = x * x  # near 0, where 1 - e has few digits left, the series
    series = 62.0 / 2835 - 1382.0 / 155925 * s
    series = -1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * series))
    return tl.where(size < NEAR, x + x * (s * series), tl.where(x < 0, -t, t))


@triton.jit
def split_gates(pre):
    """(M, 4N) with column 4·n + gate → four (M, N).

    One product of four times the width, then split, keeps every warp on columns of its own; four
    products side by side would have them repeat each other's work.
    """
    M: tl.constexpr = pre.shape[0]
    N: tl.constexpr = pre.shape[1] // 4
    even, odd = tl.split(tl.reshape(pre, (M, N, 2, 2)))
    i, g = tl.split(even)
    f, o = tl.split(odd)
    return i, f, g, o


@triton.jit
def join_gates(i, f, g, o):
    """Four (M, N) → (M, 4N) with column 4·n + gate: the reverse of `split_gates`."""
    M: tl.constexpr = i.shape[0]
    N: tl.constexpr = i.shape[1]
    return tl.reshape(tl.join(tl.join(i, g), tl.join(f, o)), (M, 4 * N))


@triton.jit
def step_rows(starts_ptr, t):
    """The first row of step t and how many sequences are alive in it; (0, 0) for t = -1 or T.

    starts (T + 3,) int64: an empty step, the T steps, and an empty one again.
    """
    start = tl.load(starts_ptr + t + 1)
    return start, tl.load(starts_ptr + t + 2) - start
