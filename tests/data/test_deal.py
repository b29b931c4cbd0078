import heapq

import numpy as np
import pytest

from ultrarec.data.deal import Loads, deal, loads_of


def imbalance(ranks, costs, world_size):
    loads = np.bincount(ranks, costs, world_size)
    return loads.max() / loads.mean()


def zipf_step(seed, *, num_samples=512):
    """Places and costs of a step: Zipf lengths, the attention of which costs half of the longest ones' tokens."""
    random = np.random.default_rng(seed)
    lengths = np.minimum(random.zipf(1.3, num_samples) * 20, 4096)
    return random.random(num_samples), (lengths * 1024 * (1 + lengths / 8192)).astype(np.int64)


def test_ranks_are_dealt_equal_cost_on_zipf_lengths():
    steps = [zipf_step(seed) for seed in range(50)]
    dealt = [imbalance(deal(places, costs, 8), costs, 8) for places, costs in steps]
    in_turn = [imbalance(np.arange(len(costs)) % 8, costs, 8) for _, costs in steps]
    assert np.mean(dealt) <= 1.001
    assert max(dealt) <= 1.005
    assert np.mean(in_turn) > 1.2


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_each_rank_takes_neighbours_in_the_dataset(world_size):
    places, costs = zipf_step(3, num_samples=200 * world_size)
    ranks = deal(places, costs, world_size)
    for rank in range(world_size):
        own = np.sort(places[ranks == rank])
        # 32 samples on either side may come from beyond the cut.
        assert own[-1] - own[0] <= own[-33] - own[32] + 2 * 66 / (200 * world_size)


def largest_by_differencing(costs, world_size):
    """Karmarkar and Karp's method as it is told: the two parts with the largest differences are joined head to tail."""
    parts = [(-cost, number, [cost] + [0] * (world_size - 1)) for number, cost in enumerate(costs.tolist())]
    heapq.heapify(parts)
    for number in range(len(costs), 2 * len(costs) - 1):
        (_, _, loads), (_, _, others) = heapq.heappop(parts), heapq.heappop(parts)
        joined = sorted((a + b for a, b in zip(loads, reversed(others), strict=True)), reverse=True)
        heapq.heappush(parts, (joined[-1] - joined[0], number, joined))
    return parts[0][2][0]


LENGTHS = {
    "zipf": lambda random, number: np.minimum(random.zipf(1.3, number) * 20, 4096),
    "log-normal": lambda random, number: np.clip(random.lognormal(5, 1, number), 2, 4096).astype(int),
    "uniform": lambda random, number: random.integers(1, 4097, number),
    "few different": lambda random, number: random.integers(1, 6, number),
}


@pytest.mark.parametrize("lengths_of", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("world_size", [2, 3, 5, 8, 16])
def test_no_step_is_dealt_worse_than_by_karmarkar_and_karp(world_size, lengths_of):
    for seed in range(24):
        random = np.random.default_rng(seed)
        number = int(world_size * 2.0 ** random.uniform(0, 5))
        lengths = lengths_of(random, number)
        costs = (lengths * 1024 * (1 + lengths / 1000 * (seed % 2))).astype(np.int64)
        loads = np.bincount(deal(random.random(number), costs, world_size), costs, world_size)
        possible = max(costs.sum() / world_size, costs.max())
        assert loads.sum() == costs.sum()
        assert loads.max() <= max(largest_by_differencing(costs, world_size), possible * (1 + 1 / 4096))


def test_few_long_samples_are_dealt_evenly_wherever_they_lie():
    costs = np.array([7, 1, 7, 1, 7, 1, 7, 1]) * 1024
    assert np.bincount(deal(np.arange(8) / 8, costs, 4), costs).tolist() == [8192] * 4


def test_a_sample_dearer_than_a_share_leaves_the_others_balanced():
    costs = np.array([50, *[1] * 90]) * 1024
    loads = np.bincount(deal(np.arange(91) / 91, costs, 10), costs, 10) / 1024
    assert np.sort(loads)[-1] == 50
    assert np.sort(loads)[-2] <= 15


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("num_samples", [0, 1, 5, 8, 61])
def test_each_sample_has_one_rank(world_size, num_samples):
    places, costs = zipf_step(0, num_samples=num_samples)
    ranks = deal(places, costs, world_size)
    assert ranks.shape == (num_samples,)
    assert set(ranks.tolist()) <= set(range(world_size))


def test_how_evenly_a_step_was_dealt_is_told_beside_what_was_possible():
    costs = np.array([60, 10, 10, 10, 10])
    loads = loads_of(np.array([0, 1, 1, 2, 2]), costs, 4)
    assert loads == Loads(mean=25, largest=60, least=60)
    assert loads + loads_of(np.array([0, 0, 1]), np.array([4, 4, 4]), 4) == Loads(mean=28, largest=68, least=64)
    assert loads_of(np.zeros(0, np.int64), np.zeros(0, np.int64), 4) == Loads(0, 0, 0)
