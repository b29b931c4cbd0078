"""Compile the Triton kernels of HSTU attention for devices that need not be there; prints a JSON line for each kernel.

python tests/compile_attention.py [--all] [target ...]

Without --all it is a kernel for every entry of the tables of tiles, with all that a kernel can be asked for; with it,
every dtype and several head widths and masks, which takes about ten minutes for each target.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import ultrarec.kernels  # noqa: F401  # the package of the modules below

PACKAGE = "ultrarec.kernels.hstu_attention"
Problem = importlib.import_module(f"{PACKAGE}.operator").Problem
launches = importlib.import_module(f"{PACKAGE}.triton_launch")
BiasPass = importlib.import_module(f"{PACKAGE}.triton_bias_launch").BiasPass

CAUSAL, SEMI_LOCAL, ALL_MASKS = [0, 0, 0, 0], [20, 10, 0, 0], [20, 10, 8, 3]
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# target, head width, mask, whether there are targets and a scale per query, whether there is a bias, dtype
Configuration = tuple[str, int, list[int], bool, bool, torch.dtype]
SHIPPED: list[Configuration] = [
    *((target, 128, CAUSAL, False, False, BF16) for target in TARGETS),
    *(
        (target, width, ALL_MASKS, True, biased, BF16)
        for target, width, biased in product(TARGETS[:3], (64, 128, 256), (False, True))
    ),
    # Strides that no descriptor takes.
    *((target, 50, ALL_MASKS, True, biased, BF16) for target, biased in product(TARGETS[1:3], (False, True))),
    *(("sm_90", width, ALL_MASKS, True, True, FP32) for width in (64, 128, 256)),
    ("sm_80", 256, ALL_MASKS, True, True, FP32),
    ("sm_100", 256, ALL_MASKS, True, True, FP32),
    ("gfx942", 128, ALL_MASKS, True, True, BF16),
]
EVERY: list[Configuration] = [
    (target, width, rule, general, biased, dtype)
    for target, dtype, width, biased, (rule, general) in product(
        TARGETS,
        (BF16, FP32, FP16),
        (16, 25, 32, 50, 64, 96, 128, 256),
        (False, True),
        ((CAUSAL, False), (SEMI_LOCAL, False), (ALL_MASKS, True)),
    )
]
TENSOR_INSTRUCTIONS = ("mma.sync", "wgmma", "tcgen05.mma", "v_mfma")


class NoDevice:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, target: str) -> None:
        is_nvidia = target.startswith("sm_")
        self.target = GPUTarget("cuda", int(target[3:]), 32) if is_nvidia else GPUTarget("hip", target, 64)

    def get_current_device(self) -> str:
        # Triton keeps what it compiled by device: this way also by target.
        return str(self.target)

    def get_current_stream(self, device: str | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def problem_of(width: int, rule: list[int], general: bool, biased: bool, dtype: torch.dtype = BF16) -> Any:
    num_events = 256
    q, k, v = (torch.zeros(num_events, 4, width, dtype=dtype) for _ in range(3))
    scale = torch.ones(num_events) if general else torch.ones(1).expand(num_events)
    weights: tuple[Any, ...] = (None, None, None, None)
    if biased:
        weights = (torch.zeros(2 * num_events - 1), torch.zeros(129), torch.zeros(num_events, dtype=torch.int64), None)
    num_targets = torch.tensor([3]) if general else None
    return Problem(q, k, v, scale, *weights, torch.tensor([0, num_events]), num_targets, num_events, 0.1, rule)


def launches_of(problem: Any, target: str, general: bool) -> dict[str, Any]:
    q, k, v = problem[:3]
    dscale = torch.zeros(*q.shape[:2], 1) if general else None
    of = {
        "forward": launches.forward_launch(problem, v.clone(), target),
        "keys": launches.keys_launch(problem, v.clone(), k.clone(), v.clone(), target),
        "queries": launches.queries_launch(problem, v.clone(), q.clone(), dscale, target),
    }
    if problem.bias is not None:
        of["bias"] = BiasPass.of(problem, v.clone(), target).launch
    return of


def usage_of(kernel: Any) -> dict[str, int]:
    """Registers, and bytes or registers that were spilled."""
    if "cubin" not in kernel.asm:
        found = dict(
            re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", kernel.asm["amdgcn"])
        )
        spilled = int(found["vgpr_spill_count"]) + int(found["private_segment_fixed_size"])
        return {"registers": int(found["vgpr_count"]), "spilled": spilled}
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", output)}
    return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"]}


def masked_values_of(ttir: str) -> list[int]:
    """For each loop, in order, how many of its lines are about a tile of booleans, as those of a mask are."""
    loops = re.findall(r"^( *)[^\n]*\bscf\.for\b[^\n]*\n(.*?)^\1\}", ttir, re.MULTILINE | re.DOTALL)
    return [len(re.findall(r"x\d+xi1>[^\n]*\n", body)) for _, body in loops]


def main(arguments: list[str]) -> None:
    targets = [argument for argument in arguments if argument != "--all"]
    for target, width, rule, general, biased, dtype in EVERY if "--all" in arguments else SHIPPED:
        if targets and target not in targets:
            continue
        driver.set_active(NoDevice(target))
        problem = problem_of(width, rule, general, biased, dtype)
        for name, launch in launches_of(problem, target, general).items():
            kernel = launch.compile()
            code = kernel.asm["ptx"] if "ptx" in kernel.asm else kernel.asm["amdgcn"]
            report = {"target": target, "kernel": name, "width": width, "masks": any(rule), "biased": biased}
            report |= {"dtype": str(dtype).removeprefix("torch.")}
            report |= usage_of(kernel) | {"shared": kernel.metadata.shared}
            report["tensor_instructions"] = [name for name in TENSOR_INSTRUCTIONS if name in code]
            report["masked_values"] = masked_values_of(kernel.asm["ttir"])
            print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
