"""python -m torch_manual: what is printed and the exit codes."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import torch_manual
from torch_manual import __main__ as cli
from torch_manual._check_cases import check_cases


def run(*arguments):
    command = [sys.executable, "-m", "torch_manual", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_info():
    done = run("info")
    assert done.returncode == 0, done.stderr
    facts = [line.split(maxsplit=1)[0] for line in done.stdout.splitlines()]
    assert facts[:5] == ["python", "torch", "triton", "numpy", "torch_manual"]
    assert torch.__version__ in done.stdout
    for name in torch_manual.backends():
        assert f"backend {name}" in done.stdout


def test_check_one_layer():
    done = run("check", "--layer", "Linear")
    assert done.returncode == 0, done.stderr
    assert "Linear(3, 4)" in done.stdout
    assert "2 of 2 pass" in done.stdout
    assert "gradcheck of" not in done.stdout


def test_unknown_layer_is_one_line_and_exit_code_2():
    done = run("check", "--layer", "Linear", "Lineal")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("check: no layer Lineal; there are Linear, ")
    assert done.stderr.count("\n") == 1


def test_verbose_prints_the_full_table(capsys):
    assert cli.main(["check", "--layer", "LSTMCell", "--samples", "2", "--verbose"]) == 0
    printed = capsys.readouterr().out
    assert "gradcheck of LSTMCell" in printed
    assert "weight_hh[f]" in printed
    assert "2 of 16" in printed


class WrongGradient(nn.Linear):
    def forward(self, input):
        output = super().forward(input)
        return output.detach() + 2 * (output - output.detach())


class WrongOutput(nn.Linear):
    def forward(self, input):
        return super().forward(input) + 1e-9


@pytest.mark.parametrize("broken", [WrongGradient, WrongOutput])
def test_a_broken_layer_fails(broken, monkeypatch, capsys):
    monkeypatch.setattr(torch_manual, "Linear", broken, raising=False)
    assert cli.main(["check", "--layer", "Linear"]) == 1
    printed = capsys.readouterr().out
    assert "FAIL" in printed
    assert "0 of 2 pass" in printed
    assert ("numeric = 0.5 × analytic" in printed) == (broken is WrongGradient)


def test_nonzero_peepholes_are_checked_before_they_are_zeroed():
    case = next(case for case in check_cases() if case.layer == "PeepholeLSTM")
    module = case.build()
    assert all(parameter.abs().min() > 0 for parameter in module.parameters())
    assert cli.difference_to_stock(case, module) <= cli.STOCK_TOLERANCE
    assert module.weight_co_l0.abs().max() == 0


def test_every_layer_has_a_case():
    layers = {
        name
        for name in torch_manual.__all__
        if isinstance(value := getattr(torch_manual, name), type) and issubclass(value, nn.Module)
    }
    assert layers <= {case.layer for case in check_cases()}


@pytest.mark.parametrize("arguments", [[], ["check", "--samples", "0"], ["kernels", "--jobs", "0"]])
def test_wrong_arguments_exit_with_2(arguments):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
