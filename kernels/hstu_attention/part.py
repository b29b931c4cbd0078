"""The work of one thread: some of the matrices of a group, and how their scores are made."""

# T = events of all sequences, D = head width, G = sequences of a group, L = length of its longest, M = matrices of a
# part, R = queries and C = keys of a strip. What is multiplied together is a batch: one matrix of a long sequence, or
# all those of a part of short ones, in tensors with a dimension M before those that names tell.

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from ..pages import in_huge_pages
from ..products import multiplies_bfloat16, product
from .band import Band, multiplies_blocks
from .operator import Problem
from .packing import Output
from .plan import Batch, GroupPlan, Plan, plan_of
from .tile_bias import TileBias
from .tiles import Strip
from .workers import run_all

WORTH_THREADS = 1 << 26
"""Multiplications of a product over all scores from which threads of our own pay: starting them takes 0.2 ms."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Part:
    """Some of the G * H matrices of a group: all of them, or some heads of its only sequence."""

    plan: GroupPlan
    matrices: slice
    heads_at_once: int
    """Matrices of one sequence that are multiplied together."""

    def split(self, x_MLD: Tensor) -> tuple[Tensor, ...]:
        """The batches: all matrices `[M, L, D]` of a short group together, of a long one each `[L, D]` alone."""
        return (x_MLD,) if self.plan.group.is_short else x_MLD.unbind(0)

    def rows_of(self, x_THD: Tensor) -> tuple[Tensor, ...]:
        """`[L, D]` of each batch, views of the long ones."""
        return self.split(self.plan.group.rows_of(x_THD, self.matrices))

    def scale_of(self, scale_T: Tensor) -> tuple[Tensor, ...]:
        """`[L, 1]` of each batch, of one number per event."""
        return self.split(self.plan.group.scale_rows(scale_T, self.matrices))

    def outputs_of(self, output: Output) -> tuple[Tensor, ...]:
        """Where each batch `[L, D]` of an output is to be written."""
        return self.split(output.part_of(self.plan.group, self.matrices))

    def matmul_dtype(self, x: Tensor) -> torch.dtype:
        """In which dtype x is multiplied: bfloat16 if that is faster, otherwise what sums run in."""
        if x.dtype is torch.bfloat16 and not self.plan.group.is_short and multiplies_bfloat16(x):
            return torch.bfloat16
        return sum_dtype(x)

    def band_of(self, problem: Problem) -> Band | None:
        """The band of the sequence, if its part is computed as one; strips begin where it ends."""
        band = self.plan.band
        return band if band is not None and multiplies_blocks(band, problem) else None

    def scores(self, strip: Strip, q_RD: Tensor, k_CD: Tensor, bias_GRC: Tensor | None) -> Tensor:
        """The scores `[R, C]` of a strip, in the dtype of the bias if there is one; hidden ones are zero."""
        scores_RC = product(q_RD, k_CD.mT)
        if bias_GRC is not None:
            scores_RC = scores_RC.to(bias_GRC.dtype)
            self._by_sequence(scores_RC).add_(bias_GRC[:, None])
        self.plan.hide_(strip, scores_RC)
        return scores_RC

    def sum_of_heads(self, x_RC: Tensor) -> Tensor:
        """`[G, R, C]`."""
        return self._by_sequence(x_RC).sum(1)

    def _by_sequence(self, x_RC: Tensor) -> Tensor:
        return x_RC.view(-1, self.heads_at_once, *x_RC.shape[-2:])


def at(x_LD: Tensor, events: slice) -> Tensor:
    """Some of the events of a batch."""
    return x_LD.narrow(-2, events.start, events.stop - events.start)


def run_parts(problem: Problem, plan: Plan, work: Callable[[Part], Result]) -> list[Result]:
    """Do the work of all parts, on several threads if there is enough of it."""
    parts = _parts(problem, plan.groups)
    num_scores = sum(group.group.tokens_GL.numel() * group.group.length for group in plan.groups) * problem.q.shape[1]
    if num_scores * problem.q.shape[2] < WORTH_THREADS:
        return [work(part) for part in parts]
    return run_all([partial(work, part) for part in parts])


def tile_bias(problem: Problem) -> TileBias | None:
    """The bias of a problem, with sums of gradients that start at zero."""
    if problem.bias is None:
        return None
    return TileBias(problem.position_weight, problem.time_weight, problem.max_seq_len, sum_dtype(problem.q))


def scaled(x_RD: Tensor, factor: Tensor | float, dtype: torch.dtype) -> Tensor:
    """A dense copy, multiplied before it is rounded."""
    copy_RD = in_huge_pages(torch.empty(x_RD.shape, dtype=dtype, device=x_RD.device))
    return torch.mul(x_RD.to(sum_dtype(x_RD)), factor, out=copy_RD)


def sum_dtype(x: Tensor) -> torch.dtype:
    """In which dtype sums over strips of x run."""
    return torch.promote_types(x.dtype, torch.float32)


def plan_for(problem: Problem) -> Plan:
    """The plan of a problem's batch."""
    time_weight = problem.time_weight
    return plan_of(
        Batch(
            offsets=problem.offsets,
            num_targets=problem.num_targets,
            timestamps=None if time_weight is None else problem.timestamps,
            query_timestamps=None if time_weight is None else problem.query_timestamps,
            num_buckets=0 if time_weight is None else len(time_weight) - 1,
            num_heads=problem.q.shape[1],
            max_seq_len=problem.max_seq_len,
            num_events=problem.q.shape[0],
            mask=problem.mask,
            device=problem.q.device,
        )
    )


def _parts(problem: Problem, plans: list[GroupPlan]) -> list[Part]:
    """The work in parts, largest first: a group each, or a head of a long sequence.

    Heads that share a bias stay together unless threads would have nothing to do.
    """
    num_heads = problem.q.shape[1]
    parts = []
    for plan in plans:
        if plan.group.is_short:
            parts.append(Part(plan, slice(0, len(plan.group.sequences) * num_heads), num_heads))
            continue
        num_parts = num_heads
        if problem.bias is not None:
            num_parts = min(num_heads, -(-torch.get_num_threads() // len(plans)))
        cuts = [n * num_heads // num_parts for n in range(num_parts + 1)]
        parts += [Part(plan, slice(*cut), 1) for cut in pairwise(cuts)]
    return parts
