"""Where in its window a sample stands: random, and as even in cost as can be.

Legend: S = samples.
"""

from __future__ import annotations

import numpy as np

from .samples import Integers, Numbers


def spread(costs: Integers, random: np.random.Generator) -> Numbers:
    """[S] random positions in 0..1, such that any stretch holds its share of the samples of any range of cost.

    In the order of their cost, the samples get the points of a van der Corput sequence whose digits are scrambled by
    nesting (Owen 1995): every 2**k successive ones lie in different stretches of 2**-k. A plain shuffle would leave the
    costs of steps, and of row groups in a step, as uneven as chance does, and ranks would have to fetch from far away
    what evens them out.
    """
    position = np.empty(len(costs))
    points = _scrambled(len(costs), random)
    by_cost = np.lexsort((random.random(len(costs)), costs))
    position[by_cost] = points
    return position


def in_groups(positions: Numbers, costs: Integers, number: int, random: np.random.Generator, *, first: int) -> Integers:
    """[S] the samples in the order of their positions, but those dearer than half the mean in groups of like cost.

    With 8 samples for each of 8 ranks no way of dealing makes up for 17 long ones: one rank gets three. So they come in
    eights. Of each group, every one is from another part of the dataset, S in its order cut in `number`, as ranks
    are dealt neighbours.

    Args:
        number: of samples in a group.
        first: how many samples of the epoch are before these. Groups begin at multiples of `number` in the epoch, and
            between them the others fill as many places: a step that ends at a multiple cuts none in two.
    """
    dear = np.flatnonzero(2 * costs * len(costs) > costs.sum())
    many = len(dear) // number
    parts = [part[np.lexsort((random.random(len(part)), -costs[part]))] for part in np.array_split(dear, number)]
    groups = np.stack([part[:many] for part in parts], axis=1)
    is_grouped = np.zeros(len(costs), bool)
    is_grouped[groups] = True
    others = np.argsort(np.where(is_grouped, np.inf, positions), kind="stable")[: len(costs) - groups.size]
    head, others = np.split(others, [-first % number])
    others, tail = np.split(others, [len(others) // number * number])
    others = others.reshape(-1, number)
    places = np.concatenate([_scrambled(many, random), positions[others[:, number // 2]]])
    rows = np.concatenate([groups, others])[np.argsort(places, kind="stable")]
    return np.concatenate([head, rows.ravel(), tail])


def _scrambled(number: int, random: np.random.Generator) -> Numbers:
    """[number] points of a scrambled van der Corput sequence in 0..1."""
    index = np.arange(number)
    levels = max(number - 1, 0).bit_length()
    points = random.random(number) * 0.5**levels
    for level in range(levels):
        flips = random.integers(0, 2, 2**level)
        points += ((index >> level & 1) ^ flips[index & (2**level - 1)]) * 0.5 ** (level + 1)
    return points
