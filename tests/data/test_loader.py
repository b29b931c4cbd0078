import math
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from random_datasets import random_histories, write_dataset

from ultrarec.data import collate
from ultrarec.data.config import DataConfig, FeatureConfig
from ultrarec.data.errors import UserError
from ultrarec.data.loader import Candidates, Loader, LoaderState, NextItemSampler, RankingSampler
from ultrarec.data.reader import Reader

NUM_ITEMS = 40
COUNTS = ["num_events", "num_train", "num_validation"]
RANKING, NEXT_ITEM = RankingSampler(6, 2), NextItemSampler(6)
NEGATIVES = Candidates("sampled", NUM_ITEMS, 8)
SIZES = [{"batch_rows": 13}, {"batch_tokens": 50}]
WORLD_SIZES = [1, 2, 3, 4, 5, 8]
FEATURES = {
    "tab": FeatureConfig(kind="category", role="event", num_values=5),
    "play_time": FeatureConfig(kind="bucket", role="outcome", num_values=12),
    "author": FeatureConfig(kind="hash", role="event", num_values=99),
    "age": FeatureConfig(kind="category", role="user", num_values=99),
    "user_id": FeatureConfig(kind="hash", role="user", num_values=10**6),
}


@pytest.fixture(scope="module")
def histories():
    return random_histories(num_users=70, num_items=NUM_ITEMS, mean_events=5, seed=2)


@pytest.fixture(scope="module")
def path(histories, tmp_path_factory):
    root = tmp_path_factory.mktemp("loader") / "dataset"
    write_dataset(root, histories, num_items=NUM_ITEMS, num_files=3, rows_per_group=5)
    return str(root)


def loader(
    path, sampler=RANKING, *, split="train", rank=0, world_size=1, epochs=1, state=None, candidates=NEGATIVES, **config
):
    sizes = config if {"batch_rows", "batch_tokens"} & config.keys() else {"batch_rows": 13, **config}
    return Loader(
        DataConfig(path=path, features=FEATURES, shuffle_row_groups=4, **sizes),
        sampler,
        split=split,
        rank=rank,
        world_size=world_size,
        epochs=epochs,
        state=state or LoaderState(),
        candidates=candidates if sampler is NEXT_ITEM and split == "train" else None,
    )


def steps(path, sampler=RANKING, *, world_size=1, **options):
    """The batches of all ranks, step by step; every rank must take part in every step."""
    ranks = [list(loader(path, sampler, rank=r, world_size=world_size, **options)) for r in range(world_size)]
    return list(zip(*ranks, strict=True))


def consumed(step):
    return [tuple(sample) for batch in step for sample in batch.samples.tolist()]


def every_sample(path, sampler=RANKING, split="train"):
    """(file, row, sample) of all samples of a split, from the counts in the files."""
    found = []
    for file, part in enumerate(sorted(Path(path, "histories").iterdir())):
        for row, counts in enumerate(pq.read_table(part, columns=COUNTS).to_pylist()):
            found += [(file, row, number) for number in range(num_samples(sampler, split, **counts))]
    return found


def num_samples(sampler, split, *, num_events, num_train, num_validation):
    begin = {"train": 0, "validation": num_train, "test": num_train + num_validation}[split]
    end = {"train": num_train, "validation": num_train + num_validation, "test": num_events}[split]
    if sampler is RANKING:
        return math.ceil((end - begin) / (2 if split == "train" else 1))
    return math.ceil(max(end - 1, 0) / NEXT_ITEM.max_history) if split == "train" else end - max(begin, 1)


def inputs(batch):
    """All that the model reads of each sample, by sample."""
    bounds = batch.offsets.tolist()
    events = {
        "item": batch.ids["item"].values(),
        "timestamps": batch.timestamps,
        "query_timestamps": batch.query_timestamps,
        "actions": batch.actions,
        **{name: batch.features[name] for name in ("tab", "play_time")},
        "author": batch.ids["author"].values(),
    }
    users = {"age": batch.features["age"], "user_id": batch.ids["user_id"].values()}
    return {
        tuple(sample): {
            "num_targets": batch.num_targets[place].item(),
            **{name: values[bounds[place] : bounds[place + 1]].tolist() for name, values in events.items()},
            **{name: values[place].item() for name, values in users.items()},
        }
        for place, sample in enumerate(batch.samples.tolist())
    }


def labels(batch):
    """The labels of each sample, by sample."""
    sizes = batch.num_targets if batch.num_targets.any() else torch.diff(batch.offsets)
    sizes = sizes if int(sizes.sum()) == len(batch.labels) else torch.ones(len(batch.samples), dtype=torch.int64)
    parts = batch.labels.split(sizes[: len(batch.samples)].tolist())
    return {tuple(sample): part.tolist() for sample, part in zip(batch.samples.tolist(), parts, strict=True)}


def merged(step, what):
    """One dictionary over the ranks of a step."""
    return {sample: found for batch in step for sample, found in what(batch).items()}


def assert_equal(batch, other):
    """Tensor for tensor."""
    assert (batch.num_labels, batch.epoch, batch.state) == (other.num_labels, other.epoch, other.state)
    assert batch.ids.keys() == other.ids.keys()
    for name in ("offsets", "num_targets", "timestamps", "query_timestamps", "actions", "labels", "users", "samples"):
        assert torch.equal(getattr(batch, name), getattr(other, name)), name
    for name in batch.features:
        assert torch.equal(batch.features[name], other.features[name]), name
    assert torch.equal(batch.ids.values(), other.ids.values())
    assert torch.equal(batch.ids.lengths(), other.ids.lengths())


def test_ranking_samples_cover_every_training_event_of_the_log(path, histories):
    seen = Counter()
    for batch in loader(path, RANKING):
        seen.update(batch.users.tolist())
    expected = {row: num for row, num in enumerate(histories["num_train"].to_pylist()) if num}
    assert dict(seen) == expected


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("sampler", [RANKING, NEXT_ITEM], ids=["ranking", "next_item"])
def test_each_sample_is_read_exactly_once_over_all_ranks(path, sampler, world_size, size):
    found = [sample for step in steps(path, sampler, world_size=world_size, **size) for sample in consumed(step)]
    assert sorted(found) == every_sample(path, sampler)


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_evaluation_reads_each_sample_exactly_once_in_the_same_steps_every_time(path, split, world_size):
    read = steps(path, split=split, world_size=world_size, evaluate_rows=7)
    assert sorted(sample for step in read for sample in consumed(step)) == every_sample(path, split=split)
    again = steps(path, split=split, evaluate_rows=7, seed=9)
    assert [sorted(consumed(step)) for step in read] == [sorted(consumed(step)) for step in again]


def test_more_ranks_than_samples_still_take_every_step_together(path):
    read = steps(path, world_size=8, batch_rows=3)
    assert {len(step) for step in read} == {8}
    assert all(sum(len(batch.samples) == 0 for batch in step) >= 5 for step in read)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sampler", [RANKING, NEXT_ITEM], ids=["ranking", "next_item"])
@pytest.mark.parametrize("world_size", [2, 5])
def test_a_step_is_the_same_on_every_world_size(path, sampler, world_size, size):
    alone = steps(path, sampler, **size)
    together = steps(path, sampler, world_size=world_size, **size)
    for one, many in zip(alone, together, strict=True):
        assert merged(many, inputs) == merged(one, inputs)
        assert merged(many, labels) == merged(one, labels)
        assert {batch.num_labels for batch in many} == {one[0].num_labels}
        assert {batch.state for batch in many} == {one[0].state}
        for batch in many if sampler is NEXT_ITEM else []:
            assert torch.equal(batch.ids["candidate"].values(), one[0].ids["candidate"].values())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("sampler", [RANKING, NEXT_ITEM], ids=["ranking", "next_item"])
def test_the_labels_of_a_step_are_known_to_every_rank(path, sampler, split, size):
    for step in steps(path, sampler, split=split, world_size=3, evaluate_rows=5, **size):
        assert {batch.num_labels for batch in step} == {sum(len(batch.labels) for batch in step)}
        assert len({batch.loads for batch in step}) == 1


@pytest.mark.parametrize("size", SIZES)
def test_resuming_on_the_same_ranks_gives_the_same_batches_tensor_for_tensor(path, size):
    whole = steps(path, world_size=2, epochs=2, **size)
    for done in range(1, len(whole)):
        left = steps(path, world_size=2, epochs=2, state=whole[done - 1][0].state, **size)
        for step, expected in zip(left, whole[done:], strict=True):
            for batch, other in zip(step, expected, strict=True):
                assert_equal(batch, other)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("sampler", [RANKING, NEXT_ITEM], ids=["ranking", "next_item"])
def test_resuming_on_any_other_ranks_reads_each_sample_once(path, sampler, world_size):
    before = steps(path, sampler, world_size=3)
    for done in (1, len(before) // 2, len(before) - 1):
        after = steps(path, sampler, world_size=world_size, state=before[done - 1][0].state)
        found = [sample for step in [*before[:done], *after] for sample in consumed(step)]
        assert sorted(found) == every_sample(path, sampler)


def test_epochs_follow_one_another_in_different_orders(path):
    one = loader(path)
    found = [(batch.epoch, tuple(consumed([batch]))) for batch in loader(path, epochs=3)]
    assert Counter(epoch for epoch, _ in found) == {
        epoch: one.num_steps(epoch + 1) - one.num_steps(epoch) for epoch in range(3)
    }
    orders = [[samples for epoch, samples in found if epoch == wanted] for wanted in range(3)]
    assert orders[0] != orders[1] != orders[2]
    assert sorted(sum(orders[1], ())) == sorted(sum(orders[0], ())) == every_sample(path)


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(path):
    first, again, other = (steps(path, seed=seed) for seed in (1, 1, 2))
    for (batch,), (same,) in zip(first, again, strict=True):
        assert_equal(batch, same)
    assert [consumed(step) for step in first] != [consumed(step) for step in other]


@pytest.mark.parametrize("size", SIZES)
def test_a_loader_says_how_many_samples_and_steps_it_has(path, size):
    known = loader(path, **size)
    read = steps(path, **size)
    assert known.num_steps(1) == len(read)
    assert known.num_samples == len(every_sample(path))


def test_every_step_of_every_epoch_is_compared_with_other_negatives(path):
    drawn = [tuple(batch.ids["candidate"].values().tolist()) for batch in loader(path, NEXT_ITEM, epochs=2)]
    assert len(set(drawn)) == len(drawn) > 2


def test_negatives_of_each_position_are_the_same_on_any_number_of_ranks(path, monkeypatch):
    of_positions = Candidates("per_position", NUM_ITEMS, 8)

    def drawn(world_size):
        found = {}
        for step in steps(path, NEXT_ITEM, world_size=world_size, candidates=of_positions):
            for batch in step:
                items = batch.ids["candidate"].values()
                assert torch.equal(items, items.unique()), "each item is looked up once"
                assert batch.negatives.shape == (len(batch.labels), 8)
                parts = items[batch.negatives].split(torch.diff(batch.offsets).tolist())
                found |= zip(map(tuple, batch.samples.tolist()), (part.tolist() for part in parts), strict=False)
        return found

    alone = drawn(1)
    assert alone == drawn(3)
    assert {item for rows in alone.values() for row in rows for item in row} == set(range(1, NUM_ITEMS + 1))


@pytest.mark.parametrize("size", [*SIZES, {"batch_rows": 10**6}])
def test_each_row_group_is_decoded_once_in_an_epoch(path, monkeypatch, size):
    decoded = Counter()
    read = Reader.read
    monkeypatch.setattr(Reader, "read", lambda reader, group: decoded.update([group]) or read(reader, group))
    assert len(list(loader(path, **size)))
    assert decoded == Counter(range(15))


def test_a_finished_run_has_no_batches_left(path):
    assert list(loader(path, epochs=2, state=LoaderState(epoch=2))) == []


def changed(histories, first, shown):
    """The log with other events from number `first[row]` of each row on.

    The first `shown` of them keep what is known when an event is shown: item, time, tab and author.
    """
    columns = {}
    for name in histories.schema.names:
        column = histories[name]
        if pa.types.is_list(column.type):
            kept = first + (shown if name in ("items", "timestamps", "tab", "author") else 0)
            rows = [altered(name, row, k) for row, k in zip(column.to_pylist(), kept.tolist(), strict=True)]
            column = pa.array(rows, column.type)
        columns[name] = column
    return pa.table(columns)


def altered(name, values, kept):
    rules = {
        "items": lambda v: v % NUM_ITEMS + 1,
        "timestamps": lambda v: v + 12345,
        "actions": lambda v: 3 - v,
        "tab": lambda v: (v + 1) % 5,
    }
    change = rules.get(name, lambda v: 5000 if v is None else v // 2 + 12345)
    return [value if place < kept else change(value) for place, value in enumerate(values)]


def split_begins(histories, split):
    num_train, num_validation = (histories[name].to_numpy().astype(int) for name in ("num_train", "num_validation"))
    return {"train": np.zeros_like(num_train), "validation": num_train, "test": num_train + num_validation}[split]


def read_all(path, sampler, split, what):
    return merged(steps(path, sampler, split=split, batch_rows=10**6, evaluate_rows=10**6)[0], what)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_no_ranking_input_depends_on_what_comes_of_its_targets_or_after(path, histories, tmp_path, split, number):
    targets = 2 if split == "train" else 1
    other = changed(histories, split_begins(histories, split) + number * targets, shown=targets)
    root = str(write_dataset(tmp_path / "other", other, num_items=NUM_ITEMS, num_files=3, rows_per_group=5).root)
    before, after = (read_all(where, RANKING, split, inputs) for where in (path, root))
    asked, changed_labels = (read_all(where, RANKING, split, labels) for where in (path, root))
    affected = [sample for sample in before if sample[2] == number]
    assert affected
    for sample in affected:
        assert after[sample] == before[sample]
        assert changed_labels[sample] == [3 - label for label in asked[sample]]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_no_next_item_input_depends_on_the_item_asked_for_or_what_follows(path, histories, tmp_path, split):
    # The first event of a row gives no sample; where the split begins with it, sample 0 asks for the second.
    first = np.maximum(split_begins(histories, split), 1)
    other = changed(histories, first, shown=0)
    timestamps = histories.schema.get_field_index("timestamps")
    other = other.set_column(timestamps, "timestamps", histories["timestamps"])
    root = str(write_dataset(tmp_path / "other", other, num_items=NUM_ITEMS, num_files=3, rows_per_group=5).root)
    before, after = (read_all(where, NEXT_ITEM, split, inputs) for where in (path, root))
    asked, changed_labels = (read_all(where, NEXT_ITEM, split, labels) for where in (path, root))
    affected = [sample for sample in before if sample[2] == 0]
    assert affected
    for sample in affected:
        assert after[sample] == before[sample]
        assert changed_labels[sample] != asked[sample]


@pytest.mark.parametrize("sampler", [RANKING, NEXT_ITEM], ids=["ranking", "next_item"])
def test_training_never_sees_events_held_out(path, histories, tmp_path, sampler):
    other = changed(histories, split_begins(histories, "validation"), shown=0)
    root = str(write_dataset(tmp_path / "other", other, num_items=NUM_ITEMS, num_files=3, rows_per_group=5).root)
    for (batch,), (same,) in zip(steps(path, sampler), steps(root, sampler), strict=True):
        assert_equal(batch, same)


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("ultrarec-loader")]


def test_a_consumer_that_stops_early_leaves_no_thread(path):
    endless = loader(path, epochs=None)
    for _, batch in zip(range(40), endless, strict=False):
        assert len(batch.samples)
    assert loader_threads() == []


def test_closing_ends_every_thread_of_a_loader(path):
    endless = loader(path, epochs=None)
    first, second = iter(endless), iter(endless)
    assert_equal(next(first), next(second))
    assert len(loader_threads()) > 2
    endless.close()
    assert loader_threads() == []
    assert list(first) == []


def test_a_file_that_breaks_while_training_is_an_error_in_the_consumer(histories, tmp_path):
    info = write_dataset(tmp_path / "dataset", histories, num_items=NUM_ITEMS, num_files=2, rows_per_group=5)
    endless = loader(str(info.root), epochs=None)
    info.history_paths[1].write_bytes(b"")
    with pytest.raises(UserError, match=r"part-00001\.parquet, row group \d+, .* the file ends at byte"):
        for _ in endless:
            pass
    assert loader_threads() == []


def test_each_iteration_begins_at_the_state_again(path):
    validation = loader(path, split="validation")
    for batch, same in zip(list(validation), list(validation), strict=True):
        assert_equal(batch, same)


def without_training(histories):
    zeros = pa.array(np.zeros(histories.num_rows, np.int32))
    return histories.set_column(histories.schema.get_field_index("num_train"), "num_train", zeros)


def test_a_dataset_without_training_events_cannot_train(histories, tmp_path):
    root = write_dataset(tmp_path / "dataset", without_training(histories), num_items=NUM_ITEMS).root
    with pytest.raises(UserError, match=r"data\.path=.* no user has enough training events for a sample; prepare"):
        loader(str(root))


def test_a_split_without_events_has_no_batches(histories, tmp_path):
    zeros = pa.array(np.zeros(histories.num_rows, np.int32))
    table = histories.set_column(histories.schema.get_field_index("num_validation"), "num_validation", zeros)
    root = write_dataset(tmp_path / "dataset", table, num_items=NUM_ITEMS).root
    empty = loader(str(root), split="validation", epochs=None)
    assert (list(empty), empty.num_samples, empty.num_steps(1)) == ([], 0, 0)


def test_a_state_beyond_the_epoch_is_refused(path):
    with pytest.raises(
        UserError, match=r"stopped after 99999 samples of an epoch, but data\.path=.* gives \d+; resume"
    ):
        loader(path, state=LoaderState(epoch=0, consumed=99999))


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a prepared dataset"):
        loader(str(tmp_path))


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_ranking_history_holds_all_earlier_events_and_none_of_the_targets_own_time(path, histories, split):
    times = [np.array(row) for row in histories["timestamps"].to_pylist()]
    tied = 0
    for batch in loader(path, RankingSampler(10**6, 1), split=split):
        read = batch.timestamps.split(batch.offsets.diff().tolist())
        for user, of_sample in zip(batch.users.tolist(), read, strict=True):
            *history, target = of_sample.tolist()
            assert history == times[user][times[user] < target].tolist()
            tied += int((times[user] == target).sum() > 1)
    assert tied > 10


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("sampler", [RANKING, NEXT_ITEM], ids=["ranking", "next_item"])
def test_long_histories_are_copied_to_the_same_batches_as_short_ones(path, monkeypatch, sampler, split):
    short = [batch for (batch,) in steps(path, sampler, split=split)]
    monkeypatch.setattr(collate, "_LONG", 0)
    for batch, (same,) in zip(short, steps(path, sampler, split=split), strict=True):
        assert_equal(batch, same)
