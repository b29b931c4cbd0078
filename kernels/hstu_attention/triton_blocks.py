"""Sizes of the tiles of the Triton kernels, by device, head width and dtype."""

from dataclasses import dataclass

import torch

INTERPRETER = "interpreter"
DESCRIPTOR_TARGETS = (INTERPRETER, "sm_90", "sm_100", "sm_103")


@dataclass(frozen=True)
class Blocks:
    """Tile and launch options of one kernel."""

    rows: int
    keys: int
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None


def blocks_of(kernel: str, target: str, width: int, dtype: torch.dtype) -> Blocks:
    """The tiles of a kernel for heads of this width."""
    if kernel == "bias":
        return Blocks(16, 16)
    return Blocks(32, 16)


def target_of(device: torch.device) -> str:
    """What kernels for this device are compiled for, such as sm_90 or gfx942."""
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
