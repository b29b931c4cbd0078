"""Measure tiles of the Triton attention on the device that runs it, and keep those that beat the built-in tables.

Of all sizes those are timed that can be expected to fit and that, compiled with all mask parameters, targets, a scale
per query and the bias if there is one, spill nothing. Results must agree with those of the built-in tiles, on a causal
problem and on one with all of these.
"""

# T = events of all sequences, N = length of the longest sequence, H = heads, D = head width

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from .bench import WrongResults
from .hstu_attention.operator import Problem
from .hstu_attention.triton_blocks import Blocks, blocks_of
from .hstu_attention.triton_launch import MAX_REGISTERS
from .hstu_attention.triton_padding import padded_problem
from .hstu_attention.triton_tuned import Shape
from .static_report import ALL_MASKS, Setting, lanes_of, launch_of, problem_of, usage_of

NUM_SEQUENCES, NUM_HEADS, NUM_TIME_BUCKETS = 8, 4, 128
LEAST_GAIN = 0.02
"""Of the time, below which a difference may be chance: then the built-in tiles stay."""
SIZES, STAGES = (16, 32, 64, 128), (1, 2, 3)
WARPS, WAVEFRONTS = (4, 8), (2, 4, 8)
VECTOR_REGISTERS = 512
"""As many as a thread of an AMD device can have."""
WIDE_SUMS = {"forward": (1, 0), "keys": (0, 2), "queries": (1, 0), "bias": (0, 0)}
"""Sums of a head's width that a kernel holds, for each row and for each key of its tile."""
TENSOR_MEMORY_COLUMNS = 512
"""Of sm_100; other devices have none."""
TILES_OF_SCORES = {"forward": 2, "keys": 3, "queries": 3, "bias": 3}
"""How many values of a score live at once."""


@dataclass(frozen=True)
class Choice:
    """The fastest tiles for a shape, and the built-in ones, which may be the same."""

    shape: Shape
    blocks: Blocks
    seconds: float
    builtin_blocks: Blocks
    builtin_seconds: float
    num_timed: int
    """Sizes, the built-in ones included."""


def shapes_of(width: int, dtype: torch.dtype) -> Iterator[Shape]:
    """Every kernel with and without a bias."""
    for biased in (False, True):
        for kernel in ("forward", "keys", "queries", *(["bias"] if biased else [])):
            yield Shape(kernel, str(dtype).removeprefix("torch."), width, biased)


def candidates_of(shape: Shape, target: str) -> list[Blocks]:
    """Sizes whose sums and scores leave registers for the rest; no two of them say the same."""
    found, is_nvidia = [], target.startswith("sm_")
    warps, most_registers = (WARPS, MAX_REGISTERS) if is_nvidia else (WAVEFRONTS, VECTOR_REGISTERS)
    for rows, keys, num_warps, num_stages in product(SIZES, SIZES, warps, STAGES):
        per_row, per_key = WIDE_SUMS[shape.kernel]
        num_values = shape.width * (per_row * rows + per_key * keys) + TILES_OF_SCORES[shape.kernel] * rows * keys
        num_threads = lanes_of(target) * num_warps
        fits = num_values / num_threads <= most_registers and rows * keys >= num_threads
        if fits and (rows == keys or shape.kernel != "bias"):
            found.append(Blocks(rows, keys, num_warps, num_stages))
    return found


def tune(
    shape: Shape,
    problem: Problem,
    target: str,
    *,
    candidates: Iterable[Blocks],
    is_clean: Callable[[Shape, str, Blocks], bool],
    seconds_of: Callable[[Callable[[], None]], float],
) -> Choice:
    """Time the built-in tiles and all candidates that compile cleanly on a problem of the shape.

    Raises:
        WrongResults: the fastest tiles compute something else than the built-in ones.
    """
    builtin = blocks_of(shape.kernel, target, shape.width, problem.q.dtype, biased=shape.biased)
    seconds = {builtin: seconds_of(launch_of(shape.kernel, problem, target, builtin)[0].start)}
    for blocks in candidates:
        if blocks != builtin and is_clean(shape, target, blocks):
            seconds[blocks] = seconds_of(launch_of(shape.kernel, problem, target, blocks)[0].start)
    best = min(seconds, key=lambda blocks: seconds[blocks])
    if seconds[best] > (1 - LEAST_GAIN) * seconds[builtin]:
        best = builtin
    for each in (problem, everything(problem)):
        _check(shape, each, target, best, builtin)
    return Choice(shape, best, seconds[best], builtin, seconds[builtin], len(seconds))


def compiles_cleanly(shape: Shape, target: str, blocks: Blocks) -> bool:
    """Whether tiles fit the device and spill nothing, with all that a kernel can be asked for."""
    setting = Setting(shape.width, ALL_MASKS, True, shape.biased, getattr(torch, shape.dtype))
    launch, _ = launch_of(shape.kernel, padded_problem(problem_of(setting)), target, blocks)
    try:
        compiled = launch.compile()
    # What Triton says of tiles that are too large, or that it cannot lower.
    except (CompilationError, OutOfResources, RuntimeError):
        return False
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    most_shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    return (
        usage_of(compiled).spilled == 0
        and compiled.metadata.shared <= most_shared
        and tensor_memory <= TENSOR_MEMORY_COLUMNS
    )


def problem_for(shape: Shape, length: int, device: str) -> Problem:
    """Sequences of N/4 to N events, causal; with a bias both parts of it, as in the published models."""
    generator = torch.Generator().manual_seed(0)
    lengths = [length, *torch.randint(length // 4, length + 1, (NUM_SEQUENCES - 1,), generator=generator).tolist()]
    num_events = sum(lengths)
    q, k, v = torch.randn(3, num_events, NUM_HEADS, shape.width, generator=generator).to(
        device, getattr(torch, shape.dtype)
    )
    position_weight = torch.randn(2 * length - 1, generator=generator).to(device)
    time_weight = torch.randn(NUM_TIME_BUCKETS + 1, generator=generator).to(device)
    timestamps = torch.randint(0, 10**7, (num_events,), generator=generator).sort().values.to(device)
    return Problem(
        q,
        k,
        v,
        torch.full((1,), 1 / length, device=device).expand(num_events),
        position_weight=position_weight if shape.biased else None,
        time_weight=time_weight if shape.biased else None,
        timestamps=timestamps if shape.biased else None,
        query_timestamps=None,
        offsets=torch.tensor([0, *lengths]).cumsum(0).to(device),
        num_targets=None,
        max_seq_len=length,
        alpha=shape.width**-0.5,
        rule=[0, 0, 0, 0],
    )


def everything(problem: Problem) -> Problem:
    """A problem with the same events and all that its kernels can be asked for: other paths, with sums of their own."""
    num_events, lengths = len(problem.q), problem.offsets.diff()
    return problem._replace(
        scale=problem.scale * torch.linspace(0.5, 1.5, num_events, device=problem.scale.device),
        num_targets=lengths.clamp(max=3),
        rule=list(ALL_MASKS),
    )


def _check(shape: Shape, problem: Problem, target: str, blocks: Blocks, builtin: Blocks) -> None:
    """Two orders of the same sums in float32, each rounded to the dtype: they differ by a few roundings."""
    if blocks == builtin:
        return
    got, wanted = (_results(shape, problem, target, each) for each in (blocks, builtin))
    for a, b in zip(got, wanted, strict=True):
        error, bound = (a - b).abs().max().item(), 4 * torch.finfo(problem.q.dtype).eps * b.abs().max().item() + 1e-5
        if not error <= bound:
            masks = "all masks" if any(problem.rule) else "a causal mask"
            raise WrongResults(
                f"{shape} with {blocks} and {masks} is {error:.1e} off the built-in tiles, more than {bound:.1e}"
            )


def _results(shape: Shape, problem: Problem, target: str, blocks: Blocks) -> list[Tensor]:
    launch, results = launch_of(shape.kernel, problem, target, blocks)
    launch.start()
    return [x.double() for x in results()]
