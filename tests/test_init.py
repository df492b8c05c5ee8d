"""Initial values, gate by gate."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import torch_manual
from torch_manual.init import chrono_, forget_bias_, orthogonal_

MODULES = [
    lambda **k: torch_manual.LSTM(3, 6, 2, bidirectional=True, **k),
    lambda **k: torch_manual.PeepholeLSTM(3, 6, **k),
    lambda **k: torch_manual.LSTMCell(3, 6, **k),
    lambda **k: nn.LSTM(3, 6, **k),
]


def biases(module):
    params = dict(module.named_parameters())
    names = [n for n in params if n.startswith("bias_ih")]
    return [(params[n], params[n.replace("bias_ih", "bias_hh")]) for n in names]


@pytest.mark.parametrize("build", MODULES)
def test_forget_bias(build):
    module = build()
    before = [p.clone() for p in module.parameters()]
    assert forget_bias_(module, 2.0) is module
    assert biases(module)
    for ih, hh in biases(module):
        assert (ih[6:12] + hh[6:12] == 2.0).all()
    changed = [not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]
    assert sum(changed) == 2 * len(biases(module))
    module = build()
    untouched = biases(module)[0][0].clone()
    forget_bias_(module)
    assert torch.equal(untouched[:6], biases(module)[0][0][:6])
    assert torch.equal(untouched[12:], biases(module)[0][0][12:])


@pytest.mark.parametrize("build", MODULES)
def test_every_gate_is_orthogonal(build):
    module = orthogonal_(build(), gain=0.5)
    weights = [p for n, p in module.named_parameters() if n.startswith("weight_hh")]
    for block in (b for w in weights for b in w.chunk(4)):
        torch.testing.assert_close(block @ block.T, 0.25 * torch.eye(6), rtol=0, atol=1e-6)


@pytest.mark.parametrize("build", MODULES)
def test_chrono(build):
    for ih, hh in biases(chrono_(build(), 50, min_length=10)):
        i, f, g, o = ih.chunk(4)
        u = f.exp()
        assert (u >= 9).all()
        assert (u <= 49).all()
        assert f.std() > 0
        assert torch.equal(i, -f)
        assert torch.cat([g, o, hh]).count_nonzero() == 0


def test_bad_arguments():
    with pytest.raises(TypeError, match="must be an LSTM or an LSTMCell"):
        forget_bias_(nn.GRU(3, 4))
    with pytest.raises(TypeError, match="must be an LSTM or an LSTMCell"):
        orthogonal_(nn.GRUCell(3, 4))
    with pytest.raises(TypeError, match="must be an LSTM or an LSTMCell"):
        chrono_(nn.Linear(3, 4), 5)
    for f in (forget_bias_, lambda m: chrono_(m, 5)):
        with pytest.raises(ValueError, match="no bias"):
            f(torch_manual.LSTM(3, 4, bias=False))
    with pytest.raises(ValueError, match="got min_length=2, max_length=1"):
        chrono_(torch_manual.LSTM(3, 4), 1)


def test_weights_that_are_computed_are_refused():
    module = nn.utils.parametrizations.weight_norm(torch_manual.LSTM(3, 6), "weight_hh_l0")
    with pytest.raises(ValueError, match="weight_hh_l0 is computed from other parameters"):
        orthogonal_(module)
    forget_bias_(module)
    pruned = torch_manual.LSTM(3, 6)
    prune.random_unstructured(pruned, "bias_ih_l0", amount=0)
    assert forget_bias_(pruned, 3.0).bias_ih_l0_orig[6:12].eq(3).all()
