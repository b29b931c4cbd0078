"""Compile the Triton kernels of HSTU attention for devices that need not be there; prints a JSON line for each kernel.

python tests/compile_attention.py [target ...]
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
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

ALL_MASKS = [20, 10, 8, 3]
# target, head width, mask, whether there are targets and a scale per query, whether there is a bias
SHIPPED = [
    ("sm_90", 128, [0, 0, 0, 0], False, False),
    ("sm_90", 64, ALL_MASKS, True, False),
    ("sm_90", 128, ALL_MASKS, True, False),
    ("sm_90", 128, ALL_MASKS, True, True),
    ("sm_80", 64, ALL_MASKS, True, False),
    ("sm_80", 128, [0, 0, 0, 0], False, False),
    ("sm_100", 128, ALL_MASKS, True, False),
    ("gfx942", 128, [0, 0, 0, 0], False, False),
    ("gfx950", 128, [0, 0, 0, 0], False, False),
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


def problem_of(width: int, rule: list[int], general: bool, biased: bool) -> Any:
    num_events = 256
    q, k, v = (torch.zeros(num_events, 4, width, dtype=torch.bfloat16) for _ in range(3))
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


def main(targets: list[str]) -> None:
    for target, width, rule, general, biased in SHIPPED:
        if targets and target not in targets:
            continue
        driver.set_active(NoDevice(target))
        for name, launch in launches_of(problem_of(width, rule, general, biased), target, general).items():
            kernel = launch.compile()
            code = kernel.asm["ptx"] if "ptx" in kernel.asm else kernel.asm["amdgcn"]
            report = {"target": target, "kernel": name, "width": width, "masks": any(rule), "biased": biased}
            report |= usage_of(kernel) | {"shared": kernel.metadata.shared}
            report["tensor_instructions"] = [name for name in TENSOR_INSTRUCTIONS if name in code]
            print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
