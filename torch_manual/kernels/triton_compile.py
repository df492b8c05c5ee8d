"""Compile the kernels ahead of time, for chips that need not be here, and weigh the result.

variants(chip)            everything that `triton_levels.choose` can launch on a chip
compile_apart(variants)   each in a process of its own, as some variants abort the compiler
"""

from __future__ import annotations

import collections
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from torch_manual.kernels.triton_levels import Chip, Plan, reachable
from torch_manual.triton_kernels.lstm import pointwise, sequence, step, step_backward, tangent

KERNELS = {
    "lstm_pointwise_forward": pointwise._lstm_pointwise_forward_kernel,
    "lstm_pointwise_backward": pointwise._lstm_pointwise_backward_kernel,
    "lstm_tangent": tangent._lstm_tangent_kernel,
    "lstm_backward_tangent": tangent._lstm_backward_tangent_kernel,
    "lstm_sequence_forward": sequence._lstm_sequence_forward_kernel,
    "lstm_sequence_backward": sequence._lstm_sequence_backward_kernel,
    "lstm_step_forward": step._lstm_step_forward_kernel,
    "lstm_step_backward": step_backward._lstm_step_backward_kernel,
    "lstm_persistent_forward": step._lstm_step_forward_kernel,
    "lstm_persistent_backward": step_backward._lstm_step_backward_kernel,
}
LEVELS = ("pointwise", "sequence", "step", "persistent")
DTYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}
POINTERS = {"starts_ptr": "*i64", "barrier_ptr": "*i32"}  # the others carry numbers
ACCUMULATED = {  # by level, the pointers to the dtype of accumulation rather than of storage
    0: [
        "pre_ptr",
        "c_ptr",
        "m_ptr",
        "dm_ptr",
        "dc_ptr",
        "dpre_o_ptr",
        "dpre_ptr",
        "c_prev_ptr",
        "weight_ci_ptr",
        "weight_cf_ptr",
        "weight_co_ptr",
    ],
    1: ["c_ptr", "dh_ptr", "dc_ptr"],
    2: ["c_ptr", "dh_n_ptr", "dc_ptr"],
    3: ["c_ptr", "dh_n_ptr", "dc_ptr"],
}
FORMS = {  # of a pointwise kernel: CELL, OUTPUT and PROJECTED; full peepholes cut a step in two
    "whole": (True, True, False),
    "projected": (True, True, True),
    "cell": (True, False, False),
    "output": (False, True, False),
    "output projected": (False, True, True),
}
INSTRUCTIONS = ("HMMA", "LDSM", "BAR", "MUFU")
TIMEOUT = 300  # seconds for one variant


class Variant(NamedTuple):
    """One kernel as it is launched on one chip."""

    name: str
    target: str
    dtype: str  # of storage: bf16, ...
    precision: str  # of float32 products
    plan: Plan
    peepholes: bool
    aligned: bool  # H % 16 == 0, which Triton compiles apart
    H: int  # the largest that the plan is chosen for
    form: str = "whole"

    def constants(self) -> dict[str, Any]:
        """The kernel's constexprs, at their most: everything saved, dcells given."""
        cell, output, projected = FORMS[self.form]
        every = {
            "PEEPHOLES": self.peepholes,
            "PRECISION": self.precision,
            "SAVE": True,
            "DCELLS": True,
            "CELL": cell,
            "OUTPUT": output,
            "PROJECTED": projected,
            "PERSISTENT": self.plan.level == 3,
            "SLICES": self.plan.slices,
            "BLOCK": pointwise.BLOCK,
        }
        names = (
            ("BLOCK_B", "BLOCK_H") if self.plan.level == 1 else ("BLOCK_B", "BLOCK_N", "BLOCK_K")
        )
        every |= dict(zip(names, self.plan.block, strict=False))
        return {name: every[name] for name in KERNELS[self.name].arg_names if name in every}


def variants(chip: Chip) -> list[Variant]:
    """Return every variant that `choose` can pick for `chip`, and the second order's.

    All save what a backward pass needs: without it a kernel does the same and stores less.
    """
    found = []
    for (backward, dtype, precision, plan), H in reachable(chip).items():
        names = [f"lstm_{LEVELS[plan.level]}_{'backward' if backward else 'forward'}"]
        if plan.level == 0:
            if precision == "tf32":
                continue  # a matter of torch's products
            names.append("lstm_backward_tangent" if backward else "lstm_tangent")
        of_plan = chip.architecture, DTYPES[dtype], precision, plan
        any_width = plan.level == 0 or (plan.level == 1 and H <= 64)
        for name in names:
            for peepholes in (False, True):
                for form in _forms(name, peepholes):
                    found.append(Variant(name, *of_plan, peepholes, True, H, form))
                    if any_width:
                        found.append(found[-1]._replace(aligned=False, H=H - 1))
    return found


def _forms(name: str, peepholes: bool) -> list[str]:
    """In which FORMS a kernel is launched, with diagonal peepholes or without."""
    forms = list(FORMS) if "pointwise" in name else ["whole"]
    if peepholes:
        forms = forms[:2]
    return [form for form in forms if "forward" in name or "projected" not in form]


def compile_variant(variant: Variant) -> dict[str, Any]:
    """Compile in this process; return registers, spills, shared memory and instruction counts.

    `spill_bytes`: on NVIDIA what the instructions that spill store and load, as `ptxas -v` counts
    it, but from the machine code; a stack frame that nothing uses is no spill. On AMD the scratch
    memory of a thread.
    """
    compiled = _compile(variant)
    weigh = _weigh_nvidia if variant.target.startswith("sm_") else _weigh_amd
    return weigh(compiled) | {"shared_bytes": compiled.metadata.shared}


def ttir(variant: Variant) -> str:
    """Return the kernel in Triton's own intermediate representation."""
    return _compile(variant).asm["ttir"]


def compile_apart(
    queue: Sequence[Variant], jobs: int = 1
) -> Iterator[tuple[Variant, dict[str, Any]]]:
    """Compile each variant in a process of its own, `jobs` at a time; yield results in order.

    A result is what `compile_variant` returns, or {"error": what went wrong}.
    """
    context = multiprocessing.get_context("fork")  # imports nothing again; Triton is Linux only
    running: collections.deque[tuple[Variant, Any, Connection]] = collections.deque()
    waiting = collections.deque(queue)
    while running or waiting:
        while waiting and len(running) < jobs:
            variant = waiting.popleft()
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_compile_and_send, args=(variant, send))
            process.start()
            send.close()
            running.append((variant, process, receive))
        variant, process, receive = running.popleft()
        try:
            result = receive.recv() if receive.poll(TIMEOUT) else {"error": f"over {TIMEOUT} s"}
        except EOFError:
            process.join()
            result = {"error": f"the compiler ended with exit code {process.exitcode}"}
        process.kill()
        process.join()
        yield variant, result


def _compile_and_send(variant: Variant, send: Connection) -> None:
    try:
        send.send(compile_variant(variant))
    except Exception as error:
        send.send({"error": f"{type(error).__name__}: {error}"})


def _compile(variant: Variant) -> Any:
    kernel, constants = KERNELS[variant.name], variant.constants()
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else _type(n, variant) for n in names}
    sizes = [n for n in names if n == "H" or n.startswith("stride")] if variant.aligned else []
    divisible = [n for n in names if signature[n].startswith("*")] + sizes
    options = variant.plan.options()
    if variant.plan.level == 3:
        options["launch_cooperative_grid"] = True
    source = ASTSource(
        kernel,
        signature,
        constexprs=constants,
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible},
    )
    if variant.target.startswith("sm_"):
        target = GPUTarget("cuda", int(variant.target.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", variant.target, 64)
    return triton.compile(source, target=target, options=options)


def _type(name: str, variant: Variant) -> str:
    if not name.endswith("_ptr"):
        return "i32"
    if name in POINTERS:
        return POINTERS[name]
    accumulated = "tangent" in variant.name or name in ACCUMULATED[variant.plan.level]
    accumulation = "fp64" if variant.dtype == "fp64" else "fp32"
    return f"*{accumulation if accumulated else variant.dtype}"


def _weigh_nvidia(compiled: Any) -> dict[str, Any]:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, code = (
            subprocess.run(
                [tools / tool, option, cubin.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    found = collections.Counter(re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", code))
    return {
        "registers": int(re.findall(r"\bREG:(\d+)", usage)[0]),
        "spill_bytes": spilled(code),
        **{name: found[name] for name in INSTRUCTIONS},
    }


def spilled(code: str) -> int:
    """Bytes stored to and loaded from a thread's local memory, by the instructions in SASS."""
    widths = re.findall(r"\b(?:STL|LDL)\b(?:\.(?!64|128)\w+)*(?:\.(64|128))?", code)
    return sum(int(bits or 32) // 8 for bits in widths)


def _weigh_amd(compiled: Any) -> dict[str, Any]:
    """Under NVIDIA's names: matrix products, reads of shared memory, barriers, exponentials."""
    code = compiled.asm["amdgcn"]
    numbers = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)", code)}
    found = collections.Counter(re.findall(r"^\s+(v_mfma|ds_read|s_barrier|v_exp)", code, re.M))
    return {
        "registers": numbers["vgpr_count"],
        "spill_bytes": numbers["private_segment_fixed_size"],
        "HMMA": found["v_mfma"],
        "LDSM": found["ds_read"],
        "BAR": found["s_barrier"],
        "MUFU": found["v_exp"],
    }
