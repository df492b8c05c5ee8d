"""The Triton kernels without a GPU: the choice of level, ahead-of-time compiles, the interpreter.

Compiled and interpreted; nothing here runs on a GPU.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from test_equation_tags import tags
from torch_manual import _kernels_command
from torch_manual.kernels.triton_compile import compile_apart, spilled, ttir, variants
from torch_manual.kernels.triton_levels import (
    CHIPS,
    Chip,
    Shape,
    choose,
    programs,
    reachable,
)

ROOT = Path(__file__).parent.parent
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


def run_python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=ROOT,
        env=os.environ | environment,
    )


@pytest.mark.timeout(900)
def test_everything_interpreted():
    tests = "-m", "pytest", "tests/test_triton_interpreted.py", "-q", "--tb=short", "-k"
    run = partial(run_python, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    with ThreadPoolExecutor() as pool:  # two processes at once
        halves = [pool.submit(run, *tests, which) for which in ("level", "not level")]
    for half in halves:
        done = half.result()
        assert done.returncode == 0, f"\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
        assert "skipped" not in done.stdout


#  dtype   precision  T    B    H     D  chip      forward backward
CHOICES = [
    (HALF, "ieee", 100, 16, 64, 1, "sm_90", 1, 1),
    (HALF, "ieee", 100, 512, 128, 2, "sm_90", 1, 1),
    (HALF, "ieee", 100, 16, 127, 1, "sm_90", 0, 0),  # odd rows: 128 spills
    (HALF, "ieee", 100, 16, 768, 1, "sm_90", 3, 3),
    (HALF, "ieee", 100, 16, 1024, 1, "sm_90", 3, 3),
    (HALF, "ieee", 100, 64, 512, 1, "sm_90", 3, 3),
    (HALF, "ieee", 100, 64, 1024, 1, "sm_90", 2, 2),  # more programs than multiprocessors
    (HALF, "ieee", 100, 16, 1024, 2, "sm_90", 3, 3),
    (HALF, "ieee", 4, 16, 1024, 1, "sm_90", 2, 2),
    (HALF, "ieee", 100, 16, 1040, 1, "sm_90", 2, 2),
    (HALF, "ieee", 100, 16, 1000, 1, "sm_90", 0, 0),
    (HALF, "ieee", 100, 256, 1024, 1, "sm_90", 0, 0),
    (HALF, "ieee", 1, 16, 64, 1, "sm_90", 0, 0),
    (HALF, "ieee", 100, 32, 1024, 1, "sm_80", 2, 2),
    (SINGLE, "tf32", 100, 16, 64, 1, "sm_90", 1, 1),
    (SINGLE, "tf32", 100, 16, 128, 1, "sm_90", 3, 3),
    (SINGLE, "tf32", 100, 16, 1024, 1, "sm_90", 2, 2),
    (SINGLE, "ieee", 100, 16, 512, 1, "sm_90", 2, 3),
    (DOUBLE, "ieee", 100, 16, 64, 1, "sm_90", 0, 0),
    (HALF, "ieee", 100, 16, 128, 1, "gfx942", 2, 2),
    (HALF, "ieee", 100, 16, 64, 1, "gfx942", 1, 1),
]


@pytest.mark.parametrize(
    ("dtype", "precision", "T", "B", "H", "D", "chip", "forward", "backward"),
    CHOICES,
    ids=lambda v: str(v),
)
def test_choice_of_level(dtype, precision, T, B, H, D, chip, forward, backward):
    chosen = [
        choose(Shape(backward, dtype, precision, T, B, H, D), CHIPS[chip]).level
        for backward in (False, True)
    ]
    assert chosen == [forward, backward]


@pytest.mark.parametrize(
    ("chip", "dtype", "H", "level"),
    [
        (Chip("sm_86", 84, 101_376, True), HALF, 128, 3),  # L1 takes 144 KiB, this chip has 99
        (Chip("sm_86", 84, 101_376, True), HALF, 64, 1),
        (Chip("sm_86", 84, 101_376, True), HALF, 768, 2),  # L3 takes 160
        (Chip("sm_120", 170, 101_376, True), SINGLE, 64, 1),
        (Chip("sm_75", 40, 65_536, True), SINGLE, 64, 0),  # it was compiled for none of these
        (Chip("gfx1100", 96, 65_536, False), HALF, 64, 0),
    ],
)
def test_what_does_not_fit_a_chip_is_not_chosen(chip, dtype, H, level):
    for backward in (False, True):
        plan = choose(Shape(backward, dtype, "tf32", 100, 16, H, 1), chip)
        assert plan.level == level


def test_precision_follows_either_of_torchs_switches(monkeypatch):
    from torch_manual.kernels import triton

    matmul = torch.backends.cuda.matmul
    assert triton._precision() == "ieee"
    try:
        matmul.fp32_precision = "tf32"
        assert triton._precision() == "tf32"
        matmul.fp32_precision = "none"
        matmul.allow_tf32 = True
        assert triton._precision() == "tf32"
    finally:
        matmul.allow_tf32 = False
        matmul.fp32_precision = "none"


def test_persistent_grid_fits_the_chip():
    small = Chip("sm_90", 20, 232_448, True)
    for chip in (*CHIPS.values(), small):
        for B in (1, 17, 64):
            for H in (128, 256, 512, 768, 1024):
                for backward in (False, True):
                    shape = Shape(backward, HALF, "ieee", 50, B, H, 2)
                    plan = choose(shape, chip)
                    assert plan.level != 3 or programs(plan, shape) <= chip.multiprocessors
                    assert plan.level != 3 or plan.block[2] >= H


def test_reachable_is_everything_that_is_chosen():
    for chip in CHIPS.values():
        known = {key[3] for key in reachable(chip)}
        for H in range(1, 1100, 7):
            for B in (2, 20, 40):
                for dtype in (HALF, SINGLE):
                    assert choose(Shape(True, dtype, "tf32", 30, B, H, 1), chip) in known


def test_every_equation_of_the_kernels_carries_its_tag():
    files = [*(ROOT / "triton_kernels").rglob("*.py")]
    files += [ROOT / f"torch_manual/kernels/triton{suffix}.py" for suffix in ("", "_tangent")]
    found = tags("\n".join(f.read_text() for f in files))
    expected = {f"F{k}" for k in range(1, 9)} | {f"B{k}" for k in range(1, 10)}
    assert found == expected | {f"R{k}" for k in range(1, 18)}


REDUCED = [
    ("lstm_sequence_forward", "sm_80", "fp16"),
    ("lstm_sequence_backward", "sm_90", "bf16"),
    ("lstm_step_forward", "gfx942", "fp32"),
    ("lstm_persistent_forward", "sm_100", "bf16"),
    ("lstm_persistent_backward", "sm_90", "bf16"),
    ("lstm_pointwise_backward", "sm_90", "fp64"),
]


@pytest.mark.parametrize(("name", "target", "dtype"), REDUCED)
def test_compiles_within_budget(name, target, dtype):
    """The largest block of each; `make kernels` compiles everything."""
    matching = [v for v in variants(CHIPS[target]) if (v.name, v.dtype) == (name, dtype)]
    largest = max(matching, key=lambda v: (v.aligned, v.plan.block, v.peepholes))
    [(variant, result)] = compile_apart([largest])
    assert "error" not in result, result
    assert _kernels_command.over_budget(result, CHIPS[target]) == "", (variant, result)
    assert result["registers"] > 0
    if dtype in ("fp16", "bf16"):
        assert result["HMMA"] > 0, "the product does not use the tensor cores"


def test_spills_are_counted():
    assert spilled("@!P0 STL [R1+0x8], R2 ; LDL.LU.64 R4, [R1] ; LDG.E R4, [R1]") == 12
    variant = next(
        v
        for v in variants(CHIPS["sm_80"])
        if (v.name, v.dtype, v.plan.block, v.peepholes, v.aligned)
        == ("lstm_sequence_forward", "fp32", (8, 64), False, True)
    )
    crowded = variant._replace(plan=variant.plan._replace(block=(16, 64)))
    (_, within), (_, over) = compile_apart([variant, crowded])
    assert within["spill_bytes"] == 0
    assert over["spill_bytes"] > 0


def test_a_compile_that_fails_or_aborts_is_reported(monkeypatch):
    from torch_manual.kernels import triton_compile

    variant = variants(CHIPS["sm_90"])[0]
    monkeypatch.setattr(triton_compile, "compile_variant", lambda v: os.kill(os.getpid(), 9))
    [(_, result)] = compile_apart([variant])
    assert result == {"error": "the compiler ended with exit code -9"}
    monkeypatch.setattr(triton_compile, "compile_variant", lambda v: 1 / 0)
    [(_, result)] = compile_apart([variant])
    assert result == {"error": "ZeroDivisionError: division by zero"}


def test_command():
    command = ("-m", "torch_manual", "kernels")
    done = run_python(
        *command, "--target", "sm_90", "--name", "pointwise", "--dtype", "bf16", "--json"
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["name"] for row in rows} == {"lstm_pointwise_forward", "lstm_pointwise_backward"}
    for row in rows:
        assert {"target", "dtype", "registers", "spill_bytes", "shared_bytes"} <= set(row)
    done = run_python(*command, "--target", "sm_90,sm_1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("kernels: no chip sm_1; there are sm_80, ")


def test_over_budget_is_exit_code_1(monkeypatch, capsys):
    from torch_manual.__main__ import main
    from torch_manual.kernels import triton_compile

    weight = {"registers": 255, "spill_bytes": 8, "shared_bytes": 0}
    monkeypatch.setattr(
        triton_compile, "compile_apart", lambda queue, jobs: [(v, weight) for v in queue]
    )
    assert main(["kernels", "--target", "sm_90", "--name", "step_forward"]) == 1
    printed = capsys.readouterr().out
    assert "over budget: lstm_step_forward sm_90 fp32: spills 8 bytes a thread" in printed
    weight |= {"spill_bytes": 0, "shared_bytes": 232_449}
    assert main(["kernels", "--target", "sm_90", "--name", "step_forward"]) == 1
    assert "232449 bytes of shared memory, the chip has 232448" in capsys.readouterr().out


def narrow_offsets(text):
    """The 32-bit products in TTIR with a factor that grows with the batch or the sequence.

    T·B·4H may exceed 2³¹, so what comes from T, B, N, n or a loaded row number must be 64 bits wide
    before it is multiplied. H times a small number, or a program id times its block, may stay 32.
    """
    made_by = dict(re.findall(r"^\s*(%\w+) = (.+)$", text, re.M))

    def source(name):
        op, *operands = made_by.get(name, "").replace(",", " ").split()[:2] or [name]
        if op in ("tt.splat", "tt.expand_dims", "tt.broadcast", "arith.extsi", "arith.trunci"):
            return source(operands[0])
        return name if op == name or op == "tt.load" else None

    found = []
    for line in made_by.values():
        if line.startswith("arith.muli") and re.search(r": (tensor<\S*x)?i32>?\b", line):
            factors = {source(name) for name in re.findall(r"%\w+", line.partition(" :")[0])}
            sizes = {f for f in factors if f in ("%T", "%B", "%N", "%n") or f in made_by}
            if sizes:
                found.append(line)
    return found


MUTANTS = {
    "none": ("sequence", "", ""),
    "direction": ("sequence", "d = tl.program_id(1).to(tl.int64)", "d = tl.program_id(1)"),
    "row": (
        "sequence",
        "at_gate = row[:, None] * (4 * H)",
        "at_gate = start.to(tl.int32) * (4 * H) + row[:, None].to(tl.int32) * (4 * H)",
    ),
    "y": ("step", "(start_prev + b) * stride_y_n", "start_prev.to(tl.int32) * stride_y_n"),
    "pointwise": ("pointwise", "n.to(tl.int64) * H", "n * H"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_planted_overflow_is_found(monkeypatch, tmp_path, mutant):
    from torch_manual.kernels import triton_compile

    file, old, new = MUTANTS[mutant]
    source = (ROOT / f"triton_kernels/lstm/{file}.py").read_text()
    assert old in source
    (tmp_path / f"{file}.py").write_text(source.replace(old, new) if old else source)
    spec = importlib.util.spec_from_file_location(f"mutant_{file}", tmp_path / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    name = f"lstm_{file}_forward"
    monkeypatch.setitem(triton_compile.KERNELS, name, getattr(module, f"_{name}_kernel"))
    assert bool(narrow_offsets(ttir(variant_of(name)))) == (mutant != "none")


@pytest.mark.parametrize(
    "name",
    [f"lstm_{k}" for k in ("tangent", "backward_tangent")]
    + [
        f"lstm_{level}_{pass_}"
        for level in ("pointwise", "sequence", "step", "persistent")
        for pass_ in ("forward", "backward")
    ],
)
def test_offsets_are_64_bits_wide(name):
    assert narrow_offsets(ttir(variant_of(name))) == []


def variant_of(name):
    """The largest variant of a kernel on sm_90."""
    return max(
        (v for v in variants(CHIPS["sm_90"]) if (v.name, v.dtype) == (name, "bf16")),
        key=lambda v: (v.aligned, v.plan.block, v.peepholes),
    )
