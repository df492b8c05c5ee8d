"""The ops under torch.library's own checks: schema, fake implementation, no hidden autograd."""

import pytest
import torch

import torch_manual
from cases import SAMPLES
from torch_manual.kernels import cpu_gradients
from torch_manual.kernels.lstm import by_direction
from torch_manual.kernels.rows import previous, steps

ops = torch.ops.torch_manual


def op_arguments(sample, dtype, peephole):
    """(x, h0, c0, batch_sizes, weights) of the first layer of a sample."""
    module = torch_manual.PeepholeLSTM(
        sample.I, sample.H, peephole=peephole, dtype=dtype, **sample.kwargs
    ).requires_grad_(False)
    x, h0, c0 = (t.detach() for t in sample.inputs(dtype))
    batch_sizes = None
    rows = x.reshape(-1, sample.I)
    if sample.lengths is not None:
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, sample.lengths, enforce_sorted=False)
        rows, batch_sizes = packed.data, packed.batch_sizes
    weights = [t for w in module._weights(slice(0, sample.D)) for t in w]
    return rows, h0[: sample.D], c0[: sample.D], batch_sizes, weights


@pytest.mark.parametrize("peephole", ["diagonal", "full"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.id)
def test_opcheck(sample, dtype, peephole):
    args = op_arguments(sample, dtype, peephole)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.lstm_forward.default, (*args, False), test_utils=checks)
    torch.library.opcheck(ops.lstm_forward.default, (*args, True), test_utils=checks)
    x, h0, c0, batch_sizes, weights = args
    y, h_n, c_n, gates, cells = ops.lstm_forward(*args, True)
    saved = (c0, batch_sizes, weights, gates, cells)
    for outer in ((y, h_n, c_n, cells), (y, None, None, None), (None, None, c_n, None)):
        torch.library.opcheck(ops.lstm_backward.default, (*outer, *saved), test_utils=checks)
    primal = x, h0, c0, batch_sizes, y, gates, cells
    present = [t is not None for t in (x, h0, c0, *weights)]
    for needs in (present, [k % 2 == 0 and given for k, given in enumerate(present)]):
        given = needs, y, h_n, c_n, cells, *primal, weights
        torch.library.opcheck(ops.lstm_gradients.default, given, test_utils=checks)
    for by_kernel in {cpu_gradients.does(x, weights), False}:
        given = *args, 2, by_kernel
        torch.library.opcheck(ops.lstm_recompute.default, given, test_utils=checks)
        y, _, _, c_starts = ops.lstm_recompute(*given)
        given = present, y, h_n, None, x, h0, c0, batch_sizes, y, c_starts, weights, 2, by_kernel
        torch.library.opcheck(ops.lstm_recompute_gradients.default, given, test_utils=checks)
    dpre, h_prev = gates[0], previous(y[:, : h0.shape[2]], h0[0], batch_sizes)
    for given in ((x, h_prev, True), (None, h_prev, False), (x, None, True)):
        torch.library.opcheck(ops.lstm_weight_sums.default, (dpre, *given), test_utils=checks)
    weights_ih = [w.weight_ih for w in by_direction(weights)]
    sums = [*gates], weights_ih
    torch.library.opcheck(ops.lstm_input_sums.default, sums, test_utils=checks)


@pytest.mark.parametrize("reverse", [False, True])
def test_previous(reverse):
    """Against a walk along every sequence."""
    lengths = [5, 3, 3, 1]
    batch_sizes = torch.tensor([4, 3, 3, 1, 1])
    rows, initial = torch.randn(12, 2), torch.randn(4, 2)
    order = steps(12, 4, batch_sizes)
    delayed = previous(rows, initial, batch_sizes, reverse)
    seen = 0
    for b, n in enumerate(lengths):
        state = initial[b]
        for t in reversed(range(n)) if reverse else range(n):
            assert torch.equal(delayed[order[t].start + b], state)
            state = rows[order[t].start + b]
            seen += 1
    assert seen == 12
    dense = previous(rows, initial, None, reverse).view(3, 4, 2)
    expected = [initial, *rows.view(3, 4, 2)][:3]
    if reverse:
        expected = [*rows.view(3, 4, 2), initial][1:]
    assert torch.equal(dense, torch.stack(expected))
