"""Damaged data: named exactly under the policy "error", left out exactly under "skip"."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from random_datasets import random_histories, write_dataset

from ultrarec.data.config import DataConfig, FeatureConfig
from ultrarec.data.errors import UserError
from ultrarec.data.faults import NothingLeftError
from ultrarec.data.loader import Loader, LoaderState, RankingSampler

NUM_ITEMS, ROWS_PER_GROUP = 20, 6
FEATURES = {
    "tab": FeatureConfig(kind="category", role="event", num_values=5),
    "user_id": FeatureConfig(kind="hash", role="user", num_values=100),
}
LISTS = ("items", "timestamps", "actions", "tab")


@pytest.fixture
def info(tmp_path):
    histories = random_histories(num_users=50, num_items=NUM_ITEMS, mean_events=6, seed=3)
    return write_dataset(tmp_path / "dataset", histories, num_items=NUM_ITEMS, num_files=3, rows_per_group=6)


def loader(info, *, bad_data, rank=0, world_size=1, state=None):
    config = DataConfig(path=str(info.root), features=FEATURES, batch_rows=7, shuffle_row_groups=4, bad_data=bad_data)
    sampler, state = RankingSampler(6, 2), state or LoaderState()
    options = {"split": "train", "rank": rank, "world_size": world_size, "epochs": 1, "state": state}
    return Loader(config, sampler, **options)


def everything(info, **options):
    """(file, row, sample) of all trained and of all skipped samples, and the skipped ones' faults."""
    batches = list(loader(info, **options))
    trained = [tuple(sample) for batch in batches for sample in batch.samples.tolist()]
    skipped = [skip for batch in batches for skip in batch.skipped]
    return trained, [(skip.file, skip.row, skip.sample) for skip in skipped], [skip.fault for skip in skipped]


def change_row(info, file, row, name, change):
    """Write a history file anew with another list in one row."""
    path = info.history_paths[file]
    table = pq.read_table(path)
    lists = table[name].to_pylist()
    lists[row] = change(lists[row])
    index = table.schema.get_field_index(name)
    changed = table.set_column(index, table.schema.field(name), pa.array(lists, table.schema.field(name).type))
    pq.write_table(changed, path, row_group_size=ROWS_PER_GROUP, write_page_checksum=True)


def long_row(info, file):
    """A row with several training events, past the first row group."""
    table = pq.read_table(info.history_paths[file])
    return next(row for row in range(7, table.num_rows) if table["num_train"][row].as_py() >= 4)


BROKEN_ROWS = {
    "a shorter list": ("actions", lambda values: values[1:], r"column actions: \d+ values, but \d+ events"),
    "a longer feature": ("tab", lambda values: [*values, 1], r"column tab: \d+ values, but \d+ events"),
    "no list at all": ("timestamps", lambda values: None, r"column timestamps: 0 values, but \d+ events"),
    "a null": ("items", lambda values: [None, *values[1:]], "column items: a null"),
    "an id beyond the vocabulary": ("items", lambda values: [21, *values[1:]], "column items: id 21, but ids reach"),
    "a negative id": ("items", lambda values: [*values[:-1], -1], "column items: id -1, but ids reach from 0 to 20"),
    "times out of order": ("timestamps", lambda values: [values[-1] + 5, *values[1:]], r"column timestamps: \d+ after"),
}


@pytest.mark.parametrize("kind", BROKEN_ROWS)
def test_a_row_that_breaks_a_rule_is_named_or_left_out_alone(info, kind):
    column, change, message = BROKEN_ROWS[kind]
    whole, _, _ = everything(info, bad_data="error")
    row = long_row(info, 1)
    change_row(info, 1, row, column, change)
    with pytest.raises(UserError, match=rf"part-00001\.parquet, row group {row // 6}, row {row}, {message}.*bad_data="):
        list(loader(info, bad_data="error"))
    trained, skipped, faults = everything(info, bad_data="skip")
    assert {(file, number) for file, number, _ in skipped} == {(1, row)}
    assert sorted(trained + skipped) == sorted(whole)
    assert {(fault.row_group, fault.row, fault.column) for fault in faults} == {(row // 6, row, column)}


def test_what_is_left_out_is_the_same_on_every_world_size_and_across_restarts(info):
    whole, _, _ = everything(info, bad_data="error")
    change_row(info, 1, long_row(info, 1), "items", lambda values: [99, *values[1:]])
    alone, left_out, _ = everything(info, bad_data="skip")
    ranks = [list(loader(info, bad_data="skip", rank=rank, world_size=3)) for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1
    half = len(ranks[0]) // 2
    resumed = list(loader(info, bad_data="skip", state=ranks[0][half - 1].state))
    batches = [batch for rank in ranks for batch in rank[:half]] + resumed
    trained = [tuple(sample) for batch in batches for sample in batch.samples.tolist()]
    skipped = [(skip.file, skip.row, skip.sample) for batch in batches for skip in batch.skipped]
    assert (sorted(trained), sorted(skipped)) == (sorted(alone), sorted(left_out))
    assert sorted(trained + skipped) == sorted(whole)


def test_other_rows_of_the_row_group_keep_their_events(info):
    def inputs(batches):
        return {
            tuple(sample): (batch.ids["item"].values()[begin:end].tolist(), batch.features["tab"][begin:end].tolist())
            for batch in batches
            for sample, begin, end in zip(
                batch.samples.tolist(), batch.offsets.tolist(), batch.offsets.tolist()[1:], strict=False
            )
        }

    before = inputs(loader(info, bad_data="error"))
    change_row(info, 1, long_row(info, 1), "tab", lambda values: [*values, 4, 4])
    after = inputs(loader(info, bad_data="skip"))
    assert 0 < len(after) < len(before)
    assert after == {sample: found for sample, found in before.items() if sample in after}


def corrupt(path, group, name):
    """Turn over the last bytes of one column of one row group."""
    chunks = pq.read_metadata(path).row_group(group)
    chunk = next(
        chunks.column(k) for k in range(chunks.num_columns) if chunks.column(k).path_in_schema.startswith(name)
    )
    data = bytearray(path.read_bytes())
    last = (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size
    data[last - 4 : last] = bytes(255 - byte for byte in data[last - 4 : last])
    path.write_bytes(data)


def test_a_row_group_that_fails_its_checksum_is_named_or_left_out_alone(info):
    change_row(info, 0, 0, "items", lambda values: values)  # written anew, with checksums of its pages
    whole, _, _ = everything(info, bad_data="error")
    corrupt(info.history_paths[0], 1, "timestamps")
    with pytest.raises(UserError, match=r"part-00000\.parquet, row group 1, column timestamps: .*CRC"):
        list(loader(info, bad_data="error"))
    trained, skipped, faults = everything(info, bad_data="skip")
    assert {(file, row // 6) for file, row, _ in skipped} == {(0, 1)}
    assert sorted(trained + skipped) == sorted(whole)
    assert {(fault.row_group, fault.column) for fault in faults} == {(1, "timestamps")}


def rewrite(path, change):
    """Write a history file anew as what `change` makes of its table."""
    pq.write_table(change(pq.read_table(path)), path, row_group_size=ROWS_PER_GROUP, write_page_checksum=True)


def retype(table, name, new):
    return table.set_column(table.schema.get_field_index(name), name, table[name].cast(new))


BROKEN_FILES = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "not a whole Parquet file .* end in PAR1"),
    "truncated to nothing": (lambda path: path.write_bytes(b""), "not a whole Parquet file .* 0 bytes do not end in"),
    "a footer beyond the file": (
        lambda path: path.write_bytes(path.read_bytes()[-60:]),
        r"not a whole Parquet file \(it has 60 bytes, and ends with a footer of \d{3,}\)",
    ),
    "missing": (lambda path: path.unlink(), "there is no such file"),
    "fewer rows": (lambda path: rewrite(path, lambda table: table.slice(3)), r"14 rows, but dataset\.json says 17"),
    "more rows": (
        lambda path: rewrite(path, lambda table: pa.concat_tables([table, table.slice(0, 2)])),
        r"19 rows, but dataset\.json says 17",
    ),
    "fewer row groups": (
        lambda path: pq.write_table(pq.read_table(path), path, row_group_size=12, write_page_checksum=True),
        r"2 row groups, but dataset\.json says 3",
    ),
    "as many other row groups": (
        lambda path: pq.write_table(pq.read_table(path), path, row_group_size=7, write_page_checksum=True),
        r"row group 0 has 7 rows, but dataset\.json says 6",
    ),
    "a removed column": (
        lambda path: rewrite(path, lambda table: table.drop_columns("tab")),
        "column tab: the file has no such column, and the dataset says list of int64",
    ),
    "a retyped column": (
        lambda path: rewrite(path, lambda table: retype(table, "tab", pa.list_(pa.float64()))),
        "column tab: list of double, but the dataset says list of int64",
    ),
    "a retyped built-in column": (
        lambda path: rewrite(path, lambda table: retype(table, "num_train", pa.int64())),
        "column num_train: int64, but the dataset says int32",
    ),
    "retyped user ids": (
        lambda path: rewrite(path, lambda table: retype(table, "user_id", pa.string())),
        "column user_id: string, but other files hold int64",
    ),
}


@pytest.mark.parametrize("kind", BROKEN_FILES)
def test_a_file_that_is_not_what_was_prepared_is_named_or_left_out_alone(info, kind):
    damage, problem = BROKEN_FILES[kind]
    whole, _, _ = everything(info, bad_data="error")
    path = info.history_paths[1]
    damage(path)
    with pytest.raises(
        UserError, match=rf"part-00001\.parquet, all row groups.*{problem}.*; restore the file or prepare .*bad_data="
    ):
        loader(info, bad_data="error")
    left = loader(info, bad_data="skip")
    trained = [tuple(sample) for batch in left for sample in batch.samples.tolist()]
    assert sorted(trained) == sorted(sample for sample in whole if sample[0] != 1)
    assert [(fault.file, fault.num_rows) for fault in left.faults] == [(str(path), 17)]


def test_a_run_does_not_go_on_with_a_file_of_other_row_groups(info):
    """It would lose some samples and repeat others."""
    state = next(iter(loader(info, bad_data="error"))).state
    path = info.history_paths[0]
    pq.write_table(pq.read_table(path), path, row_group_size=12, write_page_checksum=True)
    with pytest.raises(UserError, match=r"part-00000\.parquet, all row groups: 2 row groups, but dataset\.json says 3"):
        loader(info, bad_data="error", state=state)


@pytest.mark.parametrize("bad_data", ["error", "skip"])
def test_a_file_that_disappears_while_it_is_read_is_an_error_and_never_a_gap(info, monkeypatch, bad_data):
    monkeypatch.setattr("ultrarec.data.reader.OPEN_FILES", 0)
    opened = loader(info, bad_data=bad_data)
    info.history_paths[2].unlink()
    with pytest.raises(
        UserError, match=r"part-00002\.parquet, row group \d: there is no such file; .*restore the file"
    ):
        list(opened)


def test_a_dataset_whose_only_file_is_truncated_says_so(tmp_path):
    histories = random_histories(num_users=50, num_items=NUM_ITEMS, mean_events=6, seed=3)
    info = write_dataset(tmp_path / "dataset", histories, num_items=NUM_ITEMS)
    info.history_paths[0].write_bytes(info.history_paths[0].read_bytes()[:1000])
    with pytest.raises(
        NothingLeftError,
        match=r"nothing is left to train on: data\.bad_data='skip' leaves out 50 of 50 rows, first .*part-00000\.pa",
    ) as raised:
        loader(info, bad_data="skip")
    assert [fault.num_rows for fault in raised.value.faults] == [50]


def test_labels_of_samples_left_out_are_told_from_those_that_are_trained(info):
    change_row(info, 1, long_row(info, 1), "items", lambda values: [99, *values[1:]])
    batches = list(loader(info, bad_data="skip"))
    assert sum(batch.num_skipped_labels for batch in batches) > 0
    for batch in batches:
        assert batch.num_labels - batch.num_skipped_labels == batch.labels.numel()


def test_counts_that_contradict_each_other_leave_out_their_row(info):
    whole, _, _ = everything(info, bad_data="error")
    row, path = long_row(info, 2), info.history_paths[2]
    table = pq.read_table(path)
    num_train = table["num_train"].to_numpy().copy()
    num_train[row] = 1000
    index = table.schema.get_field_index("num_train")
    pq.write_table(table.set_column(index, "num_train", pa.array(num_train)), path, row_group_size=ROWS_PER_GROUP)
    with pytest.raises(
        UserError, match=rf"row group \d, row {row}, column num_events: 1000 training and \d+ validation"
    ):
        loader(info, bad_data="error")
    trained, skipped, _ = everything(info, bad_data="skip")
    assert skipped == []
    assert sorted(trained) == sorted(sample for sample in whole if sample[:2] != (2, row))
    assert [(fault.row, fault.column) for fault in loader(info, bad_data="skip").faults] == [(row, "num_events")]


def test_a_column_that_was_added_does_no_harm(info):
    whole, _, _ = everything(info, bad_data="error")
    path = info.history_paths[1]
    table = pq.read_table(path)
    pq.write_table(table.append_column("later", pa.array(np.arange(table.num_rows))), path, row_group_size=6)
    assert everything(info, bad_data="error")[0] == whole


def test_a_user_without_events_gives_no_sample_and_no_error(info):
    tables = [pq.read_table(path) for path in info.history_paths]
    assert any(length == 0 for table in tables for length in table["num_events"].to_pylist())
    assert len(everything(info, bad_data="error")[0]) > 50
