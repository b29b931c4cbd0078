"""On the KuaiRand sample: no input of a training or test sample knows what comes of its target, or comes after it."""

import shutil
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from interaction_logs import prepare_log

from ultrarec.data.config import DataConfig, FeatureConfig
from ultrarec.data.loader import Loader, NextItemSampler, RankingSampler

ACTIONS = ("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view", "is_profile_enter")
COLUMNS = ("play_time_ms", "duration_ms", "tab")
FEATURES = {
    "tab": FeatureConfig(kind="category", role="event", num_values=20),
    "duration_ms": FeatureConfig(kind="category", role="event", num_values=10**6),
    "play_time_ms": FeatureConfig(kind="bucket", role="outcome", num_values=1000, per_octave=20),
    "user_id": FeatureConfig(kind="hash", role="user", num_values=10**6),
}
HISTORY = 32
LATER = 3_600_000


class Log:
    """All events of a prepared dataset of one file, user after user, to be changed and written again."""

    def __init__(self, root):
        self.root = root
        (self.file,) = (root / "histories").iterdir()
        self.rows = pq.read_table(self.file)
        lengths = self.rows["num_events"].to_numpy().astype(np.int64)
        self.ends = np.cumsum(lengths)
        self.begins = self.ends - lengths
        self.num_train = self.rows["num_train"].to_numpy().astype(np.int64)
        self.user = np.repeat(np.arange(len(lengths)), lengths)
        self.place = np.arange(len(self.user)) - self.begins[self.user]
        names = ("items", "timestamps", "actions", *COLUMNS)
        self.events = {name: self.rows[name].combine_chunks().flatten().to_numpy().copy() for name in names}

    def write(self, root, events):
        """A copy of the dataset with these events."""
        shutil.copytree(self.root, root)
        path, rows = root / "histories" / self.file.name, self.rows
        offsets = pa.array(np.concatenate([[0], self.ends]), pa.int32())
        for name, values in events.items():
            column = pa.ListArray.from_arrays(offsets, pa.array(values))
            rows = rows.set_column(rows.schema.get_field_index(name), name, column)
        groups = pq.read_metadata(self.file)
        sizes = [groups.row_group(group).num_rows for group in range(groups.num_row_groups)]
        with pq.ParquetWriter(path, rows.schema, write_page_checksum=True) as writer:
            for end, size in zip(np.cumsum(sizes), sizes, strict=True):
                writer.write_table(rows.slice(end - size, size), row_group_size=size)
        return str(root)

    def changed(self, targets, *, also_ties):
        """The events with others from the target on, for the user of each target; so are those of its own time if
        `also_ties`. What a user is shown as target, and when, stays; later times move on.
        """
        target = np.full(len(self.begins), len(self.user))
        target[self.user[targets]] = targets
        target = target[self.user]
        has_one, index = target < len(self.user), np.arange(len(self.user))
        times = self.events["timestamps"]
        later = has_one & (index > target)
        if also_ties:
            later |= has_one & (index != target) & (times >= times[np.minimum(target, len(times) - 1)])
        touched = later | (index == target)
        num_items = int(self.events["items"].max())
        return {
            "items": np.where(later, self.events["items"] % num_items + 1, self.events["items"]),
            "timestamps": np.where(has_one & (index > target), times + LATER, times),
            "actions": np.where(touched, 255 - self.events["actions"], self.events["actions"]),
            "play_time_ms": np.where(touched, self.events["play_time_ms"] * 2 + 777, self.events["play_time_ms"]),
            "duration_ms": np.where(later, self.events["duration_ms"] + 1, self.events["duration_ms"]),
            "tab": np.where(later, (self.events["tab"] + 1) % 15, self.events["tab"]),
        }


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    root = tmp_path_factory.mktemp("future") / "dataset"
    roles = {"user": "user_id", "item": "item_id", "time": "time_ms", "split_time": 1651330969569}
    prepare_log(root, "sample:kuairand", actions=ACTIONS, columns=COLUMNS, **roles)
    return Log(root)


def read(path, sampler, *, split="train", selection=None):
    """{(user, sample): (inputs [fields, events], labels)} of all samples of an epoch."""
    stochastic_length = selection and {"alpha": 1.3, "selection": selection}
    sizes = {"batch_rows": 4096, "evaluate_rows": 4096}
    config = DataConfig(
        path=str(path), max_history=HISTORY, features=FEATURES, stochastic_length=stochastic_length, **sizes
    )
    found = {}
    for batch in Loader(config, sampler, split=split, rank=0, world_size=1, epochs=1):
        lengths = batch.offsets.diff().numpy()
        of_users = np.repeat(batch.ids["user_id"].values().numpy(), lengths)
        of_events = (batch.timestamps, batch.query_timestamps, batch.actions)
        features = (batch.features[name] for name in COLUMNS)
        fields = [batch.ids["item"].values(), *of_events, *features, of_users]
        inputs = np.split(np.stack([np.asarray(field) for field in fields]), np.cumsum(lengths)[:-1], axis=1)
        sizes = batch.num_targets.numpy() if batch.num_targets.any() else lengths
        labels = np.split(batch.labels.numpy(), np.cumsum(sizes)[:-1])
        for (_, row, number), *sample in zip(batch.samples.tolist(), inputs, labels, strict=True):
            assert (row, number) not in found
            found[row, number] = sample
    return found


def one_target_per_user(log, split, *, seed, first=0):
    """An event of each user who has one in the split, anywhere in it from number `first` on, as its index."""
    begin = log.begins + (first if split == "train" else log.num_train)
    end = log.begins + log.num_train if split == "train" else log.ends
    users = np.flatnonzero(end > begin)
    return np.random.default_rng(seed).integers(begin[users], end[users])


@pytest.mark.parametrize(
    ("split", "selection"), [("train", None), ("train", "random"), ("train", "time_weighted"), ("test", None)]
)
def test_no_ranking_input_depends_on_any_event_at_or_after_its_targets_time(log, tmp_path, split, selection):
    targets = one_target_per_user(log, split, seed=3)
    times, last = log.events["timestamps"], log.place + 1 == (log.ends - log.begins)[log.user]
    assert (times[targets[~last[targets]] + 1] == times[targets[~last[targets]]]).sum() > 100
    other = log.write(tmp_path / "other", log.changed(targets, also_ties=True))
    before, after = (
        read(path, RankingSampler(HISTORY, 1), split=split, selection=selection) for path in (log.root, other)
    )
    assert before.keys() == after.keys()
    numbers = log.place[targets] - (0 if split == "train" else log.num_train[log.user[targets]])
    histories = []
    for sample in zip(log.user[targets].tolist(), numbers.tolist(), strict=True):
        (inputs, labels), (other_inputs, other_labels) = before[sample], after[sample]
        assert np.array_equal(inputs, other_inputs), sample
        assert other_labels == 255 - labels
        histories.append(inputs.shape[1] - 1)
    assert sum(length >= 10 for length in histories) > 200


@pytest.mark.parametrize(("targets_per_sample", "selection"), [(1, None), (3, "time_weighted")])
def test_every_training_event_is_a_ranking_target_exactly_once_per_epoch(log, targets_per_sample, selection):
    labels = defaultdict(list)
    for (row, _), (_, asked) in sorted(
        read(log.root, RankingSampler(HISTORY, targets_per_sample), selection=selection).items()
    ):
        labels[row].extend(asked.tolist())
    expected = np.split(log.events["actions"], log.ends[:-1])
    assert labels == {row: expected[row][:many].tolist() for row, many in enumerate(log.num_train.tolist()) if many}


@pytest.mark.parametrize("selection", [None, "random"])
def test_no_event_of_a_next_item_sample_sees_itself_or_later_ones(log, tmp_path, selection):
    # Where the log has a duration, these copies have the event's number in its row.
    targets = one_target_per_user(log, "train", seed=4, first=1)
    plain, changed = log.events, log.changed(targets, also_ties=False)
    changed["items"][targets] = plain["items"][targets] % int(plain["items"].max()) + 1
    changed["tab"][targets] = 14 - plain["tab"][targets]
    paths = [
        log.write(tmp_path / name, {**events, "duration_ms": log.place})
        for name, events in (("plain", plain), ("changed", changed))
    ]
    before, after = (read(path, NextItemSampler(HISTORY), selection=selection) for path in paths)
    num_asked = 0
    for row, target in zip(log.user[targets].tolist(), log.place[targets].tolist(), strict=True):
        (inputs, labels), (other_inputs, other_labels) = before[row, 0], after[row, 0]
        places = inputs[4 + COLUMNS.index("duration_ms")] - 1
        earlier = places < target
        assert np.array_equal(inputs[:, earlier], other_inputs[:, earlier]), row
        asks_for_it = places == target - 1
        assert np.array_equal(labels[places < target - 1], other_labels[places < target - 1]), row
        assert (labels[asks_for_it] != other_labels[asks_for_it]).all()
        num_asked += int(asks_for_it.sum())
    assert num_asked > len(targets) / 2


@pytest.mark.parametrize("selection", [None, "recent", "time_weighted"])
def test_each_event_kept_of_a_next_item_sample_asks_for_its_successor_and_the_last_is_always_asked_for(log, selection):
    items = np.split(log.events["items"], log.ends[:-1])
    times = np.split(log.events["timestamps"], log.ends[:-1])
    found = read(log.root, NextItemSampler(HISTORY, "recent"), selection=selection)
    assert {row for row, _ in found} == set(np.flatnonzero(log.num_train >= 2).tolist())
    num_cut = 0
    for (row, _), (inputs, labels) in found.items():
        many = int(log.num_train[row])
        columns = (items[row][:many], times[row][:many])
        pairs = list(zip(*(column[:-1] for column in columns), *(column[1:] for column in columns), strict=True))
        pairs, asked = pairs[-HISTORY:], list(zip(inputs[0], inputs[1], labels, inputs[2], strict=True))
        assert asked[-1] == pairs[-1]
        if len(asked) == len(pairs):
            assert asked == pairs
        else:
            num_cut += 1
            remaining = iter(pairs)
            assert all(pair in remaining for pair in asked)
            assert len(asked) == 10
    assert (num_cut > 200) == (selection is not None)
