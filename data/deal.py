"""Dealing the samples of a step to ranks: equal cost for each, out of as few row groups as possible.

Legend: S = samples of the step.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from .samples import Integers, Numbers

_NEIGHBOURS = 16
"""Samples on either side of a cut that may change sides: they lie in the same row group or in the next, which both
ranks read anyway."""
_EXCHANGES = 3
"""Rounds of exchanges. On Zipf lengths and 8 ranks the first brings the largest load from 1.13 to 1.01 times the mean
at 64 samples per rank; the others help where there are few."""
_NEGLIGIBLE = 256
"""An excess below this part of a rank's share is left alone."""
_EVEN = 1.05
"""Largest load over what is possible, up to which evenness is not worth reading more row groups."""


@dataclass(frozen=True)
class Loads:
    """What a step, or several, cost the ranks, in 1/1024 of a token's."""

    mean: float
    """Over ranks."""
    largest: int
    """Of a rank: all others wait for it."""
    least: float
    """What the largest is at best: the mean, or one sample, where that costs more."""

    def __add__(self, other: Loads) -> Loads:
        return Loads(self.mean + other.mean, self.largest + other.largest, self.least + other.least)


NO_LOADS = Loads(0.0, 0, 0.0)


def loads_of(ranks: Integers, costs: Integers, world_size: int) -> Loads:
    """How samples of these costs were dealt."""
    mean = float(costs.sum() / world_size)
    return Loads(mean, _largest_load(ranks, costs, world_size), max(mean, float(costs.max(initial=0))))


def deal(places: Numbers, costs: Integers, world_size: int) -> Integers:
    """[S] the rank of each sample.

    The slowest rank sets the pace of a step, so costs are balanced and not numbers of samples: a rank may get none.
    Costs are integers, whose sums are exact: all ranks find the same answer, on whatever processor.
    """
    by_place = _deal_by_place(places, costs, world_size)
    largest = _largest_load(by_place, costs, world_size)
    possible = max(costs.sum() / world_size, costs.max(initial=0))
    if largest <= _EVEN * possible:
        return by_place
    longest_first = _deal_longest_first(costs, world_size)
    return longest_first if _largest_load(longest_first, costs, world_size) < largest else by_place


def _largest_load(ranks: Integers, costs: Integers, world_size: int) -> int:
    loads = np.zeros(world_size, np.int64)
    np.add.at(loads, ranks, costs)
    return int(loads.max())


def _deal_by_place(places: Numbers, costs: Integers, world_size: int) -> Integers:
    """Cut the samples, in the order of their places, where every rank has its share of the cost; then make at each cut
    those exchanges across it that bring what lies before it closest to its share.
    """
    order = np.argsort(places, kind="stable")
    sorted_costs = costs[order]
    until = np.concatenate([[0], np.cumsum(sorted_costs)])
    shares = np.arange(1, world_size) * until[-1] // world_size
    cuts = _nearest(until, shares)
    ranks = np.repeat(np.arange(world_size), np.diff(np.concatenate([[0], cuts, [len(costs)]])))
    excess = (until[cuts] - shares).tolist()
    negligible = int(until[-1]) // (world_size * _NEGLIGIBLE)
    for _ in range(_EXCHANGES):
        for rank, cut in enumerate(cuts.tolist()):
            if abs(excess[rank]) > negligible:
                excess[rank] -= _exchange(ranks, sorted_costs, cut, rank, excess[rank])
    dealt = np.empty_like(ranks)
    dealt[order] = ranks
    return dealt


def _nearest(until: Integers, shares: Integers) -> Integers:
    """For each share the number of leading samples whose cost comes closest to it; never fewer than for the last."""
    above = np.minimum(np.searchsorted(until, shares), len(until) - 1)
    below = np.maximum(above - 1, 0)
    return np.where(shares - until[below] < until[above] - shares, below, above)


def _exchange(ranks: Integers, costs: Integers, cut: int, rank: int, excess: int) -> int:
    """Move a sample from `rank` to the next, or one back, or both, so that `rank` loses about `excess`; return what it
    lost.
    """
    begin = max(cut - _NEIGHBOURS, 0)
    nearby = ranks[begin : cut + _NEIGHBOURS]
    left, right = begin + np.flatnonzero(nearby == rank), begin + np.flatnonzero(nearby == rank + 1)
    # Place 0 stands for no sample.
    given, taken = (np.concatenate([[0], costs[places]]) for places in (left, right))
    lost = given[:, None] - taken[None, :]
    give, take = divmod(int(np.argmin(np.abs(excess - lost))), len(taken))
    if give:
        ranks[left[give - 1]] = rank + 1
    if take:
        ranks[right[take - 1]] = rank
    return int(lost[give, take])


def _deal_longest_first(costs: Integers, world_size: int) -> Integers:
    """Each sample, the costliest first, to the rank with the least so far (Graham 1969)."""
    ranks = np.empty(len(costs), np.int64)
    loads = [(0, rank) for rank in range(world_size)]
    for sample in np.argsort(-costs, kind="stable").tolist():
        load, rank = loads[0]
        ranks[sample] = rank
        heapq.heapreplace(loads, (load + int(costs[sample]), rank))
    return ranks
