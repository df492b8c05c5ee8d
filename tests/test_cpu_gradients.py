"""A backward pass and its sums in one call of the compiled kernel, beside the ops one by one."""

import itertools

import pytest
import torch
from torch import nn

import torch_manual
from kernel_problems import BUILT, CLASSES, GRIDS, SIZES, error, plain, problem
from torch_manual.functions import lstm_gradients as functions
from torch_manual.functions.lstm_gradients import Primal, lstm_gradients
from torch_manual.kernels import cpu_gradients, cpu_library
from torch_manual.kernels import lstm as ops
from torch_manual.kernels.lstm import by_direction, lstm_forward

pytestmark = pytest.mark.usefixtures("one_thread_and_nan_where_unwritten")

SERVED = [n for n, c in CLASSES.items() if "projection" not in c]


def primal(p):
    y, _, _, gates, cells = lstm_forward(*p[:5], True)
    return Primal(*p[:4], y, gates, cells, p.weights)


def all_of(p):
    return True, True, True, *(w is not None for w in p.weights)


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks of at most 9 rows, so that a batch has many of them."""
    monkeypatch.setattr(cpu_gradients, "chunk_rows", lambda *_: 9)


def gradients(p, needs=None, outer=None, backend="cpu"):
    """Where needed, dx, dh0, dc0 and the weights' gradients; dpre always."""
    with torch_manual.use_backend(backend):
        of = lstm_gradients(needs or all_of(p), p.outer if outer is None else outer, primal(p))
    return *of[:4], *of[5:]


def given(tensors):
    return [t for t in tensors if t is not None]


@pytest.fixture
def one_by_one(monkeypatch):
    return lambda: monkeypatch.setattr(cpu_gradients, "serves", lambda *_: False)


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("instruction_set", BUILT)
def test_agrees_with_plain_torch(instruction_set, name):
    for sizes in SIZES:
        p = problem(*sizes, **CLASSES[name])
        right = given(gradients(p, backend="eager"))
        for grid in GRIDS:
            with cpu_library.override(instruction_set=instruction_set, grid=grid):
                ours = given(gradients(p))
            assert (error(ours, right) <= 1e-11).all(), (sizes, grid, error(ours, right))


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("instruction_set", BUILT)
def test_keeps_dh_for_a_second_derivative(instruction_set, name, short_chunks):
    for sizes in SIZES:
        p = problem(*sizes, **CLASSES[name])
        identity = torch.eye(p.c0.shape[2], dtype=p.x.dtype)  # as a projection: then ops keep dh
        directions = [w._replace(weight_hr=identity) for w in by_direction(p.weights)]
        weights = [t for w in directions for t in w]
        *_, gates, cells = plain(p)[0]
        right = ops._backward(*p.outer, p.c0, p.batch_sizes, weights, gates, cells)[1]
        for grid in GRIDS:
            with cpu_library.override(instruction_set=instruction_set, grid=grid):
                ours = lstm_gradients(all_of(p), p.outer, primal(p))[4]
            assert error([ours], [right]) <= 1e-11, (sizes, grid)


@pytest.mark.parametrize("name", SERVED)
def test_many_chunks_agree_with_one(name, short_chunks):
    test_agrees_with_plain_torch(BUILT[0], name)


@pytest.mark.parametrize("name", [n for n in SERVED if CLASSES[n].get("peepholes") != 2])  # BLAS
def test_one_chunk_is_to_the_bit_what_the_ops_give(name, one_by_one):
    problems = [problem(*sizes, **CLASSES[name]) for sizes in (*SIZES, (70, 5, 3, 9))]
    with cpu_library.override(grid=GRIDS[0]):
        ours = [given(gradients(p)) for p in problems]
        one_by_one()
        right = [given(gradients(p)) for p in problems]
    for a, b in zip(ours, right, strict=True):
        assert all(map(torch.equal, a, b))


@pytest.mark.parametrize("sizes", [(4, 3, 2, 5), (1, 70, 2, 5)])  # a step alone, W_hh is dh0's
@pytest.mark.parametrize("name", ["bidirectional", "packed", "no-bias", "diagonal", "full"])
def test_any_gradient_may_be_missing(name, sizes):
    p = problem(*sizes, **CLASSES[name])
    n = 3 + len(p.weights)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        needs = (torch.rand(n, generator=generator) < 0.5).tolist()
        needs = [a and (k < 3 or p.weights[k - 3] is not None) for k, a in enumerate(needs)]
        outer = [t if torch.rand((), generator=generator) < 0.5 else None for t in p.outer]
        ours, right = gradients(p, needs, outer), gradients(p, needs, outer, "eager")
        assert [t is None for t in ours] == [t is None for t in right], needs
        assert (error(given(ours), given(right)) <= 1e-12).all(), needs


def test_both_biases_have_gradients_of_their_own():
    for needs in itertools.product((False, True), repeat=2):
        p = problem(4, 3, 2, 5)
        all_five = (True,) * 5
        *_, b_ih, b_hh, _, _, _, _ = gradients(p, (*all_five, *needs, *[False] * 4))
        assert [t is not None for t in (b_ih, b_hh)] == [*needs]
        if all(needs):
            assert torch.equal(b_ih, b_hh)
            assert b_ih.data_ptr() != b_hh.data_ptr()


@pytest.mark.parametrize("name", [n for n in CLASSES if n not in SERVED])
def test_leaves_what_it_does_not_serve_to_the_ops(name):
    p = problem(4, 3, 2, 5, **CLASSES[name])
    assert not cpu_gradients.serves(p.x, p.weights)


def test_any_layout():
    p = problem(3, 5, 4, 7)
    expected = given(gradients(p))
    weights = [None if w is None else w.mT.contiguous().mT for w in p.weights[:2]] + p.weights[2:]
    strided = p._replace(
        x=p.x.mT.contiguous().mT,
        weights=weights,
        outer=tuple(t.mT.contiguous().mT for t in p.outer),
    )
    assert all(map(torch.equal, given(gradients(strided)), expected))
    saved = [None if t is None else t.mT.contiguous().mT for t in primal(p)[:7]]
    of_strided = Primal(*saved, p.weights)
    ours = lstm_gradients(all_of(p), p.outer, of_strided)
    assert all(map(torch.equal, given((*ours[:4], *ours[5:])), expected))
    one_row = torch.ones(1, 7, dtype=p.x.dtype)
    outer = one_row.expand(15, 7), None, None, None
    repeated = one_row.repeat(15, 1), None, None, None
    for a, b in zip(
        given(gradients(p, None, outer)), given(gradients(p, None, repeated)), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", CLASSES)
def test_ops_sum_long_batches_in_blocks(name, monkeypatch, one_by_one):
    p = problem(20, 2, 3, 4, **CLASSES[name])
    right = given(gradients(p, backend="eager"))
    one_by_one()
    monkeypatch.setattr(functions, "BLOCK_ROWS", 4)
    assert (error(given(gradients(p)), right) <= 1e-12).all()


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("grid", GRIDS)
def test_recomputed_to_the_bit(name, grid, short_chunks):
    """c kept before some steps only, and gates and cells made again from there."""
    for sizes in (*SIZES, (70, 5, 3, 9), (97, 1, 5, 3)):  # 97: a row left of the chunks of 96
        p = problem(*sizes, **CLASSES[name])
        for steps in (1, 2, 5):
            with cpu_library.override(grid=grid):
                right = lstm_gradients(all_of(p), (*p.outer[:3], None), primal(p), keep_dpre=False)
                y, h_n, c_n, c_kept = cpu_gradients.lstm_forward(*p[:5], steps)
                again = *p[:4], y, None, None, p.weights
                ours = cpu_gradients.lstm_gradients(
                    all_of(p), (*p.outer[:3], None), *again, recompute=steps, c_kept=c_kept
                )
                plain = lstm_forward(*p[:5], True)
            assert all(map(torch.equal, (y, h_n, c_n), plain)), sizes
            assert all(map(torch.equal, given(ours), given(right))), (sizes, steps)


@pytest.mark.parametrize("I", [1, 4])
def test_dx_of_few_inputs_is_as_accurate_as_stocks(I):
    """It is a sum over 4H, which with few inputs stock makes of many short ones."""
    squares = []
    for seed in range(4):
        torch.manual_seed(seed)
        stock = nn.LSTM(I, 128)
        ours, exact = torch_manual.LSTM(I, 128), nn.LSTM(I, 128).double()
        x, dy = torch.randn(50, 13, I), torch.randn(50, 13, 128)
        dxs = []
        for m in (exact, stock, ours):
            m.load_state_dict(stock.state_dict())
            given = x.to(m.weight_hh_l0.dtype).requires_grad_()
            dxs.append(torch.autograd.grad(m(given)[0], given, dy.to(given.dtype))[0])
        squares.append([(dx - dxs[0]).square().mean() for dx in dxs[1:]])
    of_stock, of_ours = torch.tensor(squares).mean(0)
    assert of_ours <= 1.3**2 * of_stock
