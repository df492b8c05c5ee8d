"""Which Triton level serves a recurrence, and with which blocks: pure functions of shape and chip.

    L0  gate mathematics around torch's products   everything
    L1  the whole sequence in one program          W_hh fits one multiprocessor
    L2  one fused step per launch                  small batches, W_hh read anew at every step
    L3  all steps in one cooperative launch        W_hh fits all multiprocessors together

`python -m torch_manual kernels` compiles every plan that `choose` can return for a chip and fails
over a spill or too much shared memory; what did not pass is not chosen here. The thresholds between
the levels are estimates: nothing was timed on hardware (docs/gpu_kernels.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Chip(NamedTuple):
    """What the choice needs to know of a GPU."""

    architecture: str  # sm_90, gfx942, ...
    multiprocessors: int
    shared_bytes: int  # that one program may have
    cooperative: bool  # whether the programs of a grid can wait for each other

    @property
    def nvidia(self) -> bool:
        return self.architecture.startswith("sm_")

    @property
    def known(self) -> bool:
        """Whether it is one that the kernels are compiled for here, or of its family."""
        if self.nvidia:
            return int(self.architecture.removeprefix("sm_")) >= 80
        return self.architecture in CHIPS


CHIPS = {
    "sm_80": Chip("sm_80", 108, 166_912, True),
    "sm_90": Chip("sm_90", 132, 232_448, True),
    "sm_100": Chip("sm_100", 148, 232_448, True),
    "gfx942": Chip("gfx942", 304, 65_536, False),  # its eight dies have an L2 cache each
}


class Plan(NamedTuple):
    """A level and its launch options.

    block: nothing at L0; sequences and units at L1; sequences, units and summands of the recurrent
    product at L2 and L3, the sum cut into `slices`.
    """

    level: int
    block: tuple[int, ...] = ()
    slices: int = 1
    warps: int = 4
    stages: int = 1
    maxnreg: int = 0  # registers a thread may have; 0 leaves it to the compiler

    def options(self) -> dict[str, int]:
        """Triton's compiler options."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options | {"maxnreg": self.maxnreg} if self.maxnreg else options


class Shape(NamedTuple):
    """One pass of a layer without projection and full peepholes."""

    backward: bool
    dtype: torch.dtype  # of x and the weights
    precision: str  # of float32 products: "ieee" or "tf32"
    T: int
    B: int
    H: int
    D: int


def choose(shape: Shape, chip: Chip) -> Plan:
    """Return the plan for one pass on one chip."""
    half = shape.dtype.itemsize == 2
    if shape.dtype == torch.float64 or shape.T == 1 or not chip.known:
        return Plan(0)
    aligned = shape.H % 16 == 0
    if shape.H <= (128 if half and aligned and chip.nvidia else 64):
        plan = plan_at(1, shape, chip)
        if shared_bytes(plan, shape) <= chip.shared_bytes or not chip.nvidia:
            return plan
    if not aligned or shape.B > 64:  # too many registers; or torch's products are the better ones
        return Plan(0)
    exact_forward = not half and shape.precision == "ieee" and not shape.backward  # spills in L3
    if (
        chip.cooperative
        and shape.T >= 8
        and shape.H <= (1024 if half else 512)
        and not exact_forward
    ):
        plan = plan_at(3, shape, chip)
        fits = shared_bytes(plan, shape) <= chip.shared_bytes
        if fits and programs(plan, shape) <= chip.multiprocessors:
            return plan
    return plan_at(2, shape, chip)


def plan_at(level: int, shape: Shape, chip: Chip) -> Plan:
    """Return the plan of one level, whether or not it is the best one.

    Left alone, ptxas may stop far below 255 registers and spill the few values that remain; with
    a maxnreg of 255 it takes the registers instead.
    """
    plan = _plan_at(level, shape, chip)
    return plan._replace(maxnreg=255) if level and chip.nvidia else plan


def _plan_at(level: int, shape: Shape, chip: Chip) -> Plan:
    width = max(16, 1 << (shape.H - 1).bit_length())
    exact = shape.dtype == torch.float32 and shape.precision == "ieee"
    if level == 1:
        rows = 8 if exact and width >= 64 and chip.nvidia and not shape.backward else 16  # 16 spill
        return Plan(1, (rows, width), warps=8 if width >= 64 and chip.nvidia else 4)
    if level == 2:
        if not chip.nvidia:
            return Plan(2, (16, 16, 128), slices=4, warps=4)
        stages = 2 if shape.dtype == torch.float32 else 3  # a third one spills in tf32
        return Plan(2, (16, 16, 256 if exact else 128), slices=8, warps=8, stages=stages)
    if level == 3:
        slices = 8 if width >= 512 else 4
        narrow = Plan(3, (16, 8, width), slices, warps=slices)
        wide = Plan(3, (16, 16, width), slices, warps=slices)
        spread = width >= 512 and programs(narrow, shape) <= chip.multiprocessors
        return narrow if spread and not shape.backward else wide
    return Plan(0)


def programs(plan: Plan, shape: Shape) -> int:
    """Return how many programs an L2 or L3 launch has."""
    block_b, block_n, _ = plan.block
    return -(-shape.B // block_b) * -(-shape.H // block_n) * shape.D


def shared_bytes(plan: Plan, shape: Shape) -> int:
    """Return what an L1 or L3 program takes at most on NVIDIA: W_hh, and a row of each sequence."""
    if plan.level == 1:
        rows, width = plan.block
        return 4 * width * (width + rows) * shape.dtype.itemsize
    rows, units, width = plan.block
    return width * (4 * units + rows) * shape.dtype.itemsize


def reachable(chip: Chip) -> dict[tuple[bool, torch.dtype, str, Plan], int]:
    """Return every pass, dtype, precision and plan that `choose` returns for `chip`, with the
    largest H that it returns it for (up to 2048)."""
    found: dict[tuple[bool, torch.dtype, str, Plan], int] = {}
    widths = (16, 32, 64, 128, 256, 512, 768, 1024, 2048)
    for backward in (False, True):
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            for precision in ("ieee", "tf32") if dtype == torch.float32 else ("ieee",):
                for H in widths:
                    for B in (1, 16, 32, 48, 64, 65):
                        for T in (1, 4, 100):
                            for D in (1, 2):
                                shape = Shape(backward, dtype, precision, T, B, H, D)
                                key = (backward, dtype, precision, choose(shape, chip))
                                found[key] = max(H, found.get(key, 0))
    return found
