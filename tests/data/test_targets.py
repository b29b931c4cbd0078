"""Every training event is a target exactly once per epoch, and its inputs are earlier events of the same user."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from random_datasets import write_dataset

from ultrarec.data.config import DataConfig
from ultrarec.data.loader import Loader, NextItemSampler, RankingSampler

LENGTHS = (0, 1, 2, 6, 7, 8, 9, 14, 15, 16, 50, 71)
HISTORY = 7
"""Most users have several times as many events."""
HELD_OUT = 2


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Users whose n-th event, from 1, is of item n; the last two events of each are held out."""
    lengths = np.array(LENGTHS)
    train = np.maximum(lengths - HELD_OUT, 0)
    numbers = np.concatenate([np.arange(1, length + 1) for length in lengths])
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    lists = {"items": numbers, "timestamps": 1000 * numbers, "actions": np.ones_like(numbers)}
    scalars = {"num_events": lengths, "num_train": train, "num_validation": (lengths - train) // 2}
    histories = pa.table(
        {
            "user_id": pa.array(np.arange(len(lengths))),
            **{name: pa.ListArray.from_arrays(offsets, pa.array(values)) for name, values in lists.items()},
            **{name: pa.array(values, pa.int32()) for name, values in scalars.items()},
        }
    )
    root = tmp_path_factory.mktemp("targets") / "dataset"
    write_dataset(root, histories, num_items=max(LENGTHS), num_files=2, rows_per_group=2)
    return str(root)


def asked(path, sampler, *, epochs=1, world_size=1):
    """(epoch, user, target, events that the model reads when it is asked) of everything that training asks."""
    for rank in range(world_size):
        options = {"split": "train", "rank": rank, "world_size": world_size, "epochs": epochs}
        for batch in Loader(DataConfig(path=path, batch_tokens=40), sampler, **options):
            bounds, items = batch.offsets.tolist(), batch.ids["item"].values().tolist()
            users, labels = iter(batch.users.tolist()), iter(batch.labels.tolist())
            for begin, end, targets in zip(bounds, bounds[1:], batch.num_targets.tolist(), strict=False):
                # A next-item position reads what stands before it, and itself.
                for place in range(end - targets if targets else begin, end):
                    target = items[place] if targets else next(labels)
                    read = items[begin : end - targets] if targets else items[begin : place + 1]
                    yield batch.epoch, next(users), target, read


TRAINED = {user: range(1, length - HELD_OUT + 1) for user, length in enumerate(LENGTHS)}


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("targets_per_sample", [1, 3])
def test_in_ranking_every_training_event_is_a_target_once_per_epoch(path, targets_per_sample, world_size):
    found = Counter(
        place[:3] for place in asked(path, RankingSampler(HISTORY, targets_per_sample), epochs=2, world_size=world_size)
    )
    assert found == Counter((epoch, user, event) for epoch in (0, 1) for user in TRAINED for event in TRAINED[user])


@pytest.mark.parametrize("world_size", [1, 3])
def test_for_the_next_item_every_training_event_with_one_before_it_is_a_target_once_per_epoch(path, world_size):
    found = Counter(place[:3] for place in asked(path, NextItemSampler(HISTORY), epochs=2, world_size=world_size))
    assert found == Counter((epoch, user, event) for epoch in (0, 1) for user in TRAINED for event in TRAINED[user][1:])


@pytest.mark.parametrize("sampler", [RankingSampler(HISTORY, 1), RankingSampler(HISTORY, 3), NextItemSampler(HISTORY)])
def test_inputs_are_the_events_before_the_target_without_a_gap(path, sampler):
    for _, _, target, read in asked(path, sampler):
        assert len(read) <= HISTORY
        newest = read[-1] if read else 0
        assert read == list(range(newest - len(read) + 1, newest + 1))
        # Targets of one sample do not see each other.
        assert target - getattr(sampler, "targets_per_sample", 1) <= newest < target


@pytest.mark.parametrize("sampler", [RankingSampler(HISTORY, 2, "recent"), NextItemSampler(HISTORY, "recent")])
def test_with_recent_targets_the_newest_events_of_each_user_are_targets_once(path, sampler):
    first = 1 if isinstance(sampler, NextItemSampler) else 0
    found = Counter(place[1:3] for place in asked(path, sampler))
    assert found == Counter((user, event) for user in TRAINED for event in TRAINED[user][first:][-HISTORY:])
