import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ultrarec.data.samples import Candidates, NextItemSampler, RankingSampler, RowCounts

SPLITS = ["train", "validation", "test"]


def counts_of(*rows):
    return RowCounts(*(np.array(column, np.int32) for column in zip(*rows, strict=True)))


def all_slices(sampler, row, split):
    """(history_begin, target_begin, target_end) of every sample of one row."""
    num_samples = int(sampler.num_samples(counts_of(row), split)[0])
    slices = sampler.slices(
        counts_of(*[row] * max(num_samples, 1)).take(np.arange(num_samples)), np.arange(num_samples), split
    )
    return list(
        zip(slices.history_begin.tolist(), slices.target_begin.tolist(), slices.target_end.tolist(), strict=True)
    )


def test_ranking_trains_on_chunks_that_share_the_history_before_them():
    assert all_slices(RankingSampler(4, 3), (10, 7, 1), "train") == [(0, 0, 3), (0, 3, 6), (2, 6, 7)]


def test_ranking_evaluates_one_event_at_a_time_with_everything_before_it():
    assert all_slices(RankingSampler(8, 3), (10, 7, 1), "validation") == [(0, 7, 8)]
    assert all_slices(RankingSampler(8, 3), (10, 7, 1), "test") == [(0, 8, 9), (1, 9, 10)]


def test_next_item_cuts_a_row_in_windows_from_the_newest_event_back():
    assert all_slices(NextItemSampler(4), (10, 7, 1), "train") == [(2, 6, 7), (0, 2, 3)]
    assert all_slices(NextItemSampler(3), (10, 7, 1), "train") == [(3, 6, 7), (0, 3, 4)]
    assert all_slices(NextItemSampler(20), (10, 7, 1), "train") == [(0, 6, 7)]


def test_with_recent_targets_only_the_newest_events_of_a_row_are_asked_for():
    assert all_slices(NextItemSampler(4, "recent"), (10, 7, 1), "train") == [(2, 6, 7)]
    assert all_slices(RankingSampler(4, 3, "recent"), (10, 7, 1), "train") == [(0, 3, 6), (2, 6, 7)]
    for sampler in (NextItemSampler(4, "recent"), RankingSampler(4, 3, "recent")):
        assert all_slices(sampler, (10, 7, 1), "test")[-1] == (5, 9, 10)


def test_next_item_evaluates_each_event_of_the_split_from_those_before_it():
    assert all_slices(NextItemSampler(4), (10, 7, 1), "validation") == [(3, 7, 8)]
    assert all_slices(NextItemSampler(4), (10, 7, 1), "test") == [(4, 8, 9), (5, 9, 10)]


@pytest.mark.parametrize(("row", "split"), [((1, 1, 0), "train"), ((0, 0, 0), "train"), ((1, 0, 0), "test")])
def test_next_item_has_no_sample_where_nothing_precedes_the_event(row, split):
    assert all_slices(NextItemSampler(4), row, split) == []


def test_a_users_first_event_is_ranked_with_an_empty_history():
    assert all_slices(RankingSampler(4, 1), (1, 0, 0), "test") == [(0, 0, 1)]


row_counts = st.tuples(st.integers(0, 12), st.integers(0, 5), st.integers(0, 5)).map(lambda row: (sum(row), *row[:2]))
targets = st.sampled_from(["all", "recent"])
samplers = st.one_of(
    st.builds(RankingSampler, max_history=st.integers(1, 9), targets_per_sample=st.integers(1, 4), targets=targets),
    st.builds(NextItemSampler, max_history=st.integers(1, 9), targets=targets),
)


@settings(max_examples=200, deadline=None)
@given(row=row_counts, sampler=samplers, split=st.sampled_from(SPLITS))
def test_history_is_the_newest_events_before_the_target_and_never_the_target(row, sampler, split):
    for history_begin, target_begin, target_end in all_slices(sampler, row, split):
        assert history_begin == max(0, target_begin - sampler.max_history)
        assert target_begin < target_end


@settings(max_examples=200, deadline=None)
@given(row=row_counts, max_history=st.integers(1, 9), targets=st.integers(1, 4), split=st.sampled_from(SPLITS))
def test_every_event_of_a_split_is_a_ranking_target_exactly_once(row, max_history, targets, split):
    num_events, num_train, num_validation = row
    ends = {"train": num_train, "validation": num_train + num_validation, "test": num_events}
    begins = {"train": 0, "validation": num_train, "test": num_train + num_validation}
    slices = all_slices(RankingSampler(max_history, targets), row, split)
    assert [event for _, begin, end in slices for event in range(begin, end)] == list(range(begins[split], ends[split]))


@settings(max_examples=200, deadline=None)
@given(num_train=st.integers(0, 40), max_history=st.integers(1, 9))
def test_every_training_event_but_the_first_is_predicted_exactly_once(num_train, max_history):
    slices = all_slices(NextItemSampler(max_history), (num_train + 2, num_train, 1), "train")
    assert sorted(event for begin, end, _ in slices for event in range(begin + 1, end + 1)) == list(range(1, num_train))
    assert all(1 <= end - begin <= max_history for begin, end, _ in slices)


@pytest.mark.parametrize("split", SPLITS)
def test_labels_are_counted_without_reading_events(split):
    row = (10, 6, 2)
    ranking, next_item = RankingSampler(4, 4), NextItemSampler(4)
    for sampler, labels in (
        (ranking, {"train": 6, "validation": 2, "test": 2}),
        (next_item, {"train": 5, "validation": 2, "test": 2}),
    ):
        num_samples = int(sampler.num_samples(counts_of(row), split)[0])
        slices = sampler.slices(counts_of(*[row] * num_samples), np.arange(num_samples), split)
        assert sampler.num_labels(slices, split) == labels[split]


def test_a_catalogue_is_every_item_and_never_the_unknown_one():
    assert Candidates("catalogue", 5).ids(seed=0, epoch=3, first_sample=7).tolist() == [1, 2, 3, 4, 5]


def test_sampled_candidates_are_distinct_items_while_there_are_enough():
    ids = Candidates("sampled", 50, 50).ids(seed=0, epoch=0, first_sample=0)
    assert sorted(ids.tolist()) == list(range(1, 51))
    few = Candidates("sampled", 3, 50).ids(seed=0, epoch=0, first_sample=0)
    assert len(few) == 50
    assert set(few.tolist()) == {1, 2, 3}


def test_sampled_candidates_follow_seed_epoch_and_position_only():
    candidates = Candidates("sampled", 1000, 20)
    drawn = {
        place: tuple(candidates.ids(seed=place[0], epoch=place[1], first_sample=place[2]).tolist())
        for place in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    }
    assert len(set(drawn.values())) == 4
    assert drawn[0, 0, 0] == tuple(candidates.ids(seed=0, epoch=0, first_sample=0).tolist())


def test_candidates_of_a_sample_are_uniform_items_that_depend_on_its_key_only():
    candidates = Candidates("per_sample", 7, 500)
    ids = candidates.ids_by_sample(np.arange(40, dtype=np.uint64))
    assert ids.shape == (40, 500)
    shares = np.bincount(ids.ravel(), minlength=8) / ids.size
    # 20,000 draws: the share of an item varies by 0.0025 around 1 / 7.
    np.testing.assert_allclose(shares, [0, *[1 / 7] * 7], atol=0.0125)
    assert len(np.unique(ids, axis=0)) == 40
    np.testing.assert_array_equal(candidates.ids_by_sample(np.array([33, 4], np.uint64)), ids[[33, 4]])


def test_candidates_of_a_prediction_are_uniform_items_that_depend_on_its_sample_and_place_only():
    candidates = Candidates("per_position", 7, 50)
    lengths = np.array([13, 0, 400, 1])
    keys = np.arange(4, dtype=np.uint64)
    ids = candidates.ids_by_position(keys, lengths)
    assert ids.shape == (414, 50)
    shares = np.bincount(ids.ravel(), minlength=8) / ids.size
    # 20,700 draws: the share of an item varies by 0.0025 around 1 / 7.
    np.testing.assert_allclose(shares, [0, *[1 / 7] * 7], atol=0.0125)
    assert len(np.unique(ids, axis=0)) == 414
    np.testing.assert_array_equal(candidates.ids_by_position(keys[[3, 0]], np.array([1, 5])), ids[[413, *range(5)]])
    assert candidates.ids_by_position(keys[:0], lengths[:0]).shape == (0, 50)


def test_the_number_of_items_that_predictions_draw_is_known_on_average():
    candidates = Candidates("per_position", 500, 8)
    drawn = candidates.ids_by_position(np.arange(60, dtype=np.uint64), np.full(60, 2))
    assert candidates.mean_ids(samples=60, predictions=120) == pytest.approx(len(np.unique(drawn)), rel=0.05)
    assert candidates.mean_ids(samples=1, predictions=10**6) == pytest.approx(500)


@pytest.mark.parametrize(("kind", "num_negatives"), [("sampled", 0), ("per_sample", 0), ("catalogue", 5)])
def test_candidates_refuse_a_number_that_their_kind_cannot_use(kind, num_negatives):
    with pytest.raises(ValueError, match=f"num_negatives={num_negatives} with kind='{kind}'"):
        Candidates(kind, 10, num_negatives)
