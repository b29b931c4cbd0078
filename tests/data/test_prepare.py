"""What a prepared dataset holds, checked against the log it was made from."""

import gzip
import hashlib
import itertools
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from interaction_logs import histories, items, log_with_ties, original_items, prepare_log, write_csv, write_log

from ultrarec.data.errors import UserError
from ultrarec.data.preparation.streams import rows_per_batch
from ultrarec.data.preparation.writing import (
    BYTES_PER_ROW_GROUP,
    events_per_row_group,
    row_groups,
    users_per_row_group,
)
from ultrarec.data.schema import Column, DatasetInfo


def places_in_true_order(log):
    """{user: places} by time, and where times are equal by place."""
    order = np.lexsort((log["place"], log["time"], log["user"]))
    users, starts = np.unique(log["user"][order], return_index=True)
    places = np.split(log["place"][order], starts[1:])
    return {int(user): part.tolist() for user, part in zip(users, places, strict=True)}


# Order


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_ties_keep_the_order_of_files_and_rows(tmp_path, suffix, threads):
    log = log_with_ties(60_000)
    paths = []
    for part, rows in enumerate(np.array_split(np.arange(60_000), 3)):
        path = tmp_path / f"part-{9 - part}.{suffix}"  # names sort against the order given
        write = write_log if suffix == "parquet" else write_csv
        paths.append(write(path, {name: values[rows] for name, values in log.items()}))
    info = prepare_log(tmp_path / "out", *paths, columns=("place",), threads=threads)
    assert {row["user_id"]: row["place"] for row in histories(info)} == places_in_true_order(log)


def test_ties_keep_file_order_when_the_sort_spills_to_disk(tmp_path):
    log = log_with_ties(1_000_000, num_users=2_000)
    path = write_log(tmp_path / "log.parquet", log, row_group_size=50_000)
    info = prepare_log(tmp_path / "out", path, columns=("place",), memory_limit="40MB", threads=2)
    assert {row["user_id"]: row["place"] for row in histories(info)} == places_in_true_order(log)


def test_the_order_column_decides_ties_before_the_file_order_does(tmp_path):
    log = {"user": [1] * 4, "item": [10, 11, 12, 13], "time": [5, 5, 5, 1], "step": [2, 1, 1, 9]}
    info = prepare_log(tmp_path / "out", write_log(tmp_path / "log.parquet", log), order="step")
    assert original_items(info) == {1: [13, 11, 12, 10]}


@pytest.mark.parametrize("log", ["logs", "logs/*.csv", "logs/b?.csv"])
def test_a_folder_or_a_glob_is_read_in_the_order_of_names(tmp_path, monkeypatch, log):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    for number in (2, 1, 3):
        write_csv(tmp_path / f"logs/b{number}.csv", {"user": [1], "item": [number], "time": [0]})
    info = prepare_log(tmp_path / "out", log)
    assert original_items(info) == {1: [1, 2, 3]}
    assert [source.path for source in info.sources] == [f"logs/b{number}.csv" for number in (1, 2, 3)]


def test_names_with_glob_characters_are_taken_as_they_are(tmp_path):
    write_csv(tmp_path / "log1.csv", {"user": [1], "item": [1], "time": [0]})
    path = write_csv(tmp_path / "log[1].csv", {"user": [2], "item": [2], "time": [0]})
    assert original_items(prepare_log(tmp_path / "out", path)) == {2: [2]}


def test_any_number_of_threads_writes_the_same_bytes(tmp_path):
    path = write_log(tmp_path / "log.parquet", log_with_ties(30_000, num_users=5_000))
    options = {"columns": ("place",), "leave_last": 1}
    infos = [prepare_log(tmp_path / f"out{n}", path, threads=n, **options) for n in (1, 2, 4)]
    for file in (*infos[0].files, infos[0].vocabularies["items"]):
        assert len({info.locate(file.path).read_bytes() for info in infos}) == 1, file.path


def test_histories_longer_than_a_batch_and_many_row_groups_come_out_whole(tmp_path):
    log = log_with_ties(300_000, num_users=2)
    log["user"] = np.where(np.arange(300_000) < 290_000, 0, np.arange(300_000) % 4_000)
    info = prepare_log(
        tmp_path / "out", write_log(tmp_path / "log.parquet", log, row_group_size=9_999), columns=("place",)
    )
    assert {row["user_id"]: row["place"] for row in histories(info)} == places_in_true_order(log)
    assert info.files[0].row_groups == pq.ParquetFile(info.history_paths[0]).num_row_groups == 2


def test_row_groups_are_bounded_in_events_and_a_longer_history_stands_alone():
    groups = row_groups(np.array([1, 99, 1, 300, 2, 98]), 100)
    assert groups == [range(2), range(2, 3), range(3, 4), range(4, 6)]


def test_row_groups_hold_fewer_events_of_more_columns():
    columns = {"a": Column(kind="event", type="double"), "b": Column(kind="event", type="string")}
    assert events_per_row_group({}, {}) == 2 * events_per_row_group(columns, {"b": 12}) == 1 << 19
    assert events_per_row_group({"a": Column(kind="user", type="double")}, {}) == 1 << 19
    assert events_per_row_group(columns, {"b": 1 << 30}) == 1


def test_batches_on_their_way_hold_few_rows_where_strings_are_long():
    assert rows_per_batch({}) == rows_per_batch({"a": 100, "b": 12}) == 1 << 17
    assert 24 << 20 < rows_per_batch({"a": 1000, "b": 500}) * 1500 <= 32 << 20
    assert rows_per_batch({"a": 1 << 30}) == 1


def test_row_groups_of_long_strings_are_no_larger_than_others(tmp_path):
    letters = np.random.default_rng(0).integers(97, 123, (10_000, 1_500), np.uint8)
    log = log_with_ties(10_000, num_users=1_000) | {"text": [bytes(row).decode() for row in letters]}
    info = prepare_log(tmp_path / "out", write_log(tmp_path / "log.parquet", log), columns=("text",))
    [path] = info.history_paths
    with pq.ParquetFile(path) as file:
        sizes = [file.read_row_group(number).nbytes for number in range(file.num_row_groups)]
    assert 0.9 * BYTES_PER_ROW_GROUP < max(sizes) < 1.1 * BYTES_PER_ROW_GROUP, sizes
    assert sum(sizes) > 10_000 * 1_500


def test_row_groups_grow_with_the_number_of_users_within_bounds():
    assert [users_per_row_group(users) for users in (10, 2**21, 2**22, 10**9)] == [2048, 2048, 4096, 16384]


# Splits


@pytest.mark.parametrize(
    ("last", "num_events", "parts"),
    [(1, 2, (2, 0, 0)), (1, 3, (1, 1, 1)), (1, 7, (5, 1, 1)), (3, 6, (6, 0, 0)), (3, 8, (2, 3, 3))],
)
def test_leave_last_tests_the_last_events_of_users_with_enough(tmp_path, last, num_events, parts):
    users = [1] * num_events + [2] * 9
    log = {"user": users, "item": list(range(len(users))), "time": list(range(len(users)))}
    info = prepare_log(tmp_path / "out", write_log(tmp_path / "log.parquet", log), leave_last=last)
    row = histories(info)[0]
    assert (row["num_train"], row["num_validation"], num_events - row["num_train"] - row["num_validation"]) == parts


def test_split_time_puts_its_own_moment_into_the_test_period(tmp_path):
    log = {"user": [1] * 6, "item": [1, 1, 1, 1, 1, 1], "time": [0, 9, 10, 19, 20, 30]}
    info = prepare_log(tmp_path / "out", write_log(tmp_path / "log.parquet", log), split_time=20, validation_time=10)
    row = histories(info)[0]
    assert (row["num_train"], row["num_validation"], row["num_events"]) == (2, 2, 6)
    assert (info.counts.train_events, info.counts.validation_events, info.counts.test_events) == (2, 2, 2)


def test_items_that_first_occur_in_the_test_period_are_unknown(tmp_path):
    log = {"user": [1, 1, 1, 2], "item": [7, 8, 9, 7], "time": [0, 1, 2, 2]}
    info = prepare_log(tmp_path / "out", write_log(tmp_path / "log.parquet", log), split_time=2)
    assert original_items(info) == {1: [7, 8, None], 2: [7]}
    assert items(info) == [{"id": 1, "item_id": 7, "count": 1}, {"id": 2, "item_id": 8, "count": 1}]
    assert info.counts.unknown_item_events == 1


def test_leave_last_keeps_the_whole_catalogue_but_counts_training_events_only(tmp_path):
    log = {"user": [1, 1, 1, 1], "item": [5, 5, 6, 7], "time": [0, 1, 2, 3]}
    info = prepare_log(tmp_path / "out", write_log(tmp_path / "log.parquet", log), leave_last=1)
    assert [(row["item_id"], row["count"]) for row in items(info)] == [(5, 2), (6, 0), (7, 0)]


def test_what_happens_after_the_split_changes_nothing_that_training_sees(tmp_path):
    before = log_with_ties(400)
    before["level"] = before["user"] * 3
    seen = []
    for variant in range(3):
        after = log_with_ties(50 * variant + 1, seed=variant + 1, num_users=60)
        after["item"] += 20 * variant
        after["time"] += 8
        after["level"] = after["place"] + variant
        log = {name: np.concatenate([before[name], after[name]]) for name in before}
        path = write_log(tmp_path / f"{variant}.parquet", log)
        options = {"split_time": 8, "min_user_events": 5, "min_item_events": 4, "user_columns": ("level",)}
        info = prepare_log(tmp_path / f"out{variant}", path, **options)
        training = [
            (row["user_id"], row["items"][: row["num_train"]], row["timestamps"][: row["num_train"]], row["level"])
            for row in histories(info)
        ]
        seen.append((items(info), training))
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("hidden", ["_temporary/0/part-1.parquet", "day=1/.part-1.parquet", "_part-1.parquet"])
def test_what_an_export_has_not_completed_is_no_part_of_a_folder(tmp_path, hidden):
    log = {"user": [1], "item": [1], "time": [0]}
    for name in ("day=1/part-0.parquet", hidden):
        (tmp_path / "_logs" / name).parent.mkdir(parents=True, exist_ok=True)
        write_log(tmp_path / "_logs" / name, log)
    info = prepare_log(tmp_path / "out", str(tmp_path / "_logs"))
    assert [source.path for source in info.sources] == [str(tmp_path / "_logs/day=1/part-0.parquet")]
    assert info.counts.events == 1


# Filters


def expected_items(log, *, min_user, min_item, split_time=None):
    """The rules of the minimums, spelt out: {user: items in true order, None for unknown ones}."""
    events = sorted(zip(*(log[name].tolist() for name in ("user", "time", "place", "item")), strict=True))
    counted = [event for event in events if split_time is None or event[1] < split_time]
    users = Counter(event[0] for event in counted)
    known = Counter(event[3] for event in counted)
    kept = [event for event in events if users[event[0]] >= min_user]
    catalogue = {e[3] for e in counted if known[e[3]] >= min_item and users[e[0]] >= min_user}
    if split_time is None:
        kept = [event for event in kept if event[3] in catalogue]
    groups = {user: list(group) for user, group in itertools.groupby(kept, key=lambda event: event[0])}
    least = min_user if split_time is None else 0
    return {
        user: [event[3] if event[3] in catalogue else None for event in group]
        for user, group in groups.items()
        if len(group) >= least
    }


@pytest.mark.parametrize("split_time", [None, 5])
@pytest.mark.parametrize(("min_user", "min_item"), [(0, 0), (4, 0), (0, 4), (4, 5)])
def test_minimums_keep_the_users_and_items_that_their_rules_say(tmp_path, min_user, min_item, split_time):
    log = log_with_ties(160, num_users=35, seed=min_user + min_item)
    path = write_log(tmp_path / "log.parquet", log)
    info = prepare_log(
        tmp_path / "out", path, min_user_events=min_user, min_item_events=min_item, split_time=split_time
    )
    expected = expected_items(log, min_user=min_user, min_item=min_item, split_time=split_time)
    assert original_items(info) == expected
    assert info.counts.users == len(expected)
    assert info.counts.events == sum(map(len, expected.values()))


def test_users_left_short_by_rare_items_go_but_the_catalogue_stays(tmp_path):
    log = {"user": [1, 1, 2, 2, 3, 3], "item": [5, 6, 5, 7, 5, 5], "time": [0, 1, 0, 1, 0, 1]}
    options = {"min_user_events": 2, "min_item_events": 2}
    info = prepare_log(tmp_path / "out", write_log(tmp_path / "log.parquet", log), **options)
    assert original_items(info) == {3: [5, 5]}
    assert [row["item_id"] for row in items(info)] == [5]


# Columns


def test_dense_ids_follow_the_order_of_the_original_ids(tmp_path):
    log = {"user": ["b", "b", "a"], "item": ["y", "B07", "x"], "time": [0, 1, 0]}
    info = prepare_log(tmp_path / "out", write_log(tmp_path / "log.parquet", log))
    assert [(row["id"], row["item_id"]) for row in items(info)] == [(1, "B07"), (2, "x"), (3, "y")]
    assert [(row["user_id"], row["items"]) for row in histories(info)] == [("a", [2]), ("b", [3, 1])]


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_actions_become_bits_in_the_declared_order(tmp_path, suffix):
    log = {
        "user": [1, 1, 1, 1],
        "item": [1, 1, 1, 1],
        "time": [0, 1, 2, 3],
        "like": [0, 1, 0, 1],
        "click": [True, False, False, True],
    }
    write = write_log if suffix == "parquet" else write_csv
    path = write(tmp_path / f"log.{suffix}", log)
    info = prepare_log(tmp_path / "out", path, actions=("click", "like"))
    assert histories(info)[0]["actions"] == [1, 2, 0, 3]
    assert info.roles.actions == ("click", "like")


def test_sixty_three_actions_fit_the_mask(tmp_path):
    names = [f"a{k}" for k in range(63)]
    log = {"user": [1, 1], "item": [1, 1], "time": [0, 1]} | {name: [False, True] for name in names}
    info = prepare_log(tmp_path / "out", write_log(tmp_path / "log.parquet", log), actions=tuple(names))
    assert histories(info)[0]["actions"] == [0, 2**63 - 1]


def test_without_actions_the_mask_is_zero(tmp_path):
    path = write_log(tmp_path / "log.parquet", {"user": [1, 1], "item": [1, 1], "time": [0, 1]})
    assert histories(prepare_log(tmp_path / "out", path))[0]["actions"] == [0, 0]


def test_declared_columns_keep_their_types_and_nulls(tmp_path):
    log = {
        "user": [1, 1],
        "item": [1, 2],
        "time": [1, 0],
        "small": pa.array([3, None], pa.int8()),
        "share": pa.array([0.5, 0.5], pa.float32()),
        "place": ["home", "work"],
    }
    options = {"columns": ("small", "place"), "user_columns": ("share",)}
    info = prepare_log(tmp_path / "out", write_log(tmp_path / "log.parquet", log), **options)
    assert {name: (column.kind, column.type) for name, column in info.columns.items()} == {
        "small": ("event", "int8"),
        "place": ("event", "string"),
        "share": ("user", "float"),
    }
    schema = pq.read_schema(info.history_paths[0])
    assert schema.field("small").type == pa.list_(pa.int8())
    assert schema.field("share").type == pa.float32()
    row = histories(info)[0]
    assert (row["small"], row["place"], row["share"]) == ([None, 3], ["work", "home"], 0.5)


def test_a_user_column_is_that_of_the_training_events_and_null_without_any(tmp_path):
    log = {
        "user": [1, 1, 1, 2, 3, 3],
        "item": [1] * 6,
        "time": [0, 1, 2, 2, 0, 1],
        "level": [10, 10, 12, 20, None, None],
    }
    path = write_log(tmp_path / "log.parquet", log)
    info = prepare_log(tmp_path / "out", path, user_columns=("level",), split_time=2)
    assert [row["level"] for row in histories(info)] == [10, None, None]


@pytest.mark.parametrize(
    ("split", "column", "values", "change"),
    [
        ({}, "level", [5, 7, 7, 7], "'level' changes from 5 to 7"),
        ({"leave_last": 1}, "city", ["a", "a", "b", "a"], "'city' changes from 'a' to 'b'"),
        ({"split_time": 3}, "level", [None, 5, 5, 5], "'level' changes from None to 5"),
        ({}, "level", [5, 5, None, 5], "'level' changes from 5 to None"),
        ({}, "share", [0.5, 0.5, float("nan"), 0.5], "'share' changes from 0.5 to nan"),
    ],
)
def test_a_user_column_that_targets_would_know_from_later_events_is_refused(tmp_path, split, column, values, change):
    log = {"user": [9] * 5 + [8], "item": [1] * 6, "time": [0, 1, 2, 3, 4, 1], column: [*values, values[3], values[3]]}
    path = write_log(tmp_path / "log.parquet", log)
    with pytest.raises(UserError, match=f"{change} among the training events of user 9, .* with --column {column}"):
        prepare_log(tmp_path / "out", path, user_columns=(column,), **split)
    assert [path.name for path in tmp_path.iterdir()] == ["log.parquet"]


def test_equal_missing_values_of_a_user_column_are_no_change(tmp_path):
    log = {"user": [1, 1, 2, 2], "item": [1] * 4, "time": [0, 1, 0, 1], "share": [float("nan")] * 2 + [0.5] * 2}
    info = prepare_log(tmp_path / "out", write_log(tmp_path / "log.parquet", log), user_columns=("share",))
    assert np.array_equal([row["share"] for row in histories(info)], [np.nan, 0.5], equal_nan=True)


ZONES = pytest.mark.parametrize("zone", [None, "UTC", "Asia/Kolkata"])


@ZONES
@pytest.mark.parametrize(
    ("unit", "ticks", "milliseconds"),
    [
        ("s", [2, -1, 1], [-1000, 1000, 2000]),
        ("ms", [2, -1, 1], [-1, 1, 2]),
        ("us", [1_001, -1, 1_000, -1_000, -1_001], [-2, -1, -1, 1, 1]),
        ("ns", [1_000_001, -1, 1_000_000, -1_000_000, -1_000_001], [-2, -1, -1, 1, 1]),
    ],
)
def test_timestamps_become_milliseconds_and_keep_their_finer_order(tmp_path, unit, zone, ticks, milliseconds):
    log = {"user": [1] * len(ticks), "item": ticks, "time": pa.array(ticks, pa.timestamp(unit, tz=zone))}
    info = prepare_log(tmp_path / "out", write_log(tmp_path / "log.parquet", log))
    assert histories(info)[0]["timestamps"] == milliseconds
    assert original_items(info) == {1: sorted(ticks)}


@ZONES
@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_timestamps_of_any_unit_may_order_ties(tmp_path, unit, zone):
    log = {"user": [1] * 3, "item": [2, 3, 1], "time": [0] * 3, "at": pa.array([2, 3, 1], pa.timestamp(unit, tz=zone))}
    info = prepare_log(tmp_path / "out", write_log(tmp_path / "log.parquet", log), order="at")
    assert original_items(info) == {1: [1, 2, 3]}


@pytest.mark.parametrize("times", [["978300760", "978300761"], ["978300760.0", "9.78300761e8"]])
def test_csv_times_may_be_whole_numbers_in_any_notation(tmp_path, times):
    path = write_csv(tmp_path / "log.csv", {"user": [1, 1], "item": [1, 2], "time": times})
    assert histories(prepare_log(tmp_path / "out", path))[0]["timestamps"] == [978300760, 978300761]


def test_csv_times_may_be_dates_and_clock_times(tmp_path):
    path = write_csv(
        tmp_path / "log.csv", {"user": [1, 1], "item": [1, 2], "time": ["1970-01-02", "1970-01-01 00:00:01"]}
    )
    assert histories(prepare_log(tmp_path / "out", path))[0]["timestamps"] == [1_000, 86_400_000]


def test_csv_ids_with_leading_zeros_stay_distinct_strings(tmp_path):
    path = write_csv(tmp_path / "log.csv", {"user": [1, 1], "item": ["07", "7"], "time": [0, 1]})
    assert original_items(prepare_log(tmp_path / "out", path)) == {1: ["07", "7"]}


def test_csv_columns_are_integers_numbers_or_strings_by_their_values(tmp_path):
    columns = {"whole": [1, -2], "share": [1, 0.5], "word": [1, "x"], "gap": ["", 3]}
    path = write_csv(tmp_path / "log.csv", {"user": [1, 1], "item": [1, 1], "time": [0, 1]} | columns)
    info = prepare_log(tmp_path / "out", path, columns=tuple(columns))
    assert [column.type for column in info.columns.values()] == ["int64", "double", "string", "int64"]
    row = histories(info)[0]
    assert [row[name] for name in columns] == [[1, -2], [1.0, 0.5], ["1", "x"], [None, 3]]


# Files


@pytest.mark.parametrize(
    ("delimiter", "end"), [(",", "\n"), (",", "\r\n"), ("\t", "\n"), (";", "\n"), ("|", "\n"), ("::", "\n")]
)
def test_csv_delimiters_and_line_ends_are_detected(tmp_path, delimiter, end):
    log = {"user": [1, 1, 2], "item": [3, 4, 5], "time": [1, 0, 0]}
    path = write_csv(tmp_path / "log.csv", log, delimiter=delimiter, end=end)
    assert original_items(prepare_log(tmp_path / "out", path)) == {1: [4, 3], 2: [5]}


def test_csv_may_be_compressed_quoted_and_marked_as_utf8(tmp_path):
    text = '\ufeffuser,item,time,note\n1,"x, ""y""",1,"two\nlines"\n1,é,0,\n'
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(text.encode()))
    info = prepare_log(tmp_path / "out", str(tmp_path / "log.csv.gz"), columns=("note",))
    assert original_items(info) == {1: ["é", 'x, "y"']}
    assert histories(info)[0]["note"] == [None, "two\nlines"]


def test_parquet_files_of_one_log_may_differ_in_column_order_and_integer_width(tmp_path):
    first = write_log(tmp_path / "a.parquet", {"user": pa.array([1], pa.int8()), "item": [1], "time": [0]})
    second = write_log(tmp_path / "b.parquet", {"time": [1], "item": [2**40], "user": [300]})
    assert original_items(prepare_log(tmp_path / "out", first, second)) == {1: [1], 300: [2**40]}


def test_the_dataset_states_what_it_holds(tmp_path):
    path = write_log(tmp_path / "log.parquet", log_with_ties(500))
    info = prepare_log(tmp_path / "out", path, leave_last=2, columns=("place",))
    assert DatasetInfo.load(tmp_path / "out") == info
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.parquet", "out"]
    rows = histories(info)
    assert info.counts.events == 500 == sum(row["num_events"] for row in rows)
    assert info.counts.train_events == sum(row["num_train"] for row in rows) == sum(row["count"] for row in items(info))
    assert info.num_items == info.counts.items == len(items(info))
    for row in rows:
        assert {len(row[name]) for name in ("items", "timestamps", "actions", "place")} == {row["num_events"]}
    for file in info.files:
        metadata = pq.read_metadata(info.locate(file.path))
        assert (file.rows, file.row_groups) == (metadata.num_rows, metadata.num_row_groups)
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        assert file.group_rows == tuple(group.num_rows for group in groups)
        assert file.bytes == info.locate(file.path).stat().st_size
    for file in (*info.files, info.vocabularies["items"]):
        assert file.sha256 == hashlib.sha256(info.locate(file.path).read_bytes()).hexdigest()


def test_the_facts_of_each_row_group_are_those_of_its_rows(tmp_path):
    rng = np.random.default_rng(0)
    log = {
        "user": rng.permutation(np.arange(9_000) % 5_000),
        "item": rng.integers(0, 9, 9_000),
        "time": np.arange(9_000),
    }
    info = prepare_log(tmp_path / "out", write_log(tmp_path / "log.parquet", log), split_time=6_000)
    [file] = info.files
    with pq.ParquetFile(info.history_paths[0]) as parquet:
        tables = [parquet.read_row_group(number) for number in range(parquet.num_row_groups)]
    assert file.group_rows == (2048, 2048, 904) == tuple(table.num_rows for table in tables)
    assert file.group_events == tuple(len(table["items"].combine_chunks().flatten()) for table in tables)
    assert file.group_train_events == tuple(sum(table["num_train"].to_pylist()) for table in tables)


def test_the_lengths_of_histories_are_summed_up(tmp_path):
    lengths = [1] * 50 + [2] * 30 + [3] * 10 + [7] * 9 + [64]
    users = np.repeat(np.arange(100), lengths)
    log = {"user": users, "item": users, "time": np.arange(len(users))}
    summary = prepare_log(tmp_path / "out", write_log(tmp_path / "log.parquet", log)).lengths
    assert summary.mean == round(sum(lengths) / 100, 3)
    assert summary.quantiles == {
        "0.01": 1, "0.1": 1, "0.25": 1, "0.5": 1, "0.75": 2, "0.9": 3, "0.99": 7, "1.0": 64,
    }  # fmt: skip
    buckets = zip(summary.bucket_from, summary.bucket_users, summary.bucket_events, strict=True)
    assert list(buckets) == [
        (0, 0, 0), (1, 50, 50), (2, 40, 90), (4, 9, 63), (8, 0, 0), (16, 0, 0), (32, 0, 0), (64, 1, 64),
    ]  # fmt: skip


def test_a_damaged_page_is_found_by_its_checksum(tmp_path):
    path = write_log(tmp_path / "log.parquet", log_with_ties(5_000))
    info = prepare_log(tmp_path / "out", path, columns=("place",))
    column = pq.read_metadata(info.history_paths[0]).row_group(0).column(1)
    content = bytearray(info.history_paths[0].read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    info.history_paths[0].write_bytes(content)
    with pytest.raises(OSError, match="could not verify page integrity, CRC checksum verification failed"):
        pq.ParquetFile(info.history_paths[0], page_checksum_verification=True).read(columns=["items"])


def log_with_actions():
    log = log_with_ties(300)
    return log | {"click": log["place"] % 2 == 0, "like": log["place"] % 3 == 0}


def test_the_same_data_prepared_twice_has_one_fingerprint(tmp_path):
    options = {"actions": ("click", "like"), "leave_last": 1}
    first, second = (
        prepare_log(tmp_path / f"out{n}", write_log(tmp_path / f"log{n}.parquet", log_with_actions()), **options)
        for n in range(2)
    )
    assert first.fingerprint == second.fingerprint == DatasetInfo.load(tmp_path / "out0").fingerprint


def permute_items(log):
    return log | {"item": 259 - log["item"]}


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (permute_items, {}),
        (dict, {"actions": ("like", "click")}),
        (dict, {"leave_last": 2}),
        (dict, {"leave_last": None, "split_time": 6}),
    ],
    ids=["item ids permuted", "actions swapped", "other leave-last", "split by time"],
)
def test_another_dataset_has_another_fingerprint(tmp_path, change, options):
    log = log_with_actions()
    common = {"actions": ("click", "like"), "leave_last": 1}
    first = prepare_log(tmp_path / "out", write_log(tmp_path / "log.parquet", log), **common)
    path = write_log(tmp_path / "changed.parquet", change(log))
    second = prepare_log(tmp_path / "changed", path, **{**common, **options})
    assert second.num_items == first.num_items or "split_time" in options
    assert second.fingerprint != first.fingerprint


def test_the_bundled_sample_has_the_published_split(tmp_path):
    options = {"user": "user_id", "item": "item_id", "time": "time_ms", "split_time": 1651330969569}
    info = prepare_log(tmp_path / "out", "sample:kuairand", actions=("is_click", "long_view"), **options)
    assert (info.counts.users, info.counts.train_events, info.counts.test_events) == (25_156, 93_926, 134_403)
    assert [source.path for source in info.sources] == ["sample:kuairand"]
