"""The work of one thread: some of the matrices of a group, and how their scores are made."""

# T = events of all sequences, D = head width, G = sequences of a group, L = length of its longest, M = matrices of a
# part or of a batch of it, R = queries and C = keys of a strip

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from .operator import Problem
from .plan import Batch, GroupPlan, Plan, plan_of
from .products import multiplies_bfloat16, product
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

    def batches(self) -> Iterator[slice]:
        """The matrices, counted from the first of the part, that are multiplied together."""
        num = self.matrices.stop - self.matrices.start
        step = num if self.plan.group.is_short else 1
        return (slice(start, start + step) for start in range(0, num, step))

    def rows_of(self, x_THD: Tensor) -> Tensor:
        """`[M, L, D]`."""
        return self.plan.group.rows_of(x_THD, self.matrices)

    def matmul_dtype(self, x: Tensor) -> torch.dtype:
        """In which dtype x is multiplied: bfloat16 if that is faster, otherwise what sums run in."""
        if x.dtype is torch.bfloat16 and not self.plan.group.is_short and multiplies_bfloat16(x):
            return torch.bfloat16
        return sum_dtype(x)

    def scores(self, strip: Strip, q_MRD: Tensor, k_MCD: Tensor, bias_GRC: Tensor | None) -> Tensor:
        """The scores of a strip, in the dtype of the bias if there is one; SiLU makes zeros of the hidden ones."""
        scores_MRC = product(q_MRD, k_MCD.mT)
        if bias_GRC is not None:
            scores_MRC = scores_MRC.to(bias_GRC.dtype)
            self._by_sequence(scores_MRC).add_(bias_GRC[:, None])
        self.plan.hide_(strip, scores_MRC)
        return scores_MRC

    def sum_of_heads(self, x_MRC: Tensor) -> Tensor:
        """`[G, R, C]`."""
        return self._by_sequence(x_MRC).sum(1)

    def _by_sequence(self, x_MRC: Tensor) -> Tensor:
        return x_MRC.view(-1, self.heads_at_once, *x_MRC.shape[1:])


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


def scaled(x_MRD: Tensor, factor: Tensor | float, dtype: torch.dtype) -> Tensor:
    """A dense copy, multiplied before it is rounded."""
    return (x_MRD.to(sum_dtype(x_MRD)) * factor).to(dtype).contiguous()


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
