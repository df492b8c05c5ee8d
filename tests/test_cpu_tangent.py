"""The tangent of the recurrences in the compiled kernel, beside the plain-torch ops in float64.

Those are themselves checked against finite differences and autograd in test_transforms.py.
"""

import itertools

import pytest
import torch

import torch_manual
from kernel_problems import BUILT, CLASSES, GRIDS, SIZES, error, plain, problem
from torch_manual.kernels import cpu_library, lstm_tangent

pytestmark = pytest.mark.usefixtures("one_thread_and_nan_where_unwritten")


def tangents(p, given, backend):
    """Both ops' results.

    Args:
        given: bit k is 1 if k is given, of the tangents of x, h0, c0 and the weights, the gradients
            from outside, and their tangents.
    """
    forward, backward = plain(p)
    y, _, _, gates, cells = forward
    dpre, dh = backward[:2]
    generator = torch.Generator().manual_seed(1)

    def draw(t, bit):
        if t is None or not given >> bit & 1:
            return None
        return torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)

    tx, th0, tc0 = (draw(t, k) for k, t in enumerate(p[:3]))
    tweights = [draw(w, 3) for w in p.weights]
    outer = [t if given >> 4 & 1 else None for t in p.outer]
    touter = [draw(t, 5) for t in p.outer]
    with torch_manual.use_backend(backend):
        first = lstm_tangent.lstm_tangent(tx, th0, tc0, tweights, *p[:5], y, gates, cells)
        tgates, tcells = first[3:]
        second = lstm_tangent.lstm_backward_tangent(
            outer, touter, dpre, dh, p.c0, tc0, *p[3:5], tweights, gates, cells, tgates, tcells
        )
    return [*first, *second]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("instruction_set", BUILT)
def test_agrees_with_plain_torch(instruction_set, name):
    for sizes in SIZES:
        p = problem(*sizes, **CLASSES[name])
        right = tangents(p, 63, "eager")
        for grid in GRIDS:
            with cpu_library.override(instruction_set=instruction_set, grid=grid):
                ours = tangents(p, 63, "cpu")
            assert (error(ours, right) <= 1e-11).all(), (sizes, grid, error(ours, right))


@pytest.mark.parametrize("I", [2, 0])
@pytest.mark.parametrize("name", CLASSES)
def test_any_tangent_may_be_missing(name, I):
    p = problem(4, 3, I, 5, **CLASSES[name])
    for given in range(64):
        right, ours = tangents(p, given, "eager"), tangents(p, given, "cpu")
        assert (error(ours, right) <= 1e-12).all(), given


@pytest.mark.parametrize("instruction_set", BUILT)
def test_float32_is_as_accurate_as_plain_torch(instruction_set):
    for sizes, name in itertools.product(SIZES, CLASSES):
        p = problem(*sizes, **CLASSES[name])
        right, single = tangents(p, 63, "eager"), p.to(torch.float32)
        bound = 3 * error(tangents(single, 63, "eager"), right) + 2e-6
        with cpu_library.override(instruction_set=instruction_set):
            assert (error(tangents(single, 63, "cpu"), right) <= bound).all(), (sizes, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(dtype):
    p = problem(5, 4, 3, 17, D=2, packed=True).to(dtype)
    for a, b in zip(tangents(p, 63, "cpu"), tangents(p, 63, "eager"), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=2e-3)


def test_empty_batch():
    p = problem(3, 0, 2, 4)
    assert [t.shape for t in tangents(p, 63, "cpu")] == [t.shape for t in tangents(p, 63, "eager")]
