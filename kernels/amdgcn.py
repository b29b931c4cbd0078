"""The machine code of AMD devices of the CDNA family, from the assembly that Triton keeps."""

import re

from .machine_code import Instruction, Usage

# The first that fits; the rest is integers and moves.
CLASSES = {
    "tensor": r"v_s?mfmac?_\w+",
    "special": r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_\w+",
    "sync": r"s_(waitcnt\w*|barrier|nop|sleep)",
    "memory": r"(ds|global|buffer|flat|scratch)_\w+|s_(buffer_)?load_\w+",
    "control": r"s_\w+|v_readfirstlane_\w+",
    "float": r"v_\w*_b?f(16|32|64)\w*|v_cvt_\w+",
}
"""By name; "float" includes conversions and comparisons, "control" the scalar unit, "sync" whatever waits."""
LINE = re.compile(r"^(?:(\.LBB\w+):|\s+((?:[vs]|ds|global|buffer|flat|scratch)_\w+)[ \t]*([^;\n]*))", re.MULTILINE)


def usage_of(assembly: str) -> Usage:
    """Registers, and what was spilled, of a compiled kernel."""
    fields = r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)"
    found = {name: int(value) for name, value in re.findall(fields, assembly)}
    return Usage(found["vgpr_count"], found["vgpr_spill_count"] + found["private_segment_fixed_size"])


def program_of(assembly: str) -> list[Instruction]:
    """The instructions of a compiled kernel."""
    places: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for label, opcode, operands in LINE.findall(assembly):
        if label:
            places[label] = len(lines)
        else:
            lines.append((opcode, operands.strip()))
    return [_instruction(opcode, operands, places) for opcode, operands in lines]


def _instruction(opcode: str, operands: str, places: dict[str, int]) -> Instruction:
    return Instruction(
        kind=next((kind for kind, names in CLASSES.items() if re.fullmatch(names, opcode)), "integer"),
        target=places.get(operands) if re.match(r"s_c?branch", opcode) else None,
        goes_on=opcode not in ("s_branch", "s_setpc_b64", "s_endpgm"),
        multiply_adds=_multiply_adds(opcode),
    )


def _multiply_adds(opcode: str) -> int:
    shape = re.match(r"v_s?mfmac?_\w*?_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?_", opcode)
    return int(shape[1]) * int(shape[2]) * int(shape[3]) * int(shape[4] or 1) if shape else 0
