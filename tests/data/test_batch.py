import dataclasses

import pyarrow as pa
import pytest
import torch
from random_datasets import write_dataset

from ultrarec.data.config import DataConfig, FeatureConfig
from ultrarec.data.errors import UserError
from ultrarec.data.loader import Candidates, Loader, LoaderState, NextItemSampler, RankingSampler

FEATURES = {
    "tab": FeatureConfig(kind="category", role="event", num_values=9),
    "liked": FeatureConfig(kind="category", role="outcome", num_values=9),
    "city": FeatureConfig(kind="category", role="user", num_values=9),
    "user_id": FeatureConfig(kind="hash", role="user", num_values=10**6),
}


def splitmix64(number):
    """The first output of SplitMix64 seeded with a number, in Python's own integers."""
    bits = (number + 0x9E3779B97F4A7C15) % 2**64
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
    return bits ^ bits >> 31


CPU = torch.device("cpu")
USER_IDS = {user: 1 + splitmix64(user) % 10**6 for user in (7, 8)}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Two users: one with 4 events to train, 1 to validate and 1 to test, one with 2 to train."""
    int32 = pa.int32()
    histories = pa.table(
        {
            "user_id": [7, 8],
            "items": [[11, 12, 13, 14, 15, 16], [21, 22]],
            "timestamps": [[100, 200, 300, 400, 500, 600], [150, 250]],
            "actions": [[1, 2, 3, 0, 1, 2], [3, 1]],
            "num_events": pa.array([6, 2], int32),
            "num_train": pa.array([4, 2], int32),
            "num_validation": pa.array([1, 0], int32),
            "tab": [[0, 1, 2, 3, 4, 5], [6, 7]],
            "liked": [[5, 4, 3, 2, 1, 0], [8, 7]],
            "speed": [[0.5, -1.5, 2.5, 0.0, 9.0, 9.0], [None, 1048576.0]],
            "name": [["a"] * 6, ["b"] * 2],
            "city": [3, None],
            "candidate": [1, 2],
        }
    )
    root = tmp_path_factory.mktemp("literal") / "dataset"
    write_dataset(root, histories, num_items=30)
    return str(root)


def batches(path, sampler, *, split="train", rank=0, world_size=1, features=FEATURES, candidates=None):
    config = DataConfig(path=path, batch_rows=8, features=features, max_history=3)
    loader = Loader(config, sampler, split=split, rank=rank, world_size=world_size, epochs=1, candidates=candidates)
    return list(loader)


def only(found):
    (batch,) = found
    return batch


def by_sample(batch, tensor):
    """Lists of a [T] tensor by the (file, row, sample) they belong to."""
    bounds = batch.offsets.tolist()
    return {
        tuple(sample): tensor[bounds[place] : bounds[place + 1]].tolist()
        for place, sample in enumerate(batch.samples.tolist())
    }


def tensors(batch):
    """Every tensor of a batch by name."""
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    named = {name: value for name, value in fields.items() if isinstance(value, torch.Tensor)}
    ids = {"ids.values": batch.ids.values(), "ids.lengths": batch.ids.lengths()}
    return {**named, **batch.features, **ids}


def test_a_ranking_sample_is_its_history_then_its_targets_without_their_outcomes(path):
    batch = only(batches(path, RankingSampler(3, 2)))
    first, second, other = (0, 0, 0), (0, 0, 1), (0, 1, 0)
    items = batch.ids["item"].values()
    assert by_sample(batch, items) == {first: [11, 12], second: [11, 12, 13, 14], other: [21, 22]}
    times = {first: [100, 200], second: [100, 200, 300, 400], other: [150, 250]}
    assert by_sample(batch, batch.timestamps) == by_sample(batch, batch.query_timestamps) == times
    assert by_sample(batch, batch.actions) == {first: [0, 0], second: [1, 2, 0, 0], other: [0, 0]}
    assert by_sample(batch, batch.features["tab"]) == {first: [1, 2], second: [1, 2, 3, 4], other: [7, 8]}
    assert by_sample(batch, batch.features["liked"]) == {first: [0, 0], second: [6, 5, 0, 0], other: [0, 0]}
    assert batch.num_targets.tolist() == [2, 2, 2]


def test_ranking_labels_are_the_action_masks_of_the_targets_in_order(path):
    batch = only(batches(path, RankingSampler(3, 2)))
    expected = {(0, 0, 0): [1, 2], (0, 0, 1): [3, 0], (0, 1, 0): [3, 1]}
    order = [tuple(sample) for sample in batch.samples.tolist()]
    assert batch.labels.tolist() == [label for sample in order for label in expected[sample]]
    assert batch.users.tolist() == [row for _, row, _ in order for _ in range(2)]
    assert batch.num_labels == 6


def test_ranking_evaluation_sees_everything_before_the_target(path):
    batch = only(batches(path, RankingSampler(3, 2), split="test"))
    assert batch.ids["item"].values().tolist() == [13, 14, 15, 16]
    assert batch.actions.tolist() == [3, 0, 1, 0]
    assert batch.labels.tolist() == [2]
    assert batch.samples.tolist() == [[0, 0, 0]]


def test_user_features_are_one_id_per_sample_and_hashes_are_looked_up(path):
    batch = only(batches(path, RankingSampler(3, 2)))
    rows = [row for _, row, _ in batch.samples.tolist()]
    assert batch.features["city"].tolist() == [[4, 0][row] for row in rows]
    assert batch.ids["user_id"].values().tolist() == [USER_IDS[[7, 8][row]] for row in rows]
    assert batch.ids["user_id"].lengths().tolist() == [1, 1, 1]


def test_next_item_training_asks_each_event_for_its_successor(path):
    batch = only(batches(path, NextItemSampler(3)))
    first, other = (0, 0, 0), (0, 1, 0)
    assert by_sample(batch, batch.ids["item"].values()) == {first: [11, 12, 13], other: [21]}
    assert by_sample(batch, batch.labels) == {first: [12, 13, 14], other: [22]}
    assert by_sample(batch, batch.timestamps) == {first: [100, 200, 300], other: [150]}
    assert by_sample(batch, batch.query_timestamps) == {first: [200, 300, 400], other: [250]}
    assert by_sample(batch, batch.actions) == {first: [1, 2, 3], other: [3]}
    assert by_sample(batch, batch.features["liked"]) == {first: [6, 5, 4], other: [9]}
    assert by_sample(batch, batch.users) == {first: [0, 0, 0], other: [1]}
    assert batch.num_targets.tolist() == [0, 0]
    assert batch.num_labels == 4


def test_next_item_evaluation_asks_for_one_item_at_the_time_of_the_request(path):
    batch = only(batches(path, NextItemSampler(3), split="test"))
    assert batch.ids["item"].values().tolist() == [13, 14, 15]
    assert batch.query_timestamps.tolist() == [400, 500, 600]
    assert batch.labels.tolist() == [16]
    assert batch.users.tolist() == [0]


def test_the_ids_of_a_step_are_one_keyed_jagged_tensor(path):
    batch = only(batches(path, NextItemSampler(3), candidates=Candidates("sampled", 30, 5)))
    negatives = Candidates("sampled", 30, 5).ids(seed=0, epoch=0, first_sample=0).tolist()
    rows = [row for _, row, _ in batch.samples.tolist()]
    assert batch.ids.keys() == ["item", "user_id", "positive", "candidate"]
    assert batch.ids.stride() == 2
    lengths = [[3, 1][row] for row in rows]
    assert batch.ids.lengths().tolist() == [*lengths, 1, 1, *lengths, 5, 0]
    items = [item for row in rows for item in [[11, 12, 13], [21]][row]]
    positives = [item for row in rows for item in [[12, 13, 14], [22]][row]]
    users = [USER_IDS[[7, 8][row]] for row in rows]
    assert batch.ids.values().tolist() == [*items, *users, *positives, *negatives]
    assert batch.ids.weights_or_none() is None


def test_numbers_are_the_values_at_the_targets_and_nan_where_there_is_none(path):
    config = DataConfig(path=path, batch_rows=8, max_history=3)
    found = {}
    for rank in range(3):
        loader = Loader(
            config, RankingSampler(3, 2), split="train", rank=rank, world_size=3, epochs=1, numbers=["liked", "speed"]
        )
        batch = only(list(loader)).to(CPU)
        assert {name: values.dtype for name, values in batch.numbers.items()} == dict.fromkeys(
            ("liked", "speed"), torch.float32
        )
        pairs = zip(batch.numbers["liked"].tolist(), batch.numbers["speed"].tolist(), strict=True)
        found |= dict(pairs)
    missing = found.pop(8.0)
    assert found == {5.0: 0.5, 4.0: -1.5, 3.0: 2.5, 2.0: 0.0, 7.0: 1048576.0}
    assert missing != missing


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("city", "objective.regressions.city: the dataset has no such column of events; choose one of ['tab',"),
        ("name", "objective.regressions.name predicts numbers, but the column holds string"),
    ],
)
def test_a_column_that_holds_no_number_per_event_cannot_be_predicted(path, column, expected):
    config = DataConfig(path=path, batch_rows=8, max_history=3)
    with pytest.raises(UserError) as caught:
        Loader(config, RankingSampler(3, 2), split="train", rank=0, world_size=1, epochs=1, numbers=[column])
    assert expected in str(caught.value)


def test_candidates_of_samples_lie_in_their_bags_whatever_rank_reads_them(path):
    candidates = Candidates("per_sample", 30, 5)

    def by_row(batch):
        rows = [row for _, row, _ in batch.samples.tolist()]
        return dict(zip(rows, batch.ids["candidate"].values().view(-1, 5).tolist(), strict=True))

    batch = only(batches(path, NextItemSampler(3), candidates=candidates))
    assert batch.ids["candidate"].lengths().tolist() == [5, 5]
    together = by_row(batch)
    assert together[0] != together[1]
    ranks = [only(batches(path, NextItemSampler(3), rank=r, world_size=3, candidates=candidates)) for r in range(3)]
    assert {row: ids for b in ranks if len(b.samples) for row, ids in by_row(b).items()} == together
    # A rank without samples has one of no events, whose candidates nothing is compared with.
    assert [b.ids["candidate"].lengths().tolist() for b in ranks if not len(b.samples)] == [[5]]


def test_a_catalogue_has_no_positives_of_its_own(path):
    batch = only(batches(path, NextItemSampler(3), candidates=Candidates("catalogue", 30)))
    assert batch.ids.keys() == ["item", "user_id", "candidate"]
    assert batch.ids["candidate"].values().tolist() == list(range(1, 31))


@pytest.mark.parametrize(
    ("sampler", "candidates"),
    [(RankingSampler(3, 2), None), (NextItemSampler(3), Candidates("sampled", 30, 5))],
)
def test_a_rank_without_samples_gets_one_sample_of_no_events(path, sampler, candidates):
    ranks = [only(batches(path, sampler, rank=rank, world_size=5, candidates=candidates)) for rank in range(5)]
    empty = next(batch for batch in ranks if not len(batch.samples))
    full = only(batches(path, sampler, candidates=candidates))
    assert empty.offsets.tolist() == [0, 0]
    assert empty.num_targets.tolist() == [0]
    assert empty.ids.keys() == full.ids.keys()
    assert empty.ids.stride() == 1
    assert empty.ids["item"].lengths().tolist() == [0]
    assert empty.ids["user_id"].values().tolist() == [0]
    assert empty.features["city"].tolist() == [0]
    assert empty.features.keys() == full.features.keys()
    assert [len(x) for x in (empty.labels, empty.users, empty.samples, empty.timestamps, empty.actions)] == [0] * 5
    assert (empty.num_labels, empty.state) == (full.num_labels, full.state)
    if candidates is not None:
        assert empty.ids["candidate"].values().tolist() == full.ids["candidate"].values().tolist()
        assert empty.ids["positive"].lengths().tolist() == [0]


def test_every_tensor_holds_int64(path):
    batch = only(batches(path, NextItemSampler(3), candidates=Candidates("sampled", 30, 5)))
    assert {name: tensor.dtype for name, tensor in tensors(batch).items() if tensor.dtype != torch.int64} == {}


def test_a_feature_may_not_take_the_name_of_an_item_lookup(path):
    feature = FeatureConfig(kind="hash", role="user", num_values=9)
    with pytest.raises(UserError, match=r"data\.features\.candidate: 'candidate' is the name of a lookup"):
        batches(path, RankingSampler(3, 2), features={"candidate": feature})


def assert_same(moved, batch, *, device):
    assert moved.state == batch.state == LoaderState(epoch=1)
    assert (moved.num_labels, moved.epoch, moved.ids.keys()) == (batch.num_labels, batch.epoch, batch.ids.keys())
    expected = tensors(batch)
    assert tensors(moved).keys() == expected.keys()
    for name, tensor in tensors(moved).items():
        assert tensor.device.type == ("cpu" if name == "samples" else device), name
        if device != "meta":
            assert torch.equal(tensor.cpu(), expected[name]), name


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_moving_a_batch_keeps_every_field_and_leaves_the_audit_on_the_cpu(path, device):
    batch = only(batches(path, NextItemSampler(3), candidates=Candidates("sampled", 30, 5)))
    assert_same(batch.to(torch.device(device), non_blocking=True), batch, device=device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_pinned_batch_reaches_the_gpu_and_outlives_the_stream_that_copied_it(path):
    batch = only(batches(path, NextItemSampler(3), candidates=Candidates("sampled", 30, 5)))
    pinned = batch.pin_memory()
    assert all(tensor.is_pinned() for name, tensor in tensors(pinned).items() if name != "samples")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        moved = pinned.to(torch.device("cuda"), non_blocking=True)
    torch.cuda.current_stream().wait_stream(stream)
    moved.record_stream(torch.cuda.current_stream())
    assert_same(moved, batch, device="cuda")
