"""The sums over time in the compiled kernel (B10 to B13, B15), beside plain torch in float64."""

import itertools

import pytest
import torch

from kernel_problems import BUILT, error
from torch_manual.kernels import cpu_library, lstm_sums
from torch_manual.kernels.cpu_library import Grid

pytestmark = pytest.mark.usefixtures("one_thread_and_nan_where_unwritten")

THREADS = (Grid(), Grid(1, 1, 2), Grid(1, 1, 5))
# N, H, I, P: sums of one term, of one chunk, of several; tiles and vectors full and not
SIZES = (
    (1, 1, 1, 1),
    (5, 7, 17, 2),
    (13, 33, 5, 33),
    (128, 4, 31, 16),
    (129, 17, 64, 7),
    (300, 100, 33, 100),
)
LARGE_WEIGHT = (30, 263, 521, 5)  # whose next panel is prefetched


def draw(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


@pytest.mark.parametrize("instruction_set", BUILT)
def test_weight_sums(instruction_set):
    for (N, H, I, P), samples in itertools.product(SIZES, (None, 1, 3)):
        rows = N * (samples or 1)
        dpre, x, h_prev = draw((rows, 4 * H), (rows, I), (rows, P))
        right = lstm_sums._weight_sums(dpre, x, h_prev, True, samples)
        for grid in THREADS:
            with cpu_library.override(instruction_set=instruction_set, grid=grid):
                ours = lstm_sums.lstm_weight_sums(dpre, x, h_prev, True, samples)
            assert [t.shape for t in ours] == [t.shape for t in right]
            assert (error(ours, right) <= 1e-12 * N**0.5).all(), (N, H, I, P, samples, grid)


@pytest.mark.parametrize("instruction_set", BUILT)
def test_input_sums(instruction_set):
    for (N, H, I, _), D in itertools.product((*SIZES, LARGE_WEIGHT), (1, 2)):
        dpre, weights = draw((D, N, 4 * H), (D, 4 * H, I))
        right = lstm_sums._input_sums(dpre, weights)
        for grid in THREADS:
            with cpu_library.override(instruction_set=instruction_set, grid=grid):
                ours = lstm_sums.lstm_input_sums([*dpre], [*weights])
            assert (error([ours], [right]) <= 1e-12 * H**0.5).all(), (N, H, I, D, grid)


@pytest.mark.parametrize("instruction_set", BUILT)
def test_sums_of_diagonal_peepholes(instruction_set):
    for N, H, _, _ in SIZES:
        dpre, c_prev, c = draw((N, 4 * H), (N, H), (N, H))
        i, f, _, o = dpre.chunk(4, 1)
        right = [(i * c_prev).sum(0), (f * c_prev).sum(0), (o * c).sum(0)]
        for grid in THREADS:
            with cpu_library.override(instruction_set=instruction_set, grid=grid):
                ours = lstm_sums.lstm_peephole_sums(dpre, c_prev, c)
            assert (error(ours, right) <= 1e-12 * N**0.5).all(), (N, H, grid)
        single = lstm_sums.lstm_peephole_sums(dpre.float(), c_prev.float(), c.float())
        assert (error(single, right) <= 1e-5 * N**0.5).all(), (N, H)


@pytest.mark.parametrize("instruction_set", BUILT)
def test_float32_is_as_accurate_as_blas(instruction_set):
    for N, H, I, P in SIZES:
        wide = draw((N, 4 * H), (N, I), (N, P), (4 * H, I))
        dpre, x, h_prev, weight = (t.float() for t in wide)
        right = [*lstm_sums._weight_sums(*wide[:3], True), wide[0] @ wide[3]]
        blas = [*lstm_sums._weight_sums(dpre, x, h_prev, True), dpre @ weight]
        with cpu_library.override(instruction_set=instruction_set):
            ours = [
                *lstm_sums.lstm_weight_sums(dpre, x, h_prev, True),
                lstm_sums.lstm_input_sums([dpre], [weight]),
            ]
        assert (error(ours, right) <= 2 * error(blas, right) + 1e-6).all(), (N, H, I, P)


@pytest.mark.parametrize(("x", "h_prev", "bias"), [*itertools.product((True, False), repeat=3)])
def test_what_is_not_asked_for_is_empty(x, h_prev, bias):
    dpre, x_rows, h_rows = draw((9, 12), (9, 5), (9, 3))
    given = (dpre, x_rows if x else None, h_rows if h_prev else None, bias)
    ours, right = lstm_sums.lstm_weight_sums(*given), lstm_sums._weight_sums(*given)
    assert [t.shape for t in ours] == [t.shape for t in right]
    assert (error(ours, right) <= 1e-13).all()


def test_layout_and_emptiness():
    dpre, x, weight = draw((12, 9), (5, 9), (5, 12))
    dw, _, _ = lstm_sums.lstm_weight_sums(dpre.mT, x.mT, None, False)
    torch.testing.assert_close(dw, dpre @ x.mT)
    torch.testing.assert_close(
        lstm_sums.lstm_input_sums([dpre.mT], [weight.mT]), (weight @ dpre).mT
    )
    nothing = lstm_sums.lstm_weight_sums(dpre.new_empty(0, 12), x.new_empty(0, 5), None, True)
    assert [t.abs().sum().item() for t in nothing] == [0, 0, 0]
    assert lstm_sums.lstm_input_sums([dpre.new_empty(0, 12)], [dpre.new_empty(12, 5)]).shape == (
        0,
        5,
    )
