"""The examples on transforms and distribution, small. (char_lm has a test file of its own.)"""

from __future__ import annotations

import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import gradient_penalty
import per_sample_gradients
import train_distributed

OPACUS = 2.107753075451561  # opacus.accountants.analysis.rdp, orders 2 to 64
SMALL = ["--hidden", "16", "--batch", "8", "--save-every", "4"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_penalty_falls() -> None:
    options = ["--steps", "60", "--batch", "8", "--hidden", "32", "--lr", "0.005"]
    penalties = gradient_penalty.play(gradient_penalty.parse(options))
    assert penalties[0] > 0.8
    assert gradient_penalty.mean(penalties[-10:]) < 0.3


def test_the_penalty_is_autograds() -> None:
    """Against the same critic with torch.nn's LSTM, whose double backward autograd unrolls."""
    critic = gradient_penalty.Critic(5, 4).double()
    real, fake = torch.rand(2, 6, 3, 5, dtype=torch.float64)
    results = []
    for lstm in (critic.lstm, torch.nn.LSTM(5, 4, bidirectional=True).double()):
        lstm.load_state_dict(critic.lstm.state_dict())
        critic.lstm = lstm  # type: ignore[assignment]
        torch.manual_seed(0)
        penalty = gradient_penalty.gradient_penalty(critic, real, fake)
        results.append((penalty, *torch.autograd.grad(penalty, [*lstm.parameters()])))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_dp_sgd_learns(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--steps", "20", "--batch", "64", "--hidden", "32"]
    assert per_sample_gradients.train(per_sample_gradients.parse(options)) > 0.6
    output = capsys.readouterr().out
    assert "gradient norms: median" in output
    assert "clipped" in output


def test_dp_sgds_parts() -> None:
    model = per_sample_gradients.Classifier(7, 5, 3).double()
    ids, labels = torch.randint(7, (6, 4)), torch.tensor([0, 2, 1, 1])
    gradients = per_sample_gradients.per_sample_gradients(model, ids, labels)
    for k in range(4):
        logits = functional_call(model, dict(model.named_parameters()), (ids[:, k],))
        loss = torch.nn.functional.cross_entropy(logits, labels[k])
        one = torch.autograd.grad(loss, [*model.parameters()])
        torch.testing.assert_close([g[k] for g in gradients.values()], list(one))

    norms = per_sample_gradients.norms_of(gradients)
    clip = norms.median().item()
    private = per_sample_gradients.private_mean(gradients, clip, 0.0, 1)
    expected = sum(
        gradients["lstm.weight_hh_l0"][k] * min(1.0, clip / norms[k].item()) for k in range(4)
    )
    torch.testing.assert_close(private["lstm.weight_hh_l0"], expected)


def test_the_privacy_spent() -> None:
    spent = per_sample_gradients.privacy_spent
    assert spent(0.01, 0.0, 1) == math.inf
    assert spent(0.01, 1.0, 1000) == pytest.approx(OPACUS, rel=1e-6)
    assert spent(0.01, 2.0, 1000) < spent(0.01, 1.0, 1000) < spent(0.02, 1.0, 1000)


def torchrun(*options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    workers = ["--nproc-per-node", "2", "--max-restarts", "1"]
    return subprocess.Popen(
        [*command, *workers, train_distributed.__file__, *SMALL, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def run_alone(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    """Run as the one process of its world, in this process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with monkeypatch.context() as patch:
        for name, value in world.items():
            patch.setenv(name, value)
        return train_distributed.main([*SMALL, *options])


def latest(folder: Path) -> dict[str, Any]:
    path = folder / "latest.pt"
    dcp_to_torch_save(train_distributed.checkpoints(folder)[-1], path)
    return torch.load(path, weights_only=False)


def assert_same_training(a: Path, b: Path) -> None:
    """The newest checkpoints of two runs hold the same model and the same state of Adam."""
    one, other = latest(a), latest(b)
    torch.testing.assert_close(one["model"], other["model"], rtol=0, atol=1e-4)
    moments, others = one["optimizer"]["state"], other["optimizer"]["state"]
    torch.testing.assert_close(moments, others, rtol=0, atol=1e-4)


def test_distributed_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, two of which one dies, and a sharded model that goes on: all learn the same."""
    alone, killed, sharded = tmp_path / "alone", tmp_path / "killed", tmp_path / "sharded"
    assert run_alone(monkeypatch, "--steps", "40", "--out", str(alone)) == 0

    victim, lines = 0, []
    with torchrun("--steps", "40", "--out", str(killed)) as run:
        assert run.stdout is not None
        for line in run.stdout:
            print(line, end="")
            lines.append(line)
            if line.startswith("processes: "):
                victim = int(line.split()[-1])
            if line.startswith("step 8 "):
                assert victim > 0
                os.kill(victim, signal.SIGKILL)
    assert run.returncode == 0
    assert any(line.startswith("going on from") for line in lines)
    (first, *_) = [line for line in lines if line.startswith("gradients equal")]
    assert float(first.split()[-1]) < 1e-7
    assert_same_training(killed, alone)

    shutil.copytree(alone, sharded)
    with torchrun("--mode", "fsdp", "--steps", "48", "--out", str(sharded)) as run:
        assert run.stdout is not None
        lines = run.stdout.readlines()
    assert run.returncode == 0
    (first, *_) = [line for line in lines if line.startswith("gradients equal")]
    assert float(first.split()[-1]) < 1e-7
    assert any(line.startswith("going on from") and "step-000040" in line for line in lines)
    assert run_alone(monkeypatch, "--steps", "48", "--out", str(alone)) == 0
    assert len(train_distributed.checkpoints(alone)) == train_distributed.KEPT
    assert_same_training(sharded, alone)

    assert run_alone(monkeypatch, "--steps", "44", "--out", str(alone)) == 2


@pytest.mark.parametrize("example", [gradient_penalty, per_sample_gradients, train_distributed])
def test_wrong_input_gets_one_line(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert example.main(["--hidden", "0"]) == 2
    assert "--hidden: must be a positive integer, got 0" in capsys.readouterr().err
    name = example.__name__
    (tmp_path / "short.txt").write_text("a b")
    wrong = {
        "gradient_penalty": (["--text", str(tmp_path / "short.txt")], "the text is too short"),
        "per_sample_gradients": (["--batch", "100000"], "--batch must be less than"),
        "train_distributed": ([], "start it with: torchrun"),
    }
    argv, message = wrong[name]
    assert example.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{name}: {message}")
    assert error.count("\n") == 1
