"""gradcheck finds planted mistakes, names the gate and the kind, and passes what is right."""

import copy
import dataclasses
import random

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from torch_manual._table import render
from torch_manual.gradcheck import GradcheckReport, gradcheck

T, B, I, H = 3, 2, 3, 4
GATES = {"i": 0, "f": 1, "g": 2, "o": 3}


class PlantedLSTM(torch.autograd.Function):
    """A peephole LSTM in a few lines, right unless a mistake is planted in its backward."""

    @staticmethod
    def forward(ctx, mistake, x, w_ih, w_hh, bias, w_ci, w_cf, w_co):
        h = c = x.new_zeros(x.shape[1], w_co.shape[0])
        steps, hs = [], []
        for x_t in x:
            c_prev, h_prev = c, h
            i, f, g, o = (x_t @ w_ih.T + h @ w_hh.T + bias).chunk(4, dim=1)
            i, f, g = torch.sigmoid(i + c * w_ci), torch.sigmoid(f + c * w_cf), torch.tanh(g)
            c = f * c + i * g
            o = torch.sigmoid(o + c * w_co)
            h = o * torch.tanh(c)
            steps.append((x_t, h_prev, c_prev, c, i, f, g, o))
            hs.append(h)
        ctx.mistake, ctx.steps = mistake, steps
        ctx.weights = w_ih, w_hh, bias, w_ci, w_cf, w_co
        return torch.stack(hs), c

    @staticmethod
    def backward(ctx, dy, dc):
        w_ih, w_hh, _, w_ci, w_cf, w_co = ctx.weights
        dw_ih, dw_hh, db, dw_ci, dw_cf, dw_co = (torch.zeros_like(w) for w in ctx.weights)
        dh, dx = 0, []
        for dy_t, (x_t, h_prev, c_prev, c, i, f, g, o) in zip(
            dy.flip(0), ctx.steps[::-1], strict=True
        ):
            dh = dh + dy_t
            dpre_o = dh * c.tanh() * o * (1 - o)
            dc = dc + dh * o * (1 - c.tanh() ** 2)
            if ctx.mistake != "peephole term":
                dc = dc + dpre_o * w_co
            dpre_i, dpre_f = dc * g * i * (1 - i), dc * c_prev * f * (1 - f)
            dpre_g = dc * i * (1 - g**2)
            dpre = torch.cat([dpre_i, dpre_f, dpre_g, dpre_o], dim=1)
            dc = dc * f + dpre_i * w_ci + dpre_f * w_cf
            dh = dpre @ w_hh
            dx.append(dpre @ w_ih)
            dw_ih += dpre.T @ x_t
            dw_hh += dpre.T @ h_prev
            db += dpre[-1] if ctx.mistake == "no batch sum" else dpre.sum(0)
            dw_ci += (dpre_i * c_prev).sum(0)
            dw_cf += (dpre_f * c_prev).sum(0)
            dw_co += (dpre_o * c).sum(0)
        i, f, g, _ = (slice(k * H, (k + 1) * H) for k in range(4))
        match ctx.mistake:
            case "sign":
                dw_hh[f] *= -1
            case "transposed":
                dw_hh[g] = dw_hh[g].T.clone()
            case "batch mean":
                dw_ih /= B
            case "small":
                dw_ih[i] *= 1 + 1e-4
            case "swapped":
                db[i], db[f] = db[f].clone(), db[i].clone()
            case "nan":
                dw_hh[i][0, 0] = float("nan")
            case "none":
                dw_cf = None
            case "shape":
                dw_ih = dw_ih.T
            case "too few":
                return None, torch.stack(dx[::-1])
        return None, torch.stack(dx[::-1]), dw_ih, dw_hh, db, dw_ci, dw_cf, dw_co


class Planted(nn.Module):
    def __init__(self, mistake=""):
        super().__init__()
        self.mistake, self.hidden_size = mistake, H
        gen = torch.Generator().manual_seed(0)
        shapes = {
            "weight_ih_l0": (4 * H, I),
            "weight_hh_l0": (4 * H, H),
            "bias_ih_l0": (4 * H,),
            **{f"weight_c{gate}_l0": (H,) for gate in "ifo"},
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=gen)))

    def forward(self, input):
        return PlantedLSTM.apply(self.mistake, input, *self.parameters())


def x(seed=0):
    return torch.randn(T, B, I, generator=torch.Generator().manual_seed(seed))


def wrong_rows(report):
    return {row.name for row in report.rows if not row.ok}


def every_gate(*tensors, gates="ifgo"):
    return {f"{tensor}[{gate}]" for tensor in tensors for gate in gates}


def test_unbroken_lstm_passes():
    report = gradcheck(Planted(), x())
    assert report
    assert report.ok
    assert report.diagnosis == ()
    assert [row.name for row in report.rows][:3] == ["input", "weight_ih_l0[i]", "weight_ih_l0[f]"]
    assert all(row.checked == row.elements for row in report.rows)
    assert sum(row.elements for row in report.rows) == T * B * I + 4 * H * (I + H + 1) + 3 * H


@pytest.mark.parametrize(
    ("mistake", "rows", "line"),
    [
        (
            "sign",
            {"weight_hh_l0[f]"},
            "weight_hh_l0: the rows of gate f are wrong (sign flipped?)",
        ),
        (
            "transposed",
            {"weight_hh_l0[g]"},
            "weight_hh_l0: the rows of gate g are wrong (transposed?)",
        ),
        (
            "no batch sum",
            every_gate("bias_ih_l0"),
            "bias_ih_l0: the rows of gate i are wrong (largest error at [",
        ),
        (
            "batch mean",
            every_gate("weight_ih_l0"),
            "weight_ih_l0: the rows of gates i, f, g, o are wrong (numeric = 2 × analytic: ",
        ),
        (
            "small",
            {"weight_ih_l0[i]"},
            "weight_ih_l0: the rows of gate i are wrong (numeric = 0.9999 × analytic",
        ),
        (
            "swapped",
            every_gate("bias_ih_l0", gates="if"),
            "bias_ih_l0: the rows of gate i are wrong (it holds the gradient of gate f?)",
        ),
        (
            "nan",
            {"weight_hh_l0[i]"},
            "weight_hh_l0: the rows of gate i are wrong (NaN or infinite)",
        ),
        (
            "none",
            {"weight_cf_l0"},
            "weight_cf_l0: the gradient is wrong (missing: all zeros)",
        ),
        (
            "shape",
            every_gate("weight_ih_l0"),
            "weight_ih_l0: the rows of gates i, f, g, o are wrong (backward raised RuntimeError: "
            "Function PlantedLSTMBackward returned an invalid gradient at index 1 - got [3, 16]",
        ),
    ],
)
def test_planted_mistake_is_found_where_it_is(mistake, rows, line):
    report = gradcheck(Planted(mistake), x())
    assert not report
    assert wrong_rows(report) == rows
    assert any(found.startswith(line) for found in report.diagnosis), report.diagnosis
    assert line in str(report)
    assert "FAIL" in str(report)


def test_missing_peephole_term_spoils_what_flows_through_the_cell():
    wrong = wrong_rows(gradcheck(Planted("peephole term"), x()))
    assert every_gate("weight_hh_l0", "weight_ih_l0", "bias_ih_l0", gates="ifg") < wrong
    assert {"input", "weight_ci_l0", "weight_cf_l0"} < wrong


def test_backward_that_always_raises_fails_every_row():
    report = gradcheck(Planted("too few"), x())
    assert not any(row.ok for row in report.rows)
    assert all("returned an incorrect number of gradients" in line for line in report.diagnosis)


def test_gradient_wrong_only_for_one_output_alone_is_found():
    class NoneHandledWrongly(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.set_materialize_grads(False)
            return 2 * x, 3 * x

        @staticmethod
        def backward(ctx, da, db):
            return None if da is None or db is None else 2 * da + 3 * db

    report = gradcheck(NoneHandledWrongly.apply, torch.randn(3))
    assert not report


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda dw: -dw, "sign flipped?"),
        (lambda dw: dw.T.reshape(dw.shape), "transposed?"),
        (lambda dw: 3 * dw, "numeric = 0.333333 × analytic"),
        (lambda dw: dw + 1e-4 * dw.abs().max(), "largest error at"),
        (torch.zeros_like, "missing: all zeros"),
    ],
)
@pytest.mark.parametrize("samples", [5, None])
def test_kinds_of_mistake_in_a_plain_function(wrong, reason, samples):
    class Matmul(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x @ w

        @staticmethod
        def backward(ctx, dy):
            x, w = ctx.saved_tensors
            return dy @ w.T, wrong(x.T @ dy)

    def product(x, w):
        return Matmul.apply(x, w)

    report = gradcheck(product, (torch.randn(4, 3), torch.randn(3, 5)), samples=samples)
    assert wrong_rows(report) == {"w"}
    assert report.diagnosis[0].startswith(f"w: the gradient is wrong ({reason}")
    assert report.rows[1].checked == (samples or 15)


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (nn.LSTM(2, 3, 2, bidirectional=True), torch.randn(3, 2, 2)),
        (nn.LSTM(2, 8, proj_size=3), torch.randn(5, 2, 2)),
        (nn.LSTM(2, 3), pack_sequence([torch.randn(3, 2), torch.randn(1, 2)])),
        (nn.GRU(2, 3), (torch.randn(4, 2, 2), torch.randn(1, 2, 3))),
        (nn.GRUCell(2, 3), torch.randn(2, 2)),
        (nn.RNN(2, 3), torch.randn(4, 2, 2)),
        (nn.Embedding(5, 2, sparse=True), torch.tensor([[1, 1, 4]])),
        (
            nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.GELU()),
            torch.randn(4, 3),
        ),
        (nn.Linear(3, 2), torch.randn(0, 3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_stock_layers_pass(module, inputs):
    report = gradcheck(module, inputs, samples=12)
    assert report, report


def test_gates_and_nested_inputs_are_named():
    hx = torch.randn(1, 2, 3), torch.randn(1, 2, 3)
    packed = pack_sequence([torch.randn(2, 2), torch.randn(1, 2)])
    names = [row.name for row in gradcheck(nn.LSTM(2, 3), (packed, hx), samples=1).rows]
    assert names[:4] == ["input.data", "hx[0]", "hx[1]", "weight_ih_l0[i]"]
    assert names[-1] == "bias_hh_l0[o]"
    gru = nn.Sequential(nn.GRU(2, 3))
    names = [row.name for row in gradcheck(gru, torch.randn(3, 1, 2), samples=1).rows]
    assert names[1:4] == ["0.weight_ih_l0[r]", "0.weight_ih_l0[z]", "0.weight_ih_l0[n]"]


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6, 1e12])
def test_inputs_of_any_size(size):
    """The step grows with a number, or rounding would leave nothing of it."""
    report = gradcheck(torch.square, size * torch.tensor([1.0, 2.0]))
    assert report.ok, report


def test_gates_can_be_given():
    linear = nn.Linear(3, 6)
    rows = gradcheck(linear, torch.randn(2, 3), gates={"weight": ("a", "b", "c")}, samples=4).rows
    assert [(row.name, row.shape, row.checked) for row in rows] == [
        ("input", (2, 3), 4),
        ("weight[a]", (2, 3), 4),
        ("weight[b]", (2, 3), 4),
        ("weight[c]", (2, 3), 4),
        ("bias", (6,), 4),
    ]


def test_frozen_parameters_are_left_out():
    linear = nn.Linear(3, 2)
    linear.bias.requires_grad_(False)
    assert [row.name for row in gradcheck(linear, torch.randn(2, 3)).rows] == ["input", "weight"]


def test_nothing_of_the_user_changes():
    module = nn.Sequential(nn.Linear(3, 2), nn.Dropout(), nn.BatchNorm1d(2))
    module[1].eval()
    module(torch.randn(4, 3)).sum().backward()
    inputs = torch.randn(4, 3, requires_grad=True)
    inputs.grad = torch.ones(4, 3)
    tensors = [*module.parameters(), inputs]
    before, grads = copy.deepcopy((module, tensors)), [x.grad.clone() for x in tensors]
    rng = torch.get_rng_state(), random.getstate()
    gradcheck(module, inputs)
    assert torch.equal(torch.get_rng_state(), rng[0])
    assert random.getstate() == rng[1]
    assert [m.training for m in module.modules()] == [m.training for m in before[0].modules()]
    for now, then, grad in zip(tensors, before[1], grads, strict=True):
        assert now.dtype == torch.float32
        assert now.requires_grad
        assert torch.equal(now, then)
        assert torch.equal(now.grad, grad)
    for now, then in zip(module.buffers(), before[0].buffers(), strict=True):
        assert torch.equal(now, then)
        assert now.dtype == then.dtype


def test_same_seed_same_report():
    module, inputs = nn.Linear(20, 30), torch.randn(4, 20)
    assert gradcheck(module, inputs, seed=3) == gradcheck(module, inputs, seed=3)


@pytest.mark.parametrize(
    ("fn", "inputs", "error", "message"),
    [
        (3, torch.ones(2), TypeError, "fn must be a module or a function, got int"),
        (torch.sin, 3.0, TypeError, "inputs must be a tensor.*got float"),
        (torch.sin, torch.ones(2, dtype=torch.cfloat), TypeError, "must be real"),
        (torch.neg, torch.arange(3), ValueError, "floating-point input or a parameter .* neither"),
        (torch.argmax, torch.ones(3), ValueError, "must return a floating-point tensor"),
        (lambda x: x + random.random(), torch.ones(2), ValueError, "must be deterministic"),
        (lambda x: x.float(), torch.ones(2), ValueError, "compute in float64, got torch.float32"),
        (lambda x: x.float().sin().double(), torch.ones(2), ValueError, "its results are float32"),
        (lambda x: x @ torch.ones(2, 2), torch.ones(2, 2), ValueError, "in float64; it raised: "),
    ],
)
def test_what_cannot_be_checked_is_refused(fn, inputs, error, message):
    with pytest.raises(error, match=f"gradcheck: .*{message}"):
        gradcheck(fn, inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0}, "eps must be positive, got 0"),
        ({"rtol": -1}, "atol and rtol must not be negative, got 1e-08 and -1"),
        ({"samples": 2.5}, "samples must be None or an int of at least 1, got 2.5"),
        ({"samples": 0}, "samples must be None or an int of at least 1, got 0"),
        ({"gates": {"w": "ab"}}, r"gates must name checked tensors \(input, weight, bias\), got w"),
        ({"gates": {"bias": "ifgo"}}, r"gates\['bias'\] must be different names that divide the 6"),
        ({"gates": {"bias": "aa"}}, r"gates\['bias'\] must be different names that divide the 6"),
    ],
)
def test_bad_options_raise(options, message):
    with pytest.raises(ValueError, match=f"gradcheck: {message}"):
        gradcheck(nn.Linear(3, 6), torch.ones(2, 3), **options)


def test_report_is_frozen_and_prints_plainly(capsys):
    report = gradcheck(nn.Linear(2, 1), torch.randn(3, 2))
    assert isinstance(report, GradcheckReport)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.subject = "another"
    print(report)
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "gradcheck of Linear" in text
    assert "3 of 3 rows pass, 9 of 9 elements checked" in text


def test_table_keeps_brackets_with_and_without_rich(monkeypatch):
    rows = [["weight_hh_l0[red]", ":x:"], ["h", "2"]]
    drawn = render("title [b]", ["name", "value"], rows)
    assert "weight_hh_l0[red]   :x:" in drawn
    assert "title [b]" in drawn
    monkeypatch.setitem(__import__("sys").modules, "rich", None)
    assert render("title", ["a", "b"], rows) == "title\na\tb\nweight_hh_l0[red]\t:x:\nh\t2"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_checks_without_grad_mode_as_with_it(mode):
    with mode():
        assert gradcheck(nn.LSTM(2, 2), torch.randn(2, 2, 2)).ok
