import itertools

import numpy as np
import pytest
import torch
from orders import order_of, pairs_cost
from pydantic import ValidationError
from random_datasets import random_histories, write_dataset

from ultrarec.data.config import DataConfig
from ultrarec.data.deal import deal
from ultrarec.data.hashing import keys
from ultrarec.data.loader import Loader, NextItemSampler, RankingSampler
from ultrarec.data.order import StepSize
from ultrarec.data.samples import RowCounts
from ultrarec.data.stochastic_length import Events, StochasticLength, round_dependently


def stochastic_length(*, max_history=4096, alpha=1.6, selection="recent", balanced=True, seed=0):
    return StochasticLength(max_history=max_history, alpha=alpha, selection=selection, balanced=balanced, seed=seed)


@pytest.mark.parametrize(("max_history", "threshold"), [(1024, 256), (2048, 446), (4096, 776), (8192, 1351)])
def test_cut_histories_keep_the_published_number_of_events(max_history, threshold):
    assert stochastic_length(max_history=max_history).threshold == threshold


def test_the_published_sparsity_lies_between_that_of_cut_and_of_all_longest_histories():
    published = 0.805
    longest = stochastic_length()
    assert 1 - longest.expected(np.array([4096]), lambda kept: kept)[0] / 4096 < published < 1 - 776 / 4096


def test_a_history_stays_whole_by_the_published_rule():
    lengths = np.array([0, 1, 776, 777, 1552, 4096])
    whole = [1, 1, 1, 4096**1.6 / 777**2, 4096**1.6 / 1552**2, 4096**-0.4]
    assert stochastic_length().probabilities(lengths) == pytest.approx(np.array(whole), rel=1e-12)


def test_what_is_kept_weighs_what_is_expected_over_any_stretch():
    random = np.random.default_rng(0)
    for _ in range(100):
        probabilities, weights = random.random(60), random.pareto(1.2, 60) + 0.1
        probabilities[random.random(60) < 0.3] = 1
        kept = round_dependently(probabilities, weights, random.random(60))
        deviation = np.concatenate([[0], np.cumsum(weights * (kept - probabilities))])
        assert np.abs(deviation).max() < weights.max()
        for begin, end in itertools.combinations(range(61), 2):
            assert abs(deviation[end] - deviation[begin]) < 2 * weights[probabilities < 1].max()


def test_deciding_together_keeps_every_probability():
    random, num_trials = np.random.default_rng(0), 20_000
    probabilities, weights = np.array([0.2, 0.9, 1.0, 0.5, 0.03, 0.7]), np.array([5.0, 1, 9, 2, 30, 0.5])
    kept = sum(round_dependently(probabilities, weights, random.random(6)) for _ in range(num_trials))
    errors = np.sqrt(probabilities * (1 - probabilities) / num_trials)
    assert kept[2] == num_trials
    assert (np.abs(kept / num_trials - probabilities) <= 4 * errors).all()


def lengths_of(kind, number, longest):
    random = np.random.default_rng(0)
    lengths = random.zipf(1.3, number) * 10.0 if kind == "zipf" else np.exp(random.normal(6.5, 1.2, number))
    return np.clip(lengths, 2, longest).astype(np.int32)


def order(lengths, *, step_size, balanced, max_history=4096, **options):
    counts = RowCounts(lengths, lengths, np.zeros_like(lengths))
    return order_of(
        counts,
        np.linspace(0, len(lengths), 21).astype(np.int64),
        sampler=NextItemSampler(max_history),
        groups_per_window=10,
        step_size=step_size,
        stochastic_length=stochastic_length(max_history=max_history, balanced=balanced),
        **options,
    )


@pytest.mark.parametrize("balanced", [False, True])
def test_over_many_epochs_each_user_stays_whole_as_often_as_plain_stochastic_length_says(balanced):
    lengths = np.random.default_rng(1).integers(2, 66, 300).astype(np.int32)
    many = order(lengths, max_history=64, step_size=StepSize("rows", 40), balanced=balanced)
    num_epochs, whole = 400, np.zeros(300)
    for epoch in range(num_epochs):
        for step in many.steps(epoch):
            samples = step.samples
            whole[samples.rows] += samples.slices.kept == lengths[samples.rows] - 1
    probabilities = many.stochastic_length.probabilities(lengths - 1)
    is_open = probabilities < 1
    assert (whole[~is_open] == num_epochs).all()
    assert is_open.sum() > 150
    scores = (whole - num_epochs * probabilities)[is_open]
    scores /= np.sqrt(num_epochs * probabilities * (1 - probabilities))[is_open]
    # The sum of the squares is chi-square with one degree of freedom per user: mean k, variance 2k.
    assert abs((scores**2).sum() - len(scores)) < 4 * np.sqrt(2 * len(scores))
    assert np.abs(scores).max() < 4.5


def loads(of, *, dealt_before):
    """Cost per step and rank of 8 ranks; `dealt_before`: dealt by what is expected, not by what is kept."""
    found = []
    for step in of.steps(0):
        samples = step.samples
        history = samples.slices.target_begin.clip(max=of.sampler.max_history)
        expected = of.stochastic_length.expected(history, lambda kept: of.cost_model.units(kept, np.zeros_like(kept)))
        ranks = deal(samples.places, expected if dealt_before else samples.costs, 8)
        found.append(np.bincount(ranks, samples.costs, 8))
    # The last step is what is left over.
    return np.array(found[:-1])


def variation(values):
    return values.std() / values.mean()


@pytest.mark.parametrize("pair", [0.0, 1e-3], ids=["tokens", "attention"])
@pytest.mark.parametrize("kind", ["zipf", "log-normal"])
def test_balanced_loads_of_ranks_vary_at_least_five_times_less(kind, pair):
    lengths = lengths_of(kind, 16_000, 4097)
    common = {"step_size": StepSize("cost", 250_000), "cost_model": pairs_cost(pair, 4096)}
    plain, balanced = (order(lengths, balanced=balanced, **common) for balanced in (False, True))
    # Plain stochastic length as published: every rank decides for itself about what it was dealt.
    independent = loads(plain, dealt_before=True)
    together = loads(balanced, dealt_before=False)
    assert independent.mean() == pytest.approx(together.mean(), rel=0.05)
    assert variation(together) < variation(independent) / 5
    # Dealing by what is kept makes ranks equal, but leaves steps unequal.
    assert variation(together) < variation(loads(plain, dealt_before=False)) / 2


def test_costs_of_a_step_are_of_what_is_kept():
    small = order(lengths_of("zipf", 2000, 4097), step_size=StepSize("rows", 200), balanced=True)
    for step in small.steps(0):
        kept = step.samples.slices.kept
        assert step.samples.costs.tolist() == small.cost_model.units(kept, np.zeros_like(kept)).tolist()
        assert (step.samples.slices.target_begin - step.samples.slices.history_begin == kept).all()


def inclusion(weights):
    """How likely each is among two drawn one after the other without replacement, by these weights."""
    pairs = itertools.permutations(range(len(weights)), 2)
    chances = np.zeros(len(weights))
    for first, second in pairs:
        both = weights[first] / weights.sum() * weights[second] / (weights.sum() - weights[first])
        chances[[first, second]] += both
    return chances


def keeping_two(selection):
    return stochastic_length(max_history=4, alpha=1.01, selection=selection)


TIMES = np.array([0, 400, 900, 990, 1000])


@pytest.mark.parametrize(
    ("selection", "weights"),
    [("random", np.ones(5)), ("time_weighted", 1 - (1000 - TIMES) / (1000 - TIMES).sum())],
)
def test_events_are_drawn_by_their_weights_without_replacement(selection, weights):
    num_samples = 20_000
    samples = np.repeat(np.arange(num_samples), 5)
    events = Events(
        samples, np.tile(np.arange(5), num_samples), np.tile(TIMES, num_samples), np.zeros(len(samples), bool)
    )
    sample_keys = keys(0, 0, np.arange(num_samples), np.zeros(num_samples, np.int64))
    kept = keeping_two(selection).select(events, sample_keys).reshape(-1, 5)
    assert (kept.sum(1) == 2).all()
    expected = inclusion(weights)
    assert (np.abs(kept.mean(0) - expected) <= 4 * np.sqrt(expected * (1 - expected) / num_samples)).all()


def test_events_of_one_time_are_equally_likely():
    samples = np.repeat(np.arange(1000), 5)
    events = Events(samples, np.tile(np.arange(5), 1000), np.full(5000, 7), np.zeros(5000, bool))
    sample_keys = keys(0, 0, np.arange(1000), np.zeros(1000, np.int64))
    random, weighted = (keeping_two(name).select(events, sample_keys) for name in ("random", "time_weighted"))
    assert (random == weighted).all()


NUM_ITEMS, HISTORY = 40, 32


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    histories = random_histories(num_users=60, num_items=NUM_ITEMS, mean_events=30, seed=2)
    root = tmp_path_factory.mktemp("long") / "dataset"
    write_dataset(root, histories, num_items=NUM_ITEMS, num_files=2, rows_per_group=5)
    return str(root)


RANKING, NEXT_ITEM = RankingSampler(HISTORY, 4), NextItemSampler(HISTORY)
SETTINGS = [("recent", True), ("random", False), ("time_weighted", True)]


def steps(path, sampler, *, selection="time_weighted", balanced=True, split="train", world_size=1, epochs=1, **options):
    settings = selection and {"alpha": 1.3, "selection": selection, "balanced": balanced}
    config = DataConfig(path=path, batch_rows=16, max_history=HISTORY, stochastic_length=settings)
    ranks = [
        list(Loader(config, sampler, split=split, rank=rank, world_size=world_size, epochs=epochs, **options))
        for rank in range(world_size)
    ]
    return list(zip(*ranks, strict=True))


def contents(step):
    """What the batches of all ranks hold, by sample."""
    found = {}
    for batch in step:
        columns = (batch.ids["item"].values(), batch.timestamps, batch.query_timestamps, batch.actions)
        parts = torch.stack(columns).split(batch.offsets.diff().tolist(), dim=1)
        for sample, targets, part in zip(batch.samples.tolist(), batch.num_targets.tolist(), parts, strict=False):
            found[tuple(sample)] = (targets, part.tolist())
    return found


@pytest.mark.parametrize(("selection", "balanced"), SETTINGS)
@pytest.mark.parametrize("sampler", [RANKING, NEXT_ITEM], ids=["ranking", "next_item"])
def test_what_is_kept_does_not_depend_on_the_number_of_ranks_and_every_rank_knows_the_labels(
    path, sampler, selection, balanced
):
    alone = steps(path, sampler, selection=selection, balanced=balanced)
    for one, many in zip(
        alone, steps(path, sampler, selection=selection, balanced=balanced, world_size=3), strict=True
    ):
        assert contents(many) == contents(one)
        assert {batch.num_labels for batch in many} == {sum(len(batch.labels) for batch in many)}


@pytest.mark.parametrize(("selection", "balanced"), SETTINGS)
def test_a_resumed_run_keeps_what_the_whole_run_would_have_kept(path, selection, balanced):
    whole = steps(path, RANKING, selection=selection, balanced=balanced, epochs=2)
    state = whole[len(whole) // 3][0].state
    left = steps(path, RANKING, selection=selection, balanced=balanced, epochs=2, world_size=2, state=state)
    assert [contents(step) for step in left] == [contents(step) for step in whole[len(whole) // 3 + 1 :]]


@pytest.mark.parametrize(("selection", "balanced"), SETTINGS)
def test_cut_ranking_histories_keep_part_of_the_history_in_its_order_and_all_targets(path, selection, balanced):
    whole, cut = ({}, {})
    for found, chosen in ((whole, None), (cut, selection)):
        for step in steps(path, RANKING, selection=chosen, balanced=balanced):
            found |= contents(step)
    threshold = round(HISTORY**0.65)
    num_cut = 0
    assert whole.keys() == cut.keys()
    for sample, (targets, columns) in whole.items():
        its_targets, kept = cut[sample]
        events, kept_events = (list(zip(*each, strict=True)) for each in (columns, kept))
        assert its_targets == targets
        assert kept_events[-targets:] == events[-targets:]
        remaining = iter(events[:-targets])
        assert all(event in remaining for event in kept_events[:-targets])
        if len(kept_events) < len(events):
            num_cut += 1
            assert len(kept_events) - targets <= threshold
            if selection == "recent":
                assert kept_events == events[len(events) - len(kept_events) :]
    assert num_cut > 30


def test_every_epoch_cuts_anew(path):
    by_epoch = [{}, {}]
    for step in steps(path, NEXT_ITEM, epochs=2):
        by_epoch[step[0].epoch] |= contents(step)
    assert by_epoch[0].keys() == by_epoch[1].keys()
    assert sum(by_epoch[0][sample] != by_epoch[1][sample] for sample in by_epoch[0]) > 10


@pytest.mark.parametrize("sampler", [RANKING, NEXT_ITEM], ids=["ranking", "next_item"])
def test_evaluation_reads_whole_histories(path, sampler):
    plain, cut = (steps(path, sampler, selection=chosen, split="test") for chosen in (None, "random"))
    assert [contents(step) for step in plain] == [contents(step) for step in cut]


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_an_alpha_that_cuts_nothing_or_everything_is_refused(alpha):
    with pytest.raises(ValidationError, match=r"stochastic_length\.alpha\n +Input should be (greater|less) than"):
        DataConfig(path="x", batch_rows=1, stochastic_length={"alpha": alpha})
