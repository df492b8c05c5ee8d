"""examples/char_lm.py: what it writes, how it resumes, what it says to wrong input."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import char_lm
from _report import smooth
from _text import cut_into_streams, encode, read_text, unigram_entropy
from matplotlib.image import imread

ROOT = Path(__file__).parent.parent
SMALL = ["--hidden", "24", "--batch", "8", "--bptt", "16", "--lr", "0.01", "--sample-length", "40"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small models gain nothing from threads, and lose much when another process runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "reference.txt"
    path.write_text(read_text(None)[20_000:24_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def checkpoint_path(text_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    assert char_lm.main([*SMALL, *for_run(text_path, out, 4)]) == 0
    return out / "checkpoint.pt"


def for_run(text: Path, out: Path, steps: int) -> list[str]:
    return ["--text", str(text), "--out", str(out), "--steps", str(steps)]


def load(out: Path) -> dict[str, Any]:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def assert_same(a: Any, b: Any) -> None:
    """Equal bit for bit, through all the containers of a checkpoint."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def assert_one_line(stderr: str, *words: str) -> None:
    assert stderr.startswith("char_lm: ")
    assert stderr.count("\n") == 1
    for word in words:
        assert word in stderr


def test_learns_and_leaves_plot_checkpoint_and_sample(text_path, tmp_path, capsys):
    entropy = unigram_entropy(text_path.read_text(encoding="utf-8"))
    prompt = ["--prompt", "The "]
    assert char_lm.main([*SMALL, *prompt, *for_run(text_path, tmp_path, 80)]) == 0

    checkpoint = load(tmp_path)
    losses = checkpoint["learners"]["torch_manual"]["losses"]
    assert len(losses) == 80
    assert losses[0] > entropy
    assert sum(losses[-10:]) / 10 < entropy - 0.5
    height, width, _ = imread(tmp_path / "loss.png").shape
    assert width > height > 300

    output = capsys.readouterr().out
    assert 10 <= output.count("characters/s") <= 30
    assert f"unigram entropy {entropy:.3f}" in output
    sample = output.partition("sample at temperature 0.7:\n\n")[2]
    assert sample.startswith("The ")
    assert output.endswith(
        f"plot: {tmp_path / 'loss.png'}\ncheckpoint: {tmp_path / 'checkpoint.pt'}\n"
    )


def test_peephole_cell_trains(text_path, tmp_path):
    assert char_lm.main([*SMALL, "--cell", "peephole", *for_run(text_path, tmp_path, 30)]) == 0
    learner = load(tmp_path)["learners"]["torch_manual"]
    assert "lstm.weight_ci_l0" in learner["model"]
    assert learner["losses"][-1] < learner["losses"][0] - 1


def test_progress_bar_on_a_terminal(text_path, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "120")
    assert char_lm.main([*SMALL, *for_run(text_path, tmp_path, 3)]) == 0
    output = capsys.readouterr().out
    assert "━" in output
    assert "characters/s" in output
    assert "step 3/3" not in output


def test_same_seed_same_run(text_path, tmp_path, checkpoint_path):
    assert char_lm.main([*SMALL, *for_run(text_path, tmp_path, 4)]) == 0
    assert_same(load(tmp_path), load(checkpoint_path.parent))


@pytest.mark.parametrize("first", [15, 40], ids=["in-the-first-pass", "in-the-second-pass"])
def test_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(text_path, tmp_path, capsys, first):
    options = [*SMALL, "--layers", "2", "--dropout", "0.2", "--save-every", "5"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert char_lm.main([*options, *for_run(text_path, whole, 45)]) == 0
    whole_end = capsys.readouterr().out.partition("held-out text:")[2].partition("plot:")[0]

    assert char_lm.main([*options, *for_run(text_path, parts, first)]) == 0
    assert len(load(parts)["learners"]["torch_manual"]["losses"]) == first
    capsys.readouterr()
    assert char_lm.main(["--resume", str(parts / "checkpoint.pt"), "--steps", "45"]) == 0
    parts_end = capsys.readouterr().out.partition("held-out text:")[2].partition("plot:")[0]

    assert_same(load(parts), load(whole))
    assert parts_end == whole_end


def test_ctrl_c_writes_a_checkpoint_from_which_the_run_goes_on(
    text_path, tmp_path, monkeypatch, capsys
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert char_lm.main([*SMALL, "--dropout", "0.1", *for_run(text_path, whole, 9)]) == 0
    step = char_lm.Learner.step

    def interrupted_in_the_third_step(learner, inputs, targets):
        if len(learner.losses) == 2:
            signal.raise_signal(signal.SIGINT)
        step(learner, inputs, targets)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(char_lm.Learner, "step", interrupted_in_the_third_step)
        assert char_lm.main([*SMALL, "--dropout", "0.1", *for_run(text_path, parts, 9)]) == 130
    assert signal.getsignal(signal.SIGINT) is before
    resume = ["--resume", str(parts / "checkpoint.pt")]
    output = capsys.readouterr().out
    assert "interrupted at step 3" in output
    assert output.endswith(" ".join(resume) + "\n")
    assert len(load(parts)["learners"]["torch_manual"]["losses"]) == 3

    assert char_lm.main(resume) == 0
    assert_same(load(parts), load(whole))


def test_compare_agrees(text_path, tmp_path, capsys):
    arguments = [*SMALL, "--compare", "--layers", "2", "--dropout", "0.3"]
    assert char_lm.main([*arguments, *for_run(text_path, tmp_path, 20)]) == 0
    assert "losses of torch_manual and torch.nn agree" in capsys.readouterr().out
    learners = load(tmp_path)["learners"]
    difference = torch.tensor(learners["torch_manual"]["losses"]) - torch.tensor(
        learners["torch.nn"]["losses"]
    )
    assert difference.abs().max() < 1e-4


@pytest.mark.parametrize(
    ("manual", "word"),
    [
        ([3.0] * 1000, "agree"),
        ([3.0, 3.001, 3.0], "DRIFTED APART"),
        ([3.0] * 1000 + [4.0] * 10, "agree"),
        ([3.0] * 1000 + [4.0] * 30, "DRIFTED APART"),
    ],
    ids=["same", "at-first", "late-noise", "late"],
)
def test_compare_tells_rounding_from_drift(manual, word, capsys):
    assert char_lm.compare(manual, [3.0] * len(manual)) == (word == "agree")
    output = capsys.readouterr().out
    assert word in output
    assert f"largest difference {max(manual) - 3:.1e} bits" in output


def test_chunks_follow_each_other_and_the_state_is_empty_after_the_last(text_path, tmp_path):
    arguments = [*SMALL, *for_run(text_path, tmp_path, 1)]
    options, _ = char_lm.parse(arguments)
    run = char_lm.Run(options, read_text(options.text))
    seen = []

    def record(inputs, targets):
        seen.append((inputs, targets, run.manual.state))
        run.manual.losses.append(0.0)
        run.manual.state = "carried"

    run.manual.step = record
    chunks = (len(run.streams) - 1) // 16
    for _ in range(chunks + 1):
        run.step()

    inputs = torch.cat([x for x, _, _ in seen[:chunks]])
    targets = torch.cat([y for _, y, _ in seen[:chunks]])
    assert torch.equal(inputs, run.streams[: 16 * chunks])
    assert torch.equal(targets, run.streams[1 : 16 * chunks + 1])
    assert [state for _, _, state in seen] == [None] + ["carried"] * (chunks - 1) + [None]
    assert torch.equal(seen[-1][0], seen[0][0])


def test_no_gradient_reaches_past_a_chunk(text_path, tmp_path):
    options, _ = char_lm.parse([*SMALL, *for_run(text_path, tmp_path, 1)])
    run = char_lm.Run(options, read_text(options.text))
    run.step()
    assert all(not tensor.requires_grad for tensor in run.manual.state)
    assert all(tensor.abs().sum() > 0 for tensor in run.manual.state)


def test_sample_at_almost_no_temperature_is_the_likeliest_text(text_path, checkpoint_path, capsys):
    resume = ["--resume", str(checkpoint_path), "--text", str(text_path)]
    samples = set()
    for temperature in ("1e-9", "1e-300"):
        assert char_lm.main([*resume, "--temperature", temperature]) == 0
        samples.add(capsys.readouterr().out.partition("\n\n")[2])
    assert len(samples) == 1


@pytest.mark.parametrize("option", ["hidden", "layers", "steps", "batch", "bptt", "save-every"])
@pytest.mark.parametrize("value", ["0", "-3", "1.5", "many"])
def test_counts_must_be_positive_integers(option, value, capsys):
    assert char_lm.main([f"--{option}={value}"]) == 2
    assert_one_line(capsys.readouterr().err, f"--{option}", "a positive integer", value)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--lr", "0"], "--lr"),
        (["--lr", "nan"], "--lr"),
        (["--lr", "1"], "--lr"),
        (["--temperature", "0"], "--temperature"),
        (["--temperature", "-1"], "--temperature"),
        (["--sample-length", "0"], "--sample-length"),
        (["--dropout", "1"], "--dropout"),
        (["--dropout", "-0.1"], "--dropout"),
        (["--seed", "-1"], "--seed"),
        (["--seed", "x"], "--seed"),
        (["--cell", "gru"], "--cell"),
        (["--nonsense"], "--nonsense"),
        (["--backend", "nonsense"], "nonsense"),
        (["--device", "nonsense"], "--device nonsense"),
        (["--device", "meta"], "--device meta"),
        (["--cell", "peephole", "--compare"], "--compare"),
        (["--prompt", "中"], "--prompt"),
        (["--batch", "1000"], "too short"),
        (["--bptt", "100000"], "too short"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--text", "."], "Is a directory"),
        (["--resume", "nowhere.pt"], "nowhere.pt"),
        (["--resume", "."], "Is a directory"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_wrong_options(arguments, word, text_path, tmp_path, capsys):
    assert char_lm.main([*SMALL, *for_run(text_path, tmp_path, 5), *arguments]) == 2
    assert_one_line(capsys.readouterr().err, word)


def test_a_loss_that_is_not_finite_spoils_no_checkpoint(
    checkpoint_path, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(checkpoint_path.read_bytes())
    monkeypatch.setattr(char_lm.math, "log", lambda x: math.nan)
    assert char_lm.main(["--resume", str(path), "--steps", "6"]) == 2
    assert_one_line(capsys.readouterr().err, "not finite at step 5", "--lr")
    assert path.read_bytes() == checkpoint_path.read_bytes()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_missing_cuda(text_path, tmp_path, capsys):
    arguments = [*SMALL, *for_run(text_path, tmp_path, 5), "--device", "cuda"]
    assert char_lm.main(arguments) == 2
    assert_one_line(capsys.readouterr().err, "--device cuda")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "is empty"),
        (b"\xff\xfe\x00binary", "not UTF-8"),
        ("latin-1: é".encode("latin-1"), "not UTF-8"),
        (b"zero\0byte" * 1000, "not a text"),
        (b"short", "too short"),
        (b"a", "too short"),
    ],
    ids=["empty", "binary", "latin-1", "zero-bytes", "short", "one-character"],
)
def test_wrong_texts(content, word, tmp_path, capsys):
    path = tmp_path / "text"
    path.write_bytes(content)
    assert char_lm.main([*SMALL, *for_run(path, tmp_path, 5)]) == 2
    assert_one_line(capsys.readouterr().err, word)


def test_text_of_one_repeated_character_trains(tmp_path):
    path = tmp_path / "text"
    path.write_text("a" * 2000, encoding="utf-8")
    assert char_lm.main([*SMALL, *for_run(path, tmp_path, 2)]) == 0
    assert load(tmp_path)["learners"]["torch_manual"]["losses"] == [0.0, 0.0]


def test_out_that_is_a_file_or_lies_in_one(text_path, tmp_path, capsys):
    for out in (text_path, text_path / "out"):
        assert char_lm.main([*SMALL, *for_run(text_path, out, 5)]) == 2
        assert_one_line(capsys.readouterr().err, f"cannot write to --out {out}")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("hidden", "32"),
        ("cell", "peephole"),
        ("layers", "2"),
        ("batch", "4"),
        ("bptt", "8"),
        ("lr", "0.5"),
        ("dropout", "0.5"),
        ("seed", "7"),
    ],
)
def test_resume_refuses_another_run(option, value, checkpoint_path, capsys):
    before = checkpoint_path.read_bytes()
    assert char_lm.main(["--resume", str(checkpoint_path), f"--{option}", value]) == 2
    assert_one_line(capsys.readouterr().err, f"--{option}", value)
    assert checkpoint_path.read_bytes() == before


def test_resume_refuses_another_text_and_a_step_in_the_past(checkpoint_path, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("Some other text. " * 300, encoding="utf-8")
    assert char_lm.main(["--resume", str(checkpoint_path), "--text", str(other)]) == 2
    assert_one_line(capsys.readouterr().err, "another text")
    assert char_lm.main(["--resume", str(checkpoint_path), "--steps", "3"]) == 2
    assert_one_line(capsys.readouterr().err, "at step 4")


def damage_a_weight(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda c: b"", lambda c: b"no checkpoint", lambda c: c[: len(c) // 2], damage_a_weight],
    ids=["empty", "other-file", "cut-off", "one-bit"],
)
def test_resume_refuses_a_damaged_checkpoint(damage, checkpoint_path, tmp_path, capsys):
    path = tmp_path / "damaged.pt"
    path.write_bytes(damage(checkpoint_path.read_bytes()))
    assert char_lm.main(["--resume", str(path)]) == 2
    assert_one_line(capsys.readouterr().err, "damaged.pt", "damaged or not a checkpoint")


@pytest.mark.parametrize("other", [{"weight": torch.zeros(2)}, torch.zeros(2), {}])
def test_resume_refuses_what_another_program_saved(other, tmp_path, capsys):
    path = tmp_path / "other.pt"
    torch.save(other, path)
    assert char_lm.main(["--resume", str(path)]) == 2
    assert_one_line(capsys.readouterr().err, "other.pt", "not a checkpoint")


def test_resume_refuses_weights_of_other_shapes(checkpoint_path, tmp_path, capsys):
    checkpoint = load(checkpoint_path.parent)
    checkpoint["learners"]["torch_manual"]["model"]["head.weight"] = torch.zeros(3, 24)
    path = tmp_path / "shapes.pt"
    torch.save(checkpoint, path)
    assert char_lm.main(["--resume", str(path)]) == 2
    assert_one_line(capsys.readouterr().err, "cannot start")


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (OSError(28, "No space left on device"), 2),
        (RuntimeError("write failed"), 2),
        (KeyboardInterrupt(), 130),
    ],
    ids=["disk-full", "torch-error", "killed"],
)
def test_failed_write_leaves_the_checkpoint_before_it(
    failure, code, text_path, tmp_path, monkeypatch, capsys
):
    arguments = [*SMALL, "--save-every", "2"]
    assert char_lm.main([*arguments, *for_run(text_path, tmp_path, 2)]) == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def fail_halfway(checkpoint, file):
        file.write(before[: len(before) // 2])
        raise failure

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail_halfway)
        resume = ["--resume", str(tmp_path / "checkpoint.pt"), "--steps", "4"]
        assert char_lm.main(resume) == code
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "loss.png"]
    if code == 2:
        assert_one_line(capsys.readouterr().err)
    assert char_lm.main(resume) == 0


def run_script(*command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_script_exits_with_2():
    result = run_script(str(ROOT / "examples" / "char_lm.py"), "--steps", "0")
    assert result.returncode == 2
    assert result.stdout == ""
    assert_one_line(result.stderr, "--steps")


def test_script_says_what_to_install():
    without_rich = "import runpy, sys; sys.modules['rich'] = None; runpy.run_path(sys.argv[1])"
    folder = f"import sys; sys.path.insert(0, {str(ROOT / 'examples')!r}); "
    result = run_script("-c", folder + without_rich, str(ROOT / "examples" / "char_lm.py"))
    assert result.returncode == 2
    assert_one_line(result.stderr, "pip install '.[examples]'")


def test_unigram_entropy():
    assert unigram_entropy("aaaa") == 0
    assert unigram_entropy("abab") == 1
    assert unigram_entropy("aab") == pytest.approx(math.log2(3) - 2 / 3)


def test_streams_are_contiguous_pieces():
    streams = cut_into_streams(encode("abcdefghij", "abcdefghij"), 3)
    assert streams.t().tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_smooth_keeps_a_constant():
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
