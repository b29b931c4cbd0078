"""Compile the Triton kernels of HSTU attention for devices that need not be there; prints a JSON line for each kernel.

python tests/compile_attention.py [target ...]
"""

import json
import sys
from typing import Any

from triton.runtime import driver

from ultrarec.kernels.static_report import NoDevice, Setting, launches_of, usage_of

ALL_MASKS = (20, 10, 8, 3)
# target, head width, mask, whether there are targets and a scale per query, whether there is a bias
SHIPPED = [
    ("sm_90", 128, (0, 0, 0, 0), False, False),
    ("sm_90", 64, ALL_MASKS, True, False),
    ("sm_90", 128, ALL_MASKS, True, False),
    ("sm_90", 128, ALL_MASKS, True, True),
    ("sm_80", 64, ALL_MASKS, True, False),
    ("sm_80", 128, (0, 0, 0, 0), False, False),
    ("sm_100", 128, ALL_MASKS, True, False),
    ("gfx942", 128, (0, 0, 0, 0), False, False),
    ("gfx950", 128, (0, 0, 0, 0), False, False),
]
TENSOR_INSTRUCTIONS = ("mma.sync", "wgmma", "tcgen05.mma", "v_mfma")


def main(targets: list[str]) -> None:
    for target, width, rule, general, biased in SHIPPED:
        if targets and target not in targets:
            continue
        driver.set_active(NoDevice(target))
        for name, launch in launches_of(Setting(width, rule, general, biased), target).items():
            kernel = launch.compile()
            code = kernel.asm["ptx"] if "ptx" in kernel.asm else kernel.asm["amdgcn"]
            registers, spilled = usage_of(kernel)
            report: dict[str, Any] = {"target": target, "kernel": name, "width": width, "masks": any(rule)}
            report |= {"biased": biased, "registers": registers, "spilled": spilled, "shared": kernel.metadata.shared}
            report["tensor_instructions"] = [name for name in TENSOR_INSTRUCTIONS if name in code]
            print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
