"""`restore`, then `torch.onnx.export`: onnxruntime computes what our modules compute."""

import io

import onnxruntime
import pytest
import torch
from torch import nn

import torch_manual

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def onnx_session(model, inputs, dynamic_axes):
    """Export for any length and batch. (`dynamo=True` fixes the length in an LSTM's graph.)"""
    file = io.BytesIO()
    names = list(dynamic_axes)
    torch.onnx.export(
        model, inputs, file, dynamo=False, input_names=names, dynamic_axes=dynamic_axes
    )
    return onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])


def expect_equal(session, model, inputs):
    got = session.run(None, {k: v.numpy() for k, v in inputs.items()})
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(model(*inputs.values()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b, rtol=1e-5, atol=1e-6)


class Tagger(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.lstm = torch_manual.LSTM(3, 5, **kwargs)
        self.head = nn.Linear(10 if self.lstm.bidirectional else 5, 2)

    def forward(self, x):
        y, states = self.lstm(x)
        return self.head(y), states


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_layers": 2, "bidirectional": True, "dropout": 0.5},
        {"bias": False, "batch_first": True},
    ],
    ids=str,
)
def test_lstm(kwargs):
    model = Tagger(**kwargs).eval()
    model_to_export = torch_manual.restore(model)
    assert type(model_to_export.lstm) is nn.LSTM
    session = onnx_session(model_to_export, (torch.randn(4, 2, 3),), {"x": {0: "T", 1: "B"}})
    torch_manual.replace(model)
    assert type(model.lstm) is torch_manual.LSTM
    for T, B in ((4, 2), (1, 1), (9, 3)):
        expect_equal(session, model, {"x": torch.randn(T, B, 3)})


def test_cell():
    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = torch_manual.LSTMCell(3, 4)

        def forward(self, x, h, c):
            return self.cell(x, (h, c))

    model = Step().eval()
    inputs = {"x": torch.randn(2, 3), "h": torch.randn(2, 4), "c": torch.randn(2, 4)}
    torch_manual.restore(model)
    session = onnx_session(model, tuple(inputs.values()), {name: {0: "B"} for name in inputs})
    torch_manual.replace(model)
    expect_equal(session, model, inputs)
    expect_equal(session, model, {name: t.repeat(3, 1) for name, t in inputs.items()})
