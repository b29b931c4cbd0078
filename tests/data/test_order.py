import itertools
from collections import Counter

import numpy as np
import pytest
from orders import order_of, pairs_cost

from ultrarec.data.deal import NO_LOADS, deal, loads_of
from ultrarec.data.order import LoaderState, Order, StepSize
from ultrarec.data.samples import NextItemSampler, RankingSampler, RowCounts

BY_ROWS, BY_TOKENS, BY_COST = StepSize("rows", 7), StepSize("tokens", 40), StepSize("cost", 60)
SIZES = [BY_ROWS, BY_TOKENS, BY_COST]


GROUP_BEGIN = np.array([0, 9, 10, 18, 25, 30, 36, 41, 50, 55, 60])


def row_counts():
    """60 rows in row groups of 1..9 rows; some rows and one row group have no events."""
    random = np.random.default_rng(5)
    num_events = random.integers(0, 12, 60).astype(np.int32)
    num_train = random.binomial(num_events, 0.7).astype(np.int32)
    num_events[10:18] = num_train[10:18] = 0
    return RowCounts(num_events, num_train, np.minimum(num_events - num_train, 1).astype(np.int32))


def order(*, sampler=None, **options):
    options = {"step_size": BY_ROWS, "groups_per_window": 3, **options}
    return order_of(row_counts(), GROUP_BEGIN, sampler=sampler or RankingSampler(5, 2), **options)


def pairs(samples):
    return list(zip(samples.rows.tolist(), samples.numbers.tolist(), strict=True))


def sequence(order, epoch=0, consumed=0):
    return [pair for step in order.steps(epoch, consumed) for pair in pairs(step.samples)]


def every_sample(order):
    num_samples = order.sampler.num_samples(row_counts(), order.split)
    return [(row, number) for row, many in enumerate(num_samples.tolist()) for number in range(many)]


@pytest.mark.parametrize("step_size", SIZES)
@pytest.mark.parametrize("sampler", [RankingSampler(5, 2), NextItemSampler(5)])
@pytest.mark.parametrize("groups_per_window", [1, 3, 99])
def test_an_epoch_holds_each_sample_exactly_once(step_size, sampler, groups_per_window):
    mixed = order(step_size=step_size, sampler=sampler, groups_per_window=groups_per_window)
    assert Counter(sequence(mixed, epoch=2)) == Counter(every_sample(mixed))
    assert mixed.num_samples == len(every_sample(mixed))


def test_each_row_group_is_in_exactly_one_window():
    windows = order().windows(epoch=4)
    assert sorted(np.concatenate(windows).tolist()) == list(range(10))
    assert max(map(len, windows)) == 3


def test_the_same_seed_and_epoch_give_the_same_order_and_others_another():
    first = sequence(order(seed=1), epoch=0)
    assert sequence(order(seed=1), epoch=0) == first
    assert sequence(order(seed=1), epoch=1) != first
    assert sequence(order(seed=2), epoch=0) != first


def test_epochs_differ_inside_a_window_too():
    mixed = order(groups_per_window=99)
    assert sequence(mixed, epoch=0) != sequence(mixed, epoch=1)


def test_samples_of_different_rows_are_mixed_inside_a_window():
    rows = [row for row, _ in sequence(order(groups_per_window=99))]
    assert sum(a == b for a, b in itertools.pairwise(rows)) < len(rows) / 4


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_without_shuffling_each_row_group_keeps_the_order_of_the_dataset(split):
    plain = order(shuffle=False, split=split)
    read = [
        pair for step in plain.steps(0) for pair in zip(step.samples.groups.tolist(), pairs(step.samples), strict=True)
    ]
    assert [pair for _, pair in sorted(read, key=lambda found: found[0])] == every_sample(plain)
    assert sequence(plain, epoch=3) == sequence(plain, epoch=0)


def test_a_step_has_as_many_samples_as_asked_for_and_the_last_the_rest():
    sizes = [len(step.samples) for step in order().steps(0)]
    assert set(sizes[:-1]) == {7}
    assert 0 < sizes[-1] <= 7


def test_a_step_holds_as_many_samples_as_its_tokens_allow():
    by_tokens = order(step_size=BY_TOKENS)
    lengths = [by_tokens.sampler.num_tokens(step.samples.slices) for step in by_tokens.steps(0)]
    assert all(length.sum() <= 40 for length in lengths)
    assert all(length.sum() + after[0] > 40 for length, after in itertools.pairwise(lengths))


def test_a_sample_longer_than_the_tokens_of_a_step_is_a_step_of_its_own():
    tiny = order(step_size=StepSize("tokens", 1))
    assert {len(step.samples) for step in tiny.steps(0)} == {1}
    assert Counter(sequence(tiny)) == Counter(every_sample(tiny))


@pytest.mark.parametrize("step_size", [*SIZES, StepSize("rows", 1000)])
def test_the_number_of_steps_is_known_beforehand(step_size):
    steps = [len(list(order(step_size=step_size).steps(epoch))) for epoch in range(3)]
    assert order(step_size=step_size).num_steps(3) == sum(steps)
    assert order(step_size=step_size).num_steps(3, per_update=2) == sum(-(-number // 2) for number in steps)


@pytest.mark.parametrize("step_size", SIZES)
def test_resuming_after_any_step_gives_the_steps_that_were_left(step_size):
    steps = list(order(step_size=step_size).steps(1))
    for done, step in enumerate(steps[:-1], start=1):
        left = list(order(step_size=step_size).steps(1, step.state.consumed))
        assert [pairs(step.samples) for step in left] == [pairs(step.samples) for step in steps[done:]]
        assert [step.first_sample for step in left] == [step.first_sample for step in steps[done:]]


def test_resuming_with_steps_of_another_size_continues_the_same_sequence():
    whole = sequence(order(), epoch=1)
    assert sequence(order(step_size=BY_TOKENS), epoch=1, consumed=14) == whole[14:]


def test_the_last_step_of_an_epoch_leads_to_the_next():
    *_, last = order().steps(1)
    assert last.state == LoaderState(epoch=2, consumed=0)
    assert list(order().steps(1, order().num_samples)) == []


def test_a_step_costs_as_much_as_its_budget_allows():
    by_cost = order(step_size=BY_COST)
    costs = [step.samples.costs for step in by_cost.steps(0)]
    assert all(cost.sum() <= 60 * 1024 for cost in costs)
    assert all(cost.sum() + after[0] > 60 * 1024 for cost, after in itertools.pairwise(costs))


def long_order(**options):
    """20,000 rows of very uneven lengths in 40 row groups."""
    lengths = np.minimum(np.random.default_rng(0).zipf(1.3, 20_000) * 10, 4096).astype(np.int32)
    counts = RowCounts(lengths, lengths, np.zeros_like(lengths))
    return order_of(counts, np.arange(0, 20_001, 500), sampler=NextItemSampler(4096), groups_per_window=16, **options)


def test_every_step_takes_its_share_of_every_row_group_of_the_window():
    for step in itertools.islice(long_order(step_size=StepSize("rows", 400)).steps(0), 20):
        taken = np.bincount(step.samples.groups)
        assert taken[taken > 0].tolist() == pytest.approx([25] * 16, abs=3)


def test_steps_of_equally_many_rows_cost_about_the_same():
    steps = list(long_order(step_size=StepSize("rows", 400), cost_model=pairs_cost(0, 4096)).steps(0))
    costs = np.array([step.samples.costs.sum() for step in steps])
    each = np.concatenate([step.samples.costs for step in steps])
    by_chance = each.std() / each.mean() / 400**0.5
    assert costs.std() / costs.mean() < by_chance / 2


def uneven_lengths(kind):
    random = np.random.default_rng(1)
    lengths = random.zipf(1.3, 16_000) * 20.0 if kind == "zipf" else random.lognormal(5, 1, 16_000)
    return np.clip(lengths, 2, 4096).astype(np.int32)


def small_steps(lengths, *, balance_for, pair, measure="rows"):
    """Steps of about 64 samples, for 8 ranks, of an epoch but for its last."""
    cost_model = pairs_cost(pair, 4096)
    costs = cost_model.units(lengths.astype(np.int64) - 1, np.zeros_like(lengths))
    size = {"rows": 1, "tokens": lengths.mean(), "cost": costs.mean() / 1024}[measure]
    of = order_of(
        RowCounts(lengths, lengths, np.zeros_like(lengths)),
        np.linspace(0, len(lengths), 17).astype(np.int64),
        sampler=NextItemSampler(4096, "recent"),
        cost_model=cost_model,
        step_size=StepSize(measure, 64 * size),
        groups_per_window=16,
        balance_for=balance_for,
    )
    return list(of.steps(0))[:-1]


def loads_of_eight(steps):
    return sum(
        (loads_of(deal(step.samples.places, step.samples.costs, 8), step.samples.costs, 8) for step in steps),
        NO_LOADS,
    )


# Of log-normal lengths the longest costs more than an eighth of a budget for 64, and nothing makes up for it.
@pytest.mark.parametrize(
    ("kind", "measure"), [("zipf", "rows"), ("zipf", "tokens"), ("zipf", "cost"), ("log-normal", "rows")]
)
@pytest.mark.parametrize("pair", [0, 1e-3])
def test_eight_samples_for_each_of_eight_ranks_are_dealt_evenly_when_they_come_in_eights(kind, pair, measure):
    lengths = uneven_lengths(kind)
    plain, balanced = (
        loads_of_eight(small_steps(lengths, balance_for=number, pair=pair, measure=measure)) for number in (1, 8)
    )
    assert plain.largest > 1.05 * plain.mean
    assert balanced.largest <= 1.05 * balanced.mean


@pytest.mark.parametrize("measure", ["tokens", "cost"])
def test_a_step_of_whole_groups_stays_within_its_budget(measure):
    lengths = uneven_lengths("log-normal")
    steps = small_steps(lengths, balance_for=8, pair=1e-3, measure=measure)
    sizes = [step.samples.slices.kept if measure == "tokens" else step.samples.costs / 1024 for step in steps]
    budget = max(size.sum() for size in sizes if len(size) > 1)
    assert budget <= 64 * (lengths.mean() if measure == "tokens" else np.concatenate(sizes).mean() * 1.01)
    # Only groups dearer than the budget are cut.
    assert sum(step.first_sample % 8 == 0 for step in steps) > 0.8 * len(steps)


def test_groups_of_like_cost_are_not_cut_where_windows_meet():
    lengths = uneven_lengths("zipf")
    options = {"step_size": StepSize("rows", 64), "groups_per_window": 3, "balance_for": 8}
    bounds = np.sort(np.random.default_rng(2).choice(16_000, 15, replace=False))
    of = order_of(
        RowCounts(lengths, lengths, np.zeros_like(lengths)),
        np.array([0, *bounds, 16_000]),
        sampler=NextItemSampler(4096, "recent"),
        cost_model=pairs_cost(1e-3, 4096),
        **options,
    )
    loads = loads_of_eight(list(of.steps(0))[:-1])
    assert loads.largest <= 1.05 * loads.mean


@pytest.mark.parametrize("sampler", [RankingSampler(5, 2), NextItemSampler(5)])
def test_an_epoch_of_samples_in_groups_of_like_cost_holds_each_exactly_once(sampler):
    grouped = order(sampler=sampler, balance_for=4)
    assert Counter(sequence(grouped, epoch=2)) == Counter(every_sample(grouped))
    assert sequence(grouped) != sequence(order(sampler=sampler))


def test_steps_of_large_epochs_are_estimated_from_the_first_samples(monkeypatch):
    by_cost = long_order(step_size=StepSize("cost", 100_000))
    exact = by_cost.num_steps(2)
    monkeypatch.setattr("ultrarec.data.order.COUNTED", 2_000)
    walked, window = [], Order._window

    def counting(of, *place):
        walked.append(place)
        return window(of, *place)

    monkeypatch.setattr(Order, "_window", counting)
    assert by_cost.num_steps(2) == pytest.approx(exact, rel=0.03)
    assert len(walked) == 1
