"""Sizes of the tiles of the Triton kernels, by device, head width and dtype.

Chosen by what compiling for a device shows; nothing here was timed. Large tiles spread the overhead of an iteration
over more scores: the tables have the largest found that need no stack with all mask parameters, targets and bias.
On sm_90, causal, bfloat16, the loop over full tiles issues per score (instructions of a warp times 32):

    head width                      64     128
    forward                        5.3     5.2
    gradients of k and v          11.4    12.1
      with a scale per query              15.0
    gradient of q                  8.6     9.0
      and of a scale per query            10.1

The loop over tiles at the edge of the causal mask issues 9.9 and 10.7 in the forward. The gradients of heads wider than
128 use the instructions of sm_80 on sm_90: its own take 64 keys or queries at least, which spilled 16 to 816 bytes.
Those of gfx942 and gfx950 have the fewest instructions per score when compiled for gfx942: docs/attention.md has them.
"""

from dataclasses import dataclass

import torch

INTERPRETER = "interpreter"
DESCRIPTOR_TARGETS = (INTERPRETER, "sm_90", "sm_100", "sm_103")
"""Where tiles are loaded by tensor descriptors."""


@dataclass(frozen=True)
class Blocks:
    """Tile and launch options of one kernel."""

    rows: int
    keys: int
    num_warps: int = 4
    num_stages: int = 2


Table = dict[str, dict[int, Blocks]]
"""By kernel, then by the widest head that the tiles are for. Those of the bias gradient are square."""

HOPPER: Table = {
    "forward": {128: Blocks(128, 128, 8), 256: Blocks(128, 64, 8)},
    "keys": {128: Blocks(64, 128, 8), 256: Blocks(32, 32, 8, 1)},
    "queries": {128: Blocks(128, 128, 8), 256: Blocks(32, 32, 8, 1)},
}
HOPPER_BIASED: Table = {
    "forward": {128: Blocks(128, 32, 8, 1), 256: Blocks(64, 32, 8, 1)},
    "keys": {128: Blocks(32, 64, 8, 1), 256: Blocks(32, 32, 8, 1)},
    "queries": {128: Blocks(64, 32, 4, 1), 256: Blocks(16, 32, 8, 1)},
    "bias": {64: Blocks(64, 64, 8, 1), 128: Blocks(16, 16, 4, 1), 256: Blocks(16, 16, 8, 1)},
}
BLACKWELL: Table = {
    "forward": HOPPER["forward"],
    "keys": {128: Blocks(64, 128, 8), 256: Blocks(64, 64, 8, 1)},
    "queries": {64: Blocks(128, 128, 8), 128: Blocks(128, 64, 8), 256: Blocks(64, 64, 8, 1)},
}
BLACKWELL_BIASED: Table = {
    **HOPPER_BIASED,
    "keys": {128: Blocks(32, 64, 8, 1), 256: Blocks(32, 64, 8)},
    "queries": {128: Blocks(64, 32, 4, 1), 256: Blocks(64, 32, 8)},
}
AMPERE: Table = {
    "forward": {
        64: Blocks(128, 64, 8, 2),
        128: Blocks(128, 32, 8, 2),
        256: Blocks(64, 32, 4, 1),
    },
    "keys": {128: Blocks(32, 64, 4, 2), 256: Blocks(32, 32, 8, 1)},
    "queries": {64: Blocks(128, 64, 8, 2), 128: Blocks(64, 32, 4, 2), 256: Blocks(32, 16, 4, 1)},
}
AMPERE_BIASED: Table = {
    "forward": {128: Blocks(32, 32, 4, 1), 256: Blocks(32, 32, 8, 1)},
    "keys": {128: Blocks(32, 64, 8, 1), 256: Blocks(32, 32, 8, 1)},
    "queries": {128: Blocks(32, 32, 4, 1), 256: Blocks(32, 32, 8, 1)},
    "bias": {128: Blocks(16, 16, 4, 1), 256: Blocks(16, 16, 8, 1)},
}
# Wavefronts share the queries of a tile, of "keys" its keys, 32 or 16 at a time: if too few, several do the same work.
CDNA: Table = {
    "forward": {128: Blocks(128, 64, 4, 1), 256: Blocks(128, 32, 4, 1)},
    "keys": {64: Blocks(64, 128, 4, 1), 128: Blocks(32, 128, 4, 1), 256: Blocks(16, 64, 4, 1)},
    "queries": {64: Blocks(128, 64, 4, 1), 128: Blocks(128, 32, 4, 1), 256: Blocks(128, 16, 4, 1)},
}
CDNA_BIASED: Table = {
    "forward": {128: Blocks(128, 32, 4, 1), 256: Blocks(128, 16, 4, 1)},
    "keys": {128: Blocks(16, 64, 2, 1), 256: Blocks(16, 64, 4, 1)},
    "queries": {128: Blocks(128, 32, 4, 1), 256: Blocks(128, 16, 4, 1)},
    "bias": {256: Blocks(64, 64, 4, 1)},
}
# Without tensor cores products take registers for both operands.
FLOAT32: Table = {
    "forward": {64: Blocks(64, 32, 8, 1), 128: Blocks(32, 16, 8, 1), 256: Blocks(16, 16, 8, 1)},
    "keys": {256: Blocks(16, 16, 8, 1)},
    "queries": {64: Blocks(32, 32, 8, 1), 256: Blocks(16, 16, 8, 1)},
    "bias": {256: Blocks(16, 16, 8, 1)},
}
CDNA_FLOAT32: Table = {
    "forward": {128: Blocks(128, 16, 4, 1), 256: Blocks(64, 16, 4, 1)},
    "keys": {64: Blocks(16, 128, 4, 1), 128: Blocks(16, 64, 4, 1), 256: Blocks(16, 32, 4, 1)},
    "queries": {64: Blocks(128, 16, 4, 1), 128: Blocks(64, 16, 4, 1), 256: Blocks(16, 16, 2, 1)},
    "bias": {128: Blocks(64, 64, 4, 1), 256: Blocks(16, 16, 2, 1)},
}
# Several tiles for a few dozen events, so that tests on short sequences reach every path.
INTERPRETED: Table = {
    "forward": {256: Blocks(32, 32)},
    "keys": {256: Blocks(32, 32)},
    "queries": {256: Blocks(16, 32)},
    "bias": {256: Blocks(32, 32)},
}


def blocks_of(kernel: str, target: str, width: int, dtype: torch.dtype, *, biased: bool) -> Blocks:
    """The tiles of a kernel for heads of this width, at most 256."""
    sizes = table_of(target, dtype, biased)[kernel]
    return sizes[min(limit for limit in sizes if limit >= width)]


def table_of(target: str, dtype: torch.dtype, biased: bool) -> Table:
    """The tiles of all kernels for a device."""
    if target == INTERPRETER:
        return INTERPRETED
    is_amd = target.startswith("gfx")
    if dtype == torch.float32:
        return CDNA_FLOAT32 if is_amd else FLOAT32
    if is_amd:
        return CDNA_BIASED if biased else CDNA
    if target == "sm_90":
        return HOPPER_BIASED if biased else HOPPER
    if target in ("sm_100", "sm_103"):
        return BLACKWELL_BIASED if biased else BLACKWELL
    return AMPERE_BIASED if biased else AMPERE


def target_of(device: torch.device) -> str:
    """What kernels for this device are compiled for, such as sm_90 or gfx942."""
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
