"""The Triton kernels of the attention as they ship, compiled for devices that need not be there, and what they cost.

Nothing is timed: registers, spills, shared memory, and how many instructions a score takes.
"""

# D = head width, R = queries and C = keys of a tile

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from . import amdgcn, sass
from .hstu_attention.operator import Problem
from .hstu_attention.triton_bias_launch import BiasPass
from .hstu_attention.triton_blocks import Blocks
from .hstu_attention.triton_launch import forward_launch, keys_launch, queries_launch
from .hstu_attention.triton_padding import padded_problem
from .launching import Launch
from .machine_code import KINDS, Instruction, Usage, counts_of, tensor_loops

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")
NUM_PRODUCTS = {"forward": 2, "keys": 4, "queries": 3}
"""Of a tile, by kernel: the score, and what is summed from it; the backward computes scores again."""


@dataclass(frozen=True)
class Setting:
    """What kernels are compiled for besides a device."""

    width: int
    """D, of queries, keys and values."""
    rule: tuple[int, int, int, int] = (0, 0, 0, 0)
    """The fields of the mask."""
    general: bool = False
    """With targets and a scale per query."""
    biased: bool = False
    """With a position and a time bias."""
    dtype: torch.dtype = torch.bfloat16
    value_width: int | None = None
    """Of values alone, if that differs."""

    @property
    def widest(self) -> int:
        """Of the heads of queries, keys and values."""
        return max(self.width, self.value_width or 0)

    def __str__(self) -> str:
        values = f" and {self.value_width}" if self.value_width else ""
        parts = [f"D={self.width}{values}", str(self.dtype).removeprefix("torch.")]
        parts.append("all masks" if any(self.rule) else "causal")
        parts += ["targets, scale per query"] * self.general + ["both biases"] * self.biased
        return ", ".join(parts)


ALL_MASKS = (20, 10, 8, 3)
SETTINGS = (
    *(Setting(width) for width in (32, 64, 128, 256)),
    Setting(128, dtype=torch.float16),
    Setting(128, dtype=torch.float32),
    Setting(128, ALL_MASKS, True),
    Setting(128, ALL_MASKS, True, True),
)


@dataclass(frozen=True)
class Loop:
    """One loop over tiles; instructions that all warps issue, per score, counting a warp's as one for each lane."""

    name: str
    """ "interior": tiles that all see; "boundary": those that the mask hides in part."""
    issued: float
    by_kind: dict[str, float]
    redundancy: float | None
    """Multiplications done over those needed; None where instructions do not tell."""


@dataclass(frozen=True)
class Kernel:
    """A kernel compiled for one device and setting."""

    target: str
    setting: str
    name: str
    tile: str
    registers: int
    """This and what was spilled as in Usage."""
    spilled: int
    shared_bytes: int
    matrix_instructions: int
    """In the loops over tiles."""
    loops: tuple[Loop, ...]
    """None of the bias gradient, whose loop is over sequences, nor of heads of two widths."""


class NoDevice:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, target: str) -> None:
        is_nvidia = target.startswith("sm_")
        device = ("cuda", int(target[3:])) if is_nvidia else ("hip", target)
        self.target = GPUTarget(*device, lanes_of(target))

    def get_current_device(self) -> str:
        """The target: Triton keeps what it compiled by device, this way also by target."""
        return str(self.target)

    def get_current_stream(self, device: str | None = None) -> int:
        """None that would ever be used."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return self.target


def lanes_of(target: str) -> int:
    """Threads of a warp, or of AMD's wavefront."""
    return 32 if target.startswith("sm_") else 64


def report(targets: tuple[str, ...]) -> Iterator[Kernel]:
    """Compile every kernel for every target and one of SETTINGS, and say what it costs as soon as it is compiled."""
    for target in targets:
        driver.set_active(NoDevice(target))
        for setting in SETTINGS:
            for name, launch in launches_of(setting, target).items():
                yield describe(target, setting, name, launch, launch.compile())


def problem_of(setting: Setting) -> Problem:
    """Inputs of the setting; their values do not matter."""
    num_events = 256
    widths = (setting.width, setting.width, setting.value_width or setting.width)
    q, k, v = (torch.zeros(num_events, 4, width, dtype=setting.dtype) for width in widths)
    scale = torch.ones(num_events) if setting.general else torch.ones(1).expand(num_events)
    return Problem(
        q,
        k,
        v,
        scale,
        position_weight=torch.zeros(2 * num_events - 1) if setting.biased else None,
        time_weight=torch.zeros(129) if setting.biased else None,
        timestamps=torch.zeros(num_events, dtype=torch.int64) if setting.biased else None,
        query_timestamps=None,
        offsets=torch.tensor([0, num_events]),
        num_targets=torch.tensor([3]) if setting.general else None,
        max_seq_len=num_events,
        alpha=0.1,
        rule=list(setting.rule),
    )


def launches_of(setting: Setting, target: str) -> dict[str, Launch]:
    """The launches of a forward and a backward."""
    problem = padded_problem(problem_of(setting))
    names = (*NUM_PRODUCTS, "bias") if setting.biased else NUM_PRODUCTS
    return {name: launch_of(name, problem, target)[0] for name in names}


def launch_of(
    name: str, problem: Problem, target: str, blocks: Blocks | None = None
) -> tuple[Launch, Callable[[], list[Tensor]]]:
    """The launch of one kernel, with the tiles it would take unless others are given, and its results once it ran."""
    q, k, v = problem[:3]
    dout = torch.ones_like(v)
    if name == "forward":
        out = torch.empty_like(v)
        return forward_launch(problem, out, target, blocks), lambda: [out]
    if name == "keys":
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        return keys_launch(problem, dout, dk, dv, target, blocks), lambda: [dk, dv]
    if name == "queries":
        dq, has_dscale = torch.empty_like(q), problem.scale.stride(0) != 0
        dscale = q.new_empty(*q.shape[:2], 1, dtype=torch.float32) if has_dscale else None
        launch = queries_launch(problem, dout, dq, dscale, target, blocks)
        return launch, lambda: [x for x in (dq, dscale) if x is not None]
    sums = BiasPass.of(problem, dout, target, blocks)
    return sums.launch, lambda: [sums.position_gradient(), sums.time_gradient()]


def usage_of(compiled: Any) -> Usage:
    """What a thread of a kernel that Triton compiled takes."""
    if "cubin" in compiled.asm:
        return sass.usage_of(compiled.asm["cubin"])
    return amdgcn.usage_of(compiled.asm["amdgcn"])


def loops_of(compiled: Any) -> list[list[Instruction]]:
    """The loops over tiles of a kernel that Triton compiled."""
    if "cubin" in compiled.asm:
        return tensor_loops(sass.program_of(compiled.asm["cubin"]))
    return tensor_loops(amdgcn.program_of(compiled.asm["amdgcn"]))


def describe(target: str, setting: Setting, name: str, launch: Launch, compiled: Any) -> Kernel:
    """What a launch costs once Triton has compiled it."""
    variant = launch.arguments["VARIANT"]
    usage, bodies = usage_of(compiled), loops_of(compiled)
    # Products of two widths are not told apart.
    has_loops = name in NUM_PRODUCTS and setting.value_width is None
    return Kernel(
        target=target,
        setting=str(setting),
        name=name,
        tile=f"{variant.rows}x{variant.keys}",
        registers=usage.registers,
        spilled=usage.spilled,
        shared_bytes=compiled.metadata.shared,
        matrix_instructions=sum(counts_of(body)["tensor"] for body in bodies),
        loops=_loops(name, launch, setting.width, target, bodies) if has_loops else (),
    )


def _loops(name: str, launch: Launch, width: int, target: str, bodies: list[list[Instruction]]) -> tuple[Loop, ...]:
    """The loop over tiles that all see comes first; tiles at the edge are taken in parts, half as large or less."""
    variant, num_warps = launch.arguments["VARIANT"], launch.options["num_warps"]
    edge = (variant.edge_rows, variant.keys) if name == "keys" else (variant.rows, variant.edge_keys)
    loops = []
    tiles = (("interior", variant.rows * variant.keys), ("boundary", edge[0] * edge[1]))
    for (loop_name, num_scores), body in zip(tiles, bodies, strict=False):
        multiplied = num_warps * sum(x.multiply_adds for x in body)
        done = multiplied / (num_scores * width * NUM_PRODUCTS[name])
        # ptxas unrolls: an iteration may hold several tiles. LLVM does not, and wavefronts may repeat a whole tile.
        num_tiles = max(1, int(done + 0.01)) if target.startswith("sm_") else 1
        factor = lanes_of(target) * num_warps / (num_scores * num_tiles)
        counts = counts_of(body)
        by_kind = {kind: round(counts[kind] * factor, 2) for kind in KINDS}
        redundancy = round(done / num_tiles, 2) if multiplied else None
        loops.append(Loop(loop_name, round(len(body) * factor, 2), by_kind, redundancy))
    return tuple(loops)
