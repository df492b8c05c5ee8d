"""A pass and its tangent in one call of the compiled kernel, beside the two plain-torch ops."""

import itertools

import pytest
import torch

import torch_manual
from kernel_problems import BUILT, CLASSES, GRIDS, SIZES, error, problem
from torch_manual.kernels import cpu_library
from torch_manual.kernels.lstm_dual import lstm_dual

pytestmark = pytest.mark.usefixtures("one_thread_and_nan_where_unwritten")


def dual(p, given, backend, return_cells=True):
    """Outputs and their tangents.

    Args:
        given: bit k is 1 if the tangent of k is given, of x, h0, c0, then of the weights
            weight_ih, weight_hh and all others.
    """
    generator = torch.Generator().manual_seed(1)

    def draw(t, bit):
        if t is None or not given >> bit & 1:
            return None
        return torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)

    states = [draw(t, k) for k, t in enumerate(p[:3])]
    tweights = [draw(w, 3 + min(k % 8, 2)) for k, w in enumerate(p.weights)]
    with torch_manual.use_backend(backend):
        out, tout = lstm_dual(*states, tweights, *p[:5], return_cells)
    return [*out, *tout]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("instruction_set", BUILT)
def test_agrees_with_plain_torch(instruction_set, name):
    for sizes in SIZES:
        p = problem(*sizes, **CLASSES[name])
        right = dual(p, 63, "eager")
        for grid in GRIDS:
            with cpu_library.override(instruction_set=instruction_set, grid=grid):
                ours = dual(p, 63, "cpu")
            assert (error(ours, right) <= 1e-11).all(), (sizes, grid, error(ours, right))


@pytest.mark.parametrize("name", CLASSES)
def test_any_tangent_may_be_missing(name):
    p = problem(4, 3, 2, 5, **CLASSES[name])
    for given in range(64):
        right, ours = dual(p, given, "eager"), dual(p, given, "cpu")
        assert (error(ours, right) <= 1e-12).all(), given


def test_many_rows_go_through_in_chunks():
    for D, packed in itertools.product((1, 2), (False, True)):
        p = problem(90, 7, 3, 20, D=D, packed=packed)
        for given in (1, 8, 63):
            right = dual(p, given, "eager")
            for grid in GRIDS:
                with cpu_library.override(grid=grid):
                    assert (error(dual(p, given, "cpu"), right) <= 1e-10).all(), (D, given, grid)


def test_without_cells():
    p = problem(3, 5, 4, 7, D=2)
    y, h_n, c_n, _, ty, th_n, tc_n, _ = dual(p, 63, "cpu")
    expected = y, h_n, c_n, ty, th_n, tc_n
    assert all(map(torch.equal, dual(p, 63, "cpu", return_cells=False), expected))


@pytest.mark.parametrize("instruction_set", BUILT)
def test_float32_is_as_accurate_as_plain_torch(instruction_set):
    for sizes, name in itertools.product(SIZES, CLASSES):
        p = problem(*sizes, **CLASSES[name])
        right, single = dual(p, 63, "eager"), p.to(torch.float32)
        bound = 3 * error(dual(single, 63, "eager"), right) + 2e-6
        with cpu_library.override(instruction_set=instruction_set):
            assert (error(dual(single, 63, "cpu"), right) <= bound).all(), (sizes, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(dtype):
    p = problem(5, 4, 3, 17, D=2, packed=True).to(dtype)
    for a, b in zip(dual(p, 63, "cpu"), dual(p, 63, "eager"), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=2e-3)


def test_any_layout():
    p = problem(3, 5, 4, 7)
    strided = p._replace(x=p.x.T.contiguous().T, weights=[*p.weights])
    strided.weights[1] = p.weights[1].T.contiguous().T
    for a, b in zip(dual(p, 63, "cpu"), dual(strided, 63, "cpu"), strict=True):
        assert torch.equal(a, b)


def test_empty_batch():
    p = problem(3, 0, 2, 4)
    assert [t.shape for t in dual(p, 63, "cpu")] == [t.shape for t in dual(p, 63, "eager")]
