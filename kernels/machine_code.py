"""What compiled kernels consist of: instructions of any device, and the loops with tensor instructions among them.

Read from assembly that Triton, or the tools in its wheel, write; no GPU is needed. See sass.py and amdgcn.py.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import accumulate, pairwise

KINDS = ("tensor", "special", "sync", "memory", "control", "float", "integer")
"""Of instructions. "control" includes the unit that computes once for a warp, "float" conversions and comparisons of
floats, "integer" whatever is left: other predicates and moves too."""


@dataclass(frozen=True)
class Instruction:
    """One instruction of a warp, or of a wavefront."""

    kind: str
    """One of KINDS."""
    target: int | None
    """Place in the program of the instruction that it may jump to."""
    goes_on: bool
    """Whether the next instruction may follow."""
    multiply_adds: int = 0
    """Of a tensor instruction, done for this warp; 0 where the opcode does not tell."""


@dataclass(frozen=True)
class Usage:
    """What a thread takes."""

    registers: int
    """Vector registers on AMD devices."""
    spilled: int
    """Bytes of stack; on AMD devices spilled registers and bytes of scratch memory. Not counted are the scalars, once
    for a wavefront, that AMD's compiler keeps in lanes of vector registers."""


def tensor_loops(program: list[Instruction]) -> list[list[Instruction]]:
    """The bodies of the innermost loops with tensor instructions, in the order of the program."""
    blocks = _basic_blocks(program)
    has_tensor = [any(x.kind == "tensor" for x in block) for block in blocks]
    loops = [body for body in _natural_loops(_successors(blocks)) if any(has_tensor[b] for b in body)]
    innermost = [body for body in loops if not any(other < body for other in loops)]
    return [[x for b in sorted(body) for x in blocks[b]] for body in sorted(innermost, key=min)]


def counts_of(body: list[Instruction]) -> Counter[str]:
    """How many instructions of each kind."""
    return Counter(x.kind for x in body)


def _basic_blocks(program: list[Instruction]) -> list[list[Instruction]]:
    starts = {0, len(program)}
    for place, x in enumerate(program):
        if x.target is not None:
            starts |= {x.target, place + 1}
        elif not x.goes_on:
            starts.add(place + 1)
    return [program[start:stop] for start, stop in pairwise(sorted(starts))]


def _successors(blocks: list[list[Instruction]]) -> list[set[int]]:
    starts = dict(zip(accumulate((len(block) for block in blocks), initial=0), range(len(blocks) + 1), strict=True))
    after: list[set[int]] = []
    for b, block in enumerate(blocks):
        last = block[-1]
        jumps = set() if last.target is None else {starts[last.target]}
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
