"""Dealing the samples of a step to ranks: equal cost for each, out of as few row groups as possible.

Legend: S = samples of the step, W = ranks.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .samples import Integers, Numbers

_NEIGHBOURS = 32
"""Samples on either side of a cut that may change sides: they lie in the same row group or in the next, which both
ranks read anyway."""
_EXCHANGES = (1, 1, 1, 1, 2, 2, 2)
"""Samples of either side that each round of exchanges moves at most: single ones make up for a long sample at the cut,
pairs for the last thousandth. On Zipf lengths whose pairs cost 0.001 tokens, 8 ranks and 64 samples for each, 20 steps
of 20 come within `_EVEN`; with 16 neighbours and rounds of 1, 2 and 3 samples 8 did."""
_EVEN = 1 / 4096
"""An excess over what is possible, as a part of it, that is left alone: of a step of a second, 0.2 ms."""


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
    The largest load is at most that of Karmarkar and Karp's differencing method, or within 1/4096 of the least that
    any dealing reaches. Costs are integers, whose sums are exact: all ranks find the same answer, on whatever
    processor.
    """
    if world_size == 1:
        return np.zeros(len(costs), np.int64)
    most = (1 + _EVEN) * max(costs.sum() / world_size, costs.max(initial=0))
    best = _deal_by_place(places, costs, world_size)
    largest = _largest_load(best, costs, world_size)
    # Where there are many samples, the longest first come close in a 25th of the time that differencing takes.
    for deal_otherwise in (_deal_longest_first, _deal_by_difference):
        if largest <= most:
            break
        ranks = deal_otherwise(costs, world_size)
        load = _largest_load(ranks, costs, world_size)
        if load < largest:
            best, largest = ranks, load
    return best


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
    # A rank has two cuts.
    negligible = int(until[-1] / world_size * _EVEN / 2)
    for most in _EXCHANGES:
        for rank, cut in enumerate(cuts.tolist()):
            if abs(excess[rank]) > negligible:
                excess[rank] -= _exchange(ranks, sorted_costs, cut, rank, excess=excess[rank], most=most)
    dealt = np.empty_like(ranks)
    dealt[order] = ranks
    return dealt


def _nearest(until: Integers, shares: Integers) -> Integers:
    """For each share the number of leading samples whose cost comes closest to it; never fewer than for the last."""
    above = np.minimum(np.searchsorted(until, shares), len(until) - 1)
    below = np.maximum(above - 1, 0)
    return np.where(shares - until[below] < until[above] - shares, below, above)


def _exchange(ranks: Integers, costs: Integers, cut: int, rank: int, *, excess: int, most: int) -> int:
    """Move up to `most` samples from `rank` to the next, and as many back, so that `rank` loses about `excess`; return
    what it lost.
    """
    begin = max(cut - _NEIGHBOURS, 0)
    nearby = ranks[begin : cut + _NEIGHBOURS]
    left, right = begin + np.flatnonzero(nearby == rank), begin + np.flatnonzero(nearby == rank + 1)
    of_left, of_right = _subsets(len(left), most), _subsets(len(right), most)
    given, taken = of_left @ costs[left], of_right @ costs[right]
    # For everything that may be given, what is best taken for it: one of the two next to what would be right.
    by_cost = np.argsort(taken, kind="stable")
    above = np.minimum(np.searchsorted(taken[by_cost], given - excess), len(taken) - 1)
    pairs = by_cost[np.stack([np.maximum(above - 1, 0), above])]
    lost = given - taken[pairs]
    side, give = divmod(int(np.argmin(np.abs(excess - lost))), len(given))
    ranks[left[of_left[give] > 0]] = rank + 1
    ranks[right[of_right[pairs[side, give]] > 0]] = rank
    return int(lost[side, give])


@lru_cache(maxsize=256)
def _subsets(number: int, most: int) -> Integers:
    """[subsets, number] 1 for each member, of all subsets of so many things that have at most `most` members."""
    members = [subset for size in range(most + 1) for subset in itertools.combinations(range(number), size)]
    subsets = np.zeros((len(members), number), np.int64)
    for row, subset in zip(subsets, members, strict=True):
        row[list(subset)] = 1
    return subsets


def _deal_longest_first(costs: Integers, world_size: int) -> Integers:
    """Each sample, the costliest first, to the rank with the least so far (Graham 1969)."""
    ranks = np.empty(len(costs), np.int64)
    loads = [(0, rank) for rank in range(world_size)]
    for sample in np.argsort(-costs, kind="stable").tolist():
        load, rank = loads[0]
        ranks[sample] = rank
        heapq.heapreplace(loads, (load + int(costs[sample]), rank))
    return ranks


def _deal_by_difference(costs: Integers, world_size: int) -> Integers:
    """The differencing method (Karmarkar and Karp 1982): of all parts of the dealing, each of which has W loads, at
    first one for each sample, join the two whose loads differ most, the largest load of one with the least of the
    other, until one is left.
    """
    num_samples = len(costs)
    singles = np.zeros((num_samples, world_size), np.int64)
    singles[:, -1] = costs
    # Only differences matter, so the least load of a part counts as 0; its number decides between equals.
    parts = [(-int(cost), number, loads) for number, (cost, loads) in enumerate(zip(costs, singles, strict=True))]
    heapq.heapify(parts)
    joined: list[tuple[int, int, Integers]] = []
    while len(parts) > 1:
        _, first, loads = heapq.heappop(parts)
        _, second, others = parts[0]
        loads = loads + others[::-1]
        order = np.argsort(loads, kind="stable")
        loads = loads[order] - loads[order[0]]
        heapq.heapreplace(parts, (-int(loads[-1]), num_samples + len(joined), loads))
        joined.append((first, second, order))
    return _ranks_of_parts(joined, num_samples, world_size)


def _ranks_of_parts(joined: list[tuple[int, int, Integers]], num_samples: int, world_size: int) -> Integers:
    """[S] from the last part back: which rank has each load of the parts that it was joined from.

    Args:
        joined: numbers of two parts, the samples before all others, and the order in which their loads then stand.
    """
    ranks = np.empty((num_samples + len(joined), world_size), np.int64)
    ranks[-1:] = np.arange(world_size)
    for number in range(len(joined) - 1, -1, -1):
        first, second, order = joined[number]
        ranks[first, order] = ranks[num_samples + number]
        ranks[second] = ranks[first, ::-1]
    return ranks[:num_samples, -1]
