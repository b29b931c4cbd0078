"""What an NVIDIA kernel consists of once compiled: registers, stack, and the instructions of its loops over tiles.

Read from the disassembly that the tools in Triton's wheel make; no GPU is needed.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import triton

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
"""Kinds of instructions by name; "float" includes packed halves and conversions, "control" the uniform datapath."""
KINDS = (*CLASSES, "integer")
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
WARPS_OF_A_GROUP = 4


@dataclass(frozen=True)
class Instruction:
    """One instruction of a warp."""

    address: int
    opcode: str
    operands: str
    is_conditional: bool

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    @cached_property
    def kind(self) -> str:
        """One of KINDS."""
        return next((kind for kind, names in CLASSES.items() if re.fullmatch(names, self.name)), "integer")

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.findall(r"0x([0-9a-f]+)", self.operands) if self.name == "BRA" else []
        return int(found[-1], 16) if found else None

    @property
    def goes_on(self) -> bool:
        """Whether the next instruction may follow."""
        return self.name not in ("BRA", "EXIT", "RET") or self.is_conditional

    def multiply_adds(self, num_warps: int) -> int:
        """Of a tensor instruction, done by all warps of a program together; 0 where the opcode does not tell."""
        if self.name == "HGMMA":
            shape = re.search(r"\.(\d+)x(\d+)x(\d+)", self.opcode)
            issued = num_warps // WARPS_OF_A_GROUP
        else:
            shape, issued = re.search(r"\.(16)(8)(16|8)\b", self.opcode) if self.name == "HMMA" else None, num_warps
        return issued * int(shape[1]) * int(shape[2]) * int(shape[3]) if shape else 0


@dataclass(frozen=True)
class Usage:
    """What a thread takes."""

    registers: int
    stack_bytes: int
    """Spilled registers, mostly."""


def usage_of(cubin: bytes) -> Usage:
    """Registers and stack of a compiled kernel."""
    found = {
        name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", _cuobjdump("-res-usage", cubin))
    }
    return Usage(found["REG"], found["STACK"] + found["LOCAL"])


def tensor_loops(cubin: bytes) -> list[list[Instruction]]:
    """The bodies of the innermost loops with tensor instructions, in the order of the program."""
    code = [
        Instruction(int(address, 16), opcode, operands, bool(predicate) or bool(re.match(r"!?U?P\d", operands)))
        for address, predicate, opcode, operands in INSTRUCTION.findall(_cuobjdump("-sass", cubin))
    ]
    blocks = _basic_blocks(code)
    has_tensor = [any(x.kind == "tensor" for x in block) for block in blocks]
    loops = [body for body in _natural_loops(_successors(blocks)) if any(has_tensor[b] for b in body)]
    innermost = [body for body in loops if not any(other < body for other in loops)]
    return [[x for b in sorted(body) for x in blocks[b]] for body in sorted(innermost, key=min)]


def counts_of(body: list[Instruction]) -> Counter[str]:
    """How many instructions of each kind."""
    return Counter(x.kind for x in body)


def _cuobjdump(option: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def _basic_blocks(code: list[Instruction]) -> list[list[Instruction]]:
    places = {x.address: place for place, x in enumerate(code)}
    starts = {0, len(code)}
    for place, x in enumerate(code):
        if x.name in ("BRA", "EXIT", "RET"):
            starts.add(place + 1)
        if x.target in places:
            starts.add(places[x.target])
    return [code[start:stop] for start, stop in pairwise(sorted(starts))]


def _successors(blocks: list[list[Instruction]]) -> list[set[int]]:
    starts = {block[0].address: b for b, block in enumerate(blocks)}
    after: list[set[int]] = []
    for b, block in enumerate(blocks):
        last = block[-1]
        jumps = {starts[last.target]} if last.target in starts else set()
        after.append(jumps | ({b + 1} if last.goes_on and b + 1 < len(blocks) else set()))
    return after


def _natural_loops(after: list[set[int]]) -> list[set[int]]:
    """The blocks of each loop: those that reach a jump back to a block that every way to the jump has passed."""
    before: list[set[int]] = [{a for a, targets in enumerate(after) if b in targets} for b in range(len(after))]
    dominators = _dominators(before)
    loops: dict[int, set[int]] = {}
    for end, targets in enumerate(after):
        for head in targets & dominators[end]:
            body, todo = loops.setdefault(head, {head}), [end]
            while todo:
                block = todo.pop()
                if block not in body:
                    body.add(block)
                    todo.extend(before[block])
    return list(loops.values())


def _dominators(before: list[set[int]]) -> list[set[int]]:
    """For each block those that every way to it passes."""
    found = [{0}, *(set(range(len(before))) for _ in before[1:])]
    changed = True
    while changed:
        changed = False
        for block in range(1, len(before)):
            passed = [found[b] for b in before[block]]
            now = {block} | (set.intersection(*passed) if passed else set())
            changed |= now != found[block]
            found[block] = now
    return found
