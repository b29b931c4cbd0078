import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from random_datasets import random_histories, write_dataset

from ultrarec.data.config import FeatureConfig
from ultrarec.data.errors import UserError
from ultrarec.data.memory import Memory
from ultrarec.data.parquet import ParquetFile
from ultrarec.data.reader import COUNT_COLUMNS, Reader
from ultrarec.data.samples import RankingSampler
from ultrarec.data.schema import DatasetInfo
from ultrarec.data.storage import Storage

FEATURES = {
    "tab": FeatureConfig(kind="category", role="event", num_values=4),
    "play_time": FeatureConfig(kind="bucket", role="outcome", num_values=8),
    "age": FeatureConfig(kind="bucket", role="user", num_values=8),
    "user_id": FeatureConfig(kind="hash", role="user", num_values=10**9),
}


@pytest.fixture(scope="module")
def histories():
    return random_histories(num_users=50, num_items=20, mean_events=4, seed=3)


@pytest.fixture
def info(histories, tmp_path):
    return write_dataset(tmp_path / "dataset", histories, num_items=20, num_files=3, rows_per_group=6)


def reader(info, features=None, **options):
    return Reader(info, features or {}, storage=Storage(str(info.root)), memory=Memory(), **options)


def rewrite(info, change, file=0):
    """Replace one history file by what `change` makes of it."""
    path = info.history_paths[file]
    pq.write_table(change(pq.read_table(path)), path, row_group_size=6)


def tab_id(value):
    return value + 1 if value < 4 else 0


@pytest.mark.parametrize("group", range(9))
def test_any_row_group_of_any_file_decodes_to_the_rows_written(info, histories, group):
    opened = reader(info, FEATURES)
    read = opened.read(group)
    rows = range(opened.group_begin[group], opened.group_begin[group + 1])
    assert read.first_row == rows[0]
    for place, row in enumerate(rows):
        written = histories.slice(row, 1).to_pylist()[0]
        events = slice(read.offsets[place], read.offsets[place + 1])
        for name in ("items", "timestamps", "actions"):
            assert read.events[name][events].tolist() == written[name]
        assert read.events["tab"][events].tolist() == [tab_id(value) for value in written["tab"]]
        assert (read.events["play_time"][events] == 0).tolist() == [value is None for value in written["play_time"]]
        assert (read.users["age"][place] == 0) == (written["age"] is None)
    assert len(read.offsets) == len(rows) + 1


def test_rows_and_row_groups_are_numbered_over_all_files(info, histories):
    opened = reader(info)
    assert opened.file_begin.tolist() == [0, 16, 33, 50]
    assert opened.group_begin.tolist() == [0, 6, 12, 16, 22, 28, 33, 39, 45, 50]
    counts = opened.counts_of(np.arange(9))
    for name in ("num_events", "num_train", "num_validation"):
        assert getattr(counts, name).tolist() == histories[name].to_pylist()


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_samples_of_each_row_group_are_counted(info, split):
    opened, sampler = reader(info), RankingSampler(5, 2)
    expected = [int(sampler.num_samples(opened.counts_of(np.array([group])), split).sum()) for group in range(9)]
    assert opened.num_samples(sampler, split).tolist() == expected


def test_only_the_columns_that_are_needed_are_read(info):
    read = reader(info, {"tab": FEATURES["tab"]}).read(0)
    assert sorted(read.events) == ["actions", "items", "tab", "timestamps"]
    assert read.users == {}


def test_large_integers_keep_their_value_beside_nulls(tmp_path, histories):
    ids = pa.array([2**62 + 1, None, *range(48)], pa.int64())
    table = histories.append_column("region", ids)
    info = write_dataset(tmp_path / "dataset", table, num_items=20)
    feature = FeatureConfig(kind="hash", role="user", num_values=10**15)
    read = reader(info, {"region": feature}).read(0)
    without_nulls = table.set_column(table.num_columns - 1, "region", pa.array([2**62 + 1] * 50))
    expected = reader(write_dataset(tmp_path / "other", without_nulls, num_items=20), {"region": feature})
    assert read.users["region"][:2].tolist() == [expected.read(0).users["region"][0], 0]


@pytest.mark.parametrize(
    ("name", "feature", "message"),
    [
        ("taab", FEATURES["tab"], r"features\.taab: .* has no such column; choose one of \['user_id', "),
        ("items", FEATURES["tab"], r"features\.items: .* has no such column"),
        ("age", FEATURES["tab"], r"role='event', but the column holds one value per user; set the role to 'user'"),
        ("tab", FEATURES["age"], r"role='user', but the column holds one value per event; set .* 'event' or 'outcome'"),
        (
            "play_time",
            FeatureConfig(kind="hash", role="event", num_values=9),
            r"features\.play_time\.kind='hash' reads integers or booleans, but the column holds double; drop",
        ),
    ],
)
def test_a_feature_that_the_dataset_cannot_give_is_an_error_with_the_remedy(info, name, feature, message):
    with pytest.raises(UserError, match=message):
        reader(info, {name: feature})


def test_hashing_user_ids_needs_integers(tmp_path, histories):
    names = pa.array([f"u{row}" for row in range(50)])
    info = write_dataset(tmp_path / "dataset", histories.set_column(0, "user_id", names), num_items=20)
    with pytest.raises(
        UserError, match=r"features\.user_id\.kind='hash' reads integers .* but the column holds string"
    ):
        reader(info, {"user_id": FEATURES["user_id"]})


def test_a_missing_file_is_named(info):
    info.history_paths[1].unlink()
    with pytest.raises(UserError, match=r"part-00001\.parquet, all row groups: there is no such file; restore .*"):
        reader(info)


def test_a_damaged_file_is_named(info):
    info.history_paths[1].write_bytes(b"PAR1 and then nothing of use PAR1")
    with pytest.raises(
        UserError, match=r"part-00001\.parquet, all row groups: not a whole Parquet file \(it has 33 bytes, and"
    ):
        reader(info)


def test_a_file_with_other_rows_than_declared_is_an_error(info):
    rewrite(info, lambda table: table.slice(1))
    with pytest.raises(UserError, match=r"part-00000\.parquet, all row groups: 15 rows, but dataset\.json says 16"):
        reader(info)


def test_a_file_without_a_built_in_column_is_an_error(info):
    rewrite(info, lambda table: table.drop_columns("num_train"), file=2)
    with pytest.raises(UserError, match=r"part-00002\.parquet, all row groups, column num_train: the file has no such"):
        reader(info)


def test_lists_that_disagree_with_the_number_of_events_are_an_error(info):
    def shorten(table):
        actions = pa.array([values[1:] for values in table["actions"].to_pylist()], pa.list_(pa.int64()))
        return table.set_column(table.schema.get_field_index("actions"), "actions", actions)

    rewrite(info, shorten)
    with pytest.raises(
        UserError, match=r"row group 0, row \d, column actions: \d+ values, but \d+ events in num_events"
    ):
        reader(info).read(0)


def without_empty(histories):
    return histories.filter(pc.greater(histories["num_events"], 0))


def test_row_groups_are_read_without_looking_for_where_their_lists_begin(histories, tmp_path, monkeypatch):
    written = write_dataset(tmp_path / "new", without_empty(histories), num_items=20, rows_per_group=6)
    older = write_dataset(tmp_path / "old", without_empty(histories), num_items=20, rows_per_group=6)
    rewrite(older, lambda table: table)  # in pages of version 1
    decoded, read = [], ParquetFile.read

    def reading(file, group, columns):
        decoded.extend(columns)
        return read(file, group, columns)

    monkeypatch.setattr(ParquetFile, "read", reading)
    numbers = ("tab", "play_time")
    ways = [reader(info, FEATURES, numbers=numbers) for info in (written, older)]
    for group in range(len(ways[0].group_begin) - 1):
        decoded.clear()
        new = ways[0].read(group)
        # Those with nulls, or one value per user, are.
        assert {"play_time", "age", "user_id"} <= set(decoded) <= {"play_time", "age", "user_id", *COUNT_COLUMNS}
        old = ways[1].read(group)
        assert set(decoded) >= {"items", "timestamps", "actions", "tab"}
        assert new.offsets.tolist() == old.offsets.tolist()
        for now, before in ((new.events, old.events), (new.users, old.users)):
            assert {name: ids.tolist() for name, ids in now.items()} == {
                name: ids.tolist() for name, ids in before.items()
            }


def test_the_lists_of_a_file_that_is_not_the_one_that_was_prepared_are_looked_at(histories, tmp_path):
    info = write_dataset(tmp_path / "dataset", without_empty(histories), num_items=20, rows_per_group=60)
    path = info.history_paths[0]
    table = pq.read_table(path)
    lists = table["actions"].to_pylist()
    row = next(row for row, values in enumerate(lists) if len(values) > 1)
    lists[row], lists[row + 1] = lists[row][:-1], [*lists[row][-1:], *lists[row + 1]]
    table = table.set_column(table.schema.get_field_index("actions"), "actions", pa.array(lists))
    pq.write_table(table.replace_schema_metadata({"by": "hand"}), path, data_page_version="2.0")
    with pytest.raises(UserError, match=rf"row group 0, row {row}, column actions: \d+ values, but \d+ events in"):
        reader(info).read(0)


def test_a_dataset_without_files_has_no_rows(info):
    raw = json.loads((info.root / "dataset.json").read_text())
    (info.root / "dataset.json").write_text(json.dumps({**raw, "files": []}))
    opened = reader(DatasetInfo.load(info.root))
    assert opened.num_samples(RankingSampler(5, 2), "train").tolist() == []
    assert opened.group_begin.tolist() == [0]
