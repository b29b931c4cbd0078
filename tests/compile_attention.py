"""Compile the Triton kernels of HSTU attention for devices that need not be there; prints a JSON line for each kernel.

python tests/compile_attention.py [--all] [target ...]

Without --all it is a kernel for every entry of the tables of tiles, with all that a kernel can be asked for; with it,
every dtype and several head widths and masks, which takes about ten minutes for each target.
"""

import json
import re
import sys
from itertools import product
from typing import Any

import torch
from triton.runtime import driver

from ultrarec.kernels.static_report import ALL_MASKS, NoDevice, Setting, launches_of, usage_of

CAUSAL, SEMI_LOCAL = (0, 0, 0, 0), (20, 10, 0, 0)
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHIPPED = [
    *((target, Setting(128)) for target in TARGETS),
    *(
        (target, Setting(width, ALL_MASKS, True, biased))
        for target, width, biased in product(TARGETS[:3], (64, 128, 256), (False, True))
    ),
    # Strides that no descriptor takes.
    *((target, Setting(50, ALL_MASKS, True, biased)) for target, biased in product(TARGETS[1:3], (False, True))),
    *(("sm_90", Setting(width, ALL_MASKS, True, True, FP32)) for width in (64, 128, 256)),
    ("sm_80", Setting(256, ALL_MASKS, True, True, FP32)),
    ("sm_100", Setting(256, ALL_MASKS, True, True, FP32)),
    ("gfx942", Setting(128, ALL_MASKS, True, True)),
]
EVERY = [
    (target, Setting(width, rule, general, biased, dtype))
    for target, dtype, width, biased, (rule, general) in product(
        TARGETS,
        (BF16, FP32, FP16),
        (16, 25, 32, 50, 64, 96, 128, 256),
        (False, True),
        ((CAUSAL, False), (SEMI_LOCAL, False), (ALL_MASKS, True)),
    )
]
TENSOR_INSTRUCTIONS = ("mma.sync", "wgmma", "tcgen05.mma", "v_mfma")


def masked_values_of(ttir: str) -> list[int]:
    """For each loop, in order, how many of its lines are about a tile of booleans, as those of a mask are."""
    loops = re.findall(r"^( *)[^\n]*\bscf\.for\b[^\n]*\n(.*?)^\1\}", ttir, re.MULTILINE | re.DOTALL)
    return [len(re.findall(r"x\d+xi1>[^\n]*\n", body)) for _, body in loops]


def main(arguments: list[str]) -> None:
    targets = [argument for argument in arguments if argument != "--all"]
    for target, setting in EVERY if "--all" in arguments else SHIPPED:
        if targets and target not in targets:
            continue
        driver.set_active(NoDevice(target))
        for name, launch in launches_of(setting, target).items():
            kernel = launch.compile()
            code = kernel.asm["ptx"] if "ptx" in kernel.asm else kernel.asm["amdgcn"]
            registers, spilled = usage_of(kernel)
            report: dict[str, Any] = {"target": target, "kernel": name, "width": setting.width}
            report |= {"masks": any(setting.rule), "biased": setting.biased}
            report |= {"dtype": str(setting.dtype).removeprefix("torch.")}
            report |= {"registers": registers, "spilled": spilled, "shared": kernel.metadata.shared}
            report["tensor_instructions"] = [name for name in TENSOR_INSTRUCTIONS if name in code]
            report["masked_values"] = masked_values_of(kernel.asm["ttir"])
            print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
