"""`replace` and `restore` on models that are already in use."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import torch_manual


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.encoder = nn.ModuleDict({"lstm": nn.LSTM(4, 5, 2, bidirectional=True)})
        self.shared = self.encoder["lstm"]
        self.cell = nn.LSTMCell(10, 3)
        self.gru = nn.GRU(3, 3)

    def forward(self, tokens):
        y, _ = self.encoder["lstm"](self.embed(tokens))
        return self.cell(y[-1])[0]


class Loud(nn.LSTM):
    def forward(self, *args):
        return "loud"


TOKENS = torch.randint(10, (6, 3))


def test_replaced_model_goes_on_training():
    model = Tagger()
    twin = copy.deepcopy(model)
    params = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    model.encoder["lstm"].register_forward_hook(lambda m, i, o: seen.append(type(m)))
    model.encoder["lstm"].weight_ih_l0.requires_grad_(False)
    model.cell.eval()
    lstm = model.encoder["lstm"]

    assert torch_manual.replace(model) is model
    assert type(lstm) is torch_manual.LSTM
    assert model.shared is model.encoder["lstm"] is lstm
    assert type(model.cell) is torch_manual.LSTMCell
    assert type(model.gru) is nn.GRU
    assert not model.cell.training
    assert all(p is params[n] for n, p in model.named_parameters())
    assert not lstm.weight_ih_l0.requires_grad

    for m, step in ((model, optimizer), (twin, torch.optim.SGD(twin.parameters(), lr=0.1))):
        twin.encoder["lstm"].weight_ih_l0.requires_grad_(False)
        for _ in range(3):
            step.zero_grad()
            m(TOKENS).square().sum().backward()
            step.step()
    assert seen == [torch_manual.LSTM] * 3
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_model_is_an_lstm_itself_and_back():
    lstm = nn.LSTM(3, 4, 2)
    x = torch.randn(5, 2, 3)
    before, state = lstm(x)[0], lstm.state_dict()
    assert torch_manual.replace(lstm) is lstm
    assert isinstance(lstm, torch_manual.LSTM)
    assert not isinstance(lstm, nn.LSTM)
    torch.testing.assert_close(lstm(x)[0], before)
    assert torch_manual.replace(lstm) is lstm
    with torch.no_grad():
        lstm.weight_hh_l0.mul_(2)
    lstm.weight_hh_l1 = nn.Parameter(torch.zeros(16, 4))
    ours = lstm(x)[0]
    assert torch_manual.restore(lstm) is lstm
    assert type(lstm) is nn.LSTM
    assert "return_cells" not in vars(lstm)
    torch.testing.assert_close(lstm(x)[0], ours)
    assert list(lstm.state_dict()) == list(state)
    torch.testing.assert_close(copy.deepcopy(lstm)(x)[0], ours)


def test_built_as_ours_and_restored():
    model = nn.Sequential(torch_manual.LSTM(3, 4), nn.Flatten(0))
    x = torch.randn(5, 2, 3)
    before = model[0](x)[0]
    torch_manual.restore(model)
    assert type(model[0]) is nn.LSTM
    torch.testing.assert_close(model[0](x)[0], before)
    peephole = torch_manual.PeepholeLSTM(3, 4)
    assert type(torch_manual.restore(peephole)) is torch_manual.PeepholeLSTM
    with pytest.raises(ValueError, match="no return_cells"):
        torch_manual.restore(torch_manual.LSTM(3, 4, return_cells=True))


def test_subclasses_only_on_demand():
    model = nn.Sequential(Loud(3, 4))
    assert type(torch_manual.replace(model)[0]) is Loud
    assert type(torch_manual.replace(model, subclasses=True)[0]) is torch_manual.LSTM
    assert model[0](torch.randn(5, 2, 3))[0].shape == (5, 2, 4)
    assert type(torch_manual.restore(model)[0]) is Loud
    assert model[0](None) == "loud"


def test_parametrized_lstm():
    model = nn.Sequential(parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0"))
    x = torch.randn(5, 2, 3)
    expected = nn.LSTM(3, 4)
    for name in expected._flat_weights_names:
        setattr(expected, name, nn.Parameter(getattr(model[0], name).detach()))
    torch_manual.replace(model)
    assert isinstance(model[0], torch_manual.LSTM)
    torch.testing.assert_close(model[0](x)[0], expected(x)[0])
    assert set(dict(model[0].named_parameters())) >= {"parametrizations.weight_hh_l0.original0"}
    assert isinstance(torch_manual.restore(model)[0], nn.LSTM)


def test_what_cannot_be_restored_leaves_all_as_it_was():
    model = nn.Sequential(torch_manual.LSTM(3, 4), torch_manual.LSTM(4, 4, return_cells=True))
    with pytest.raises(ValueError, match=r"restore: torch\.nn\.LSTM has no return_cells"):
        torch_manual.restore(model)
    assert all(type(module) is torch_manual.LSTM for module in model)


def test_not_a_module():
    with pytest.raises(TypeError, match=r"replace: model must be an nn.Module, got int"):
        torch_manual.replace(3)


def test_sharded_modules_are_refused():
    """fully_shard puts a class of its own on top, which a change of class would take away."""
    for convert, cls in (
        (torch_manual.replace, nn.LSTM),
        (torch_manual.restore, torch_manual.LSTM),
    ):
        model = nn.Sequential(cls(3, 4))
        fsdp = type("FSDPModule", (), {})
        model[0].__class__ = type("FSDPLSTM", (fsdp, cls), {})
        with pytest.raises(ValueError, match="a FSDPLSTM is sharded"):
            convert(model)
        assert type(model[0]).__name__ == "FSDPLSTM"
