"""The machine code of NVIDIA devices, from the disassembly that the tools in Triton's wheel make."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton

from .machine_code import Instruction, Usage

# The first that fits; the rest is integers and predicates.
CLASSES = {
    "tensor": r"[HIQ]G?MMA|UTC\w*MMA",
    "special": r"MUFU",
    "sync": r"BAR|B[12]R|BSSY|BSYNC|\w*DEPBAR|SYNCS|WARP\w*|UTMACMDFLUSH|UTCBAR|FENCE|MEMBAR|\w*ERRBAR|NANOSLEEP|ELECT|"
    r"ARRIVES",
    "memory": r"LD\w*|ST\w*|RED\w*|ATOM\w*|UTMA\w*|UBLK\w*|CCTL|SHFL|MOVM",
    "control": r"U\w+|BRA|BRX|EXIT|NOP|CALL|RET|YIELD|BREAK|R2UR|S2UR",
    "float": r"F(?!LO)\w+|H\w+2",
}
"""Kinds of instructions by name; "float" includes packed halves, "control" the uniform datapath."""
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
WARPS_OF_A_GROUP = 4


def usage_of(cubin: bytes) -> Usage:
    """Registers and stack of a compiled kernel."""
    fields = re.findall(r"(REG|STACK|LOCAL):(\d+)", _cuobjdump("-res-usage", cubin))
    found = {name: int(value) for name, value in fields}
    return Usage(found["REG"], found["STACK"] + found["LOCAL"])


def program_of(cubin: bytes) -> list[Instruction]:
    """The instructions of a compiled kernel."""
    lines = INSTRUCTION.findall(_cuobjdump("-sass", cubin))
    places = {int(address, 16): place for place, (address, *_) in enumerate(lines)}
    return [_instruction(opcode, operands, bool(predicate), places) for _, predicate, opcode, operands in lines]


def _instruction(opcode: str, operands: str, is_predicated: bool, places: dict[int, int]) -> Instruction:
    name = opcode.split(".")[0]
    is_conditional = is_predicated or bool(re.match(r"!?U?P\d", operands))
    addresses = re.findall(r"0x([0-9a-f]+)", operands) if name == "BRA" else []
    return Instruction(
        kind=next((kind for kind, names in CLASSES.items() if re.fullmatch(names, name)), "integer"),
        target=places.get(int(addresses[-1], 16)) if addresses else None,
        goes_on=name not in ("BRA", "EXIT", "RET") or is_conditional,
        multiply_adds=_multiply_adds(name, opcode),
    )


def _multiply_adds(name: str, opcode: str) -> int:
    if name == "HGMMA":
        shape, warps = re.search(r"\.(\d+)x(\d+)x(\d+)", opcode), WARPS_OF_A_GROUP
    else:
        shape, warps = re.search(r"\.(16)(8)(16|8)\b", opcode) if name == "HMMA" else None, 1
    return int(shape[1]) * int(shape[2]) * int(shape[3]) // warps if shape else 0


def _cuobjdump(option: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
