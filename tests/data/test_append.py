"""Newer logs join a dataset: what comes of it is what preparing all logs together would have made."""

import argparse
import dataclasses
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ultrarec.data import prepare as prepare_command
from ultrarec.data.append import append
from ultrarec.data.errors import UserError
from ultrarec.data.preparation import writing
from ultrarec.data.prepare import PrepareOptions, prepare
from ultrarec.data.schema import UNKNOWN_ITEM, DatasetInfo

ROLES = {"user": "user", "item": "item", "time": "time"}
COLUMNS = {"actions": ("click",), "columns": ("word",)}


def random_log(num_rows, *, seed, users, items, times):
    rng = np.random.default_rng(seed)
    of_rows = rng.integers(*users, num_rows)
    return {
        "user": of_rows,
        "item": [f"item {k}" for k in rng.integers(*items, num_rows).tolist()],
        "time": rng.integers(*times, num_rows),
        "click": rng.random(num_rows) < 0.5,
        "word": pa.array(rng.choice(["a", "b"], num_rows), mask=rng.random(num_rows) < 0.2),
        "level": pa.array(of_rows * 7, mask=of_rows % 5 == 0),
    }


def write_log(path, columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


def prepare_log(out, *logs, **options):
    return prepare(PrepareOptions(logs=logs, out=out, memory_limit="1GB", **{**ROLES, **COLUMNS, **options}))


def content(info):
    """All that a dataset says, with the log's ids of items, by user."""
    rows = [row for path in info.history_paths for row in pq.read_table(path).to_pylist()]
    items = pq.read_table(info.locate(info.vocabularies["items"].path)).to_pylist()
    assert [row["id"] for row in items] == list(range(1, info.num_items + 1))
    names = {UNKNOWN_ITEM: None} | {row["id"]: row["item_id"] for row in items}
    users = {row["user_id"]: row | {"items": [names[item] for item in row["items"]]} for row in rows}
    assert len(users) == len(rows)
    return users, {row["item_id"]: row["count"] for row in items}


def assert_whole(info):
    """Every stated fact holds, and nothing else lies in the folder."""
    assert DatasetInfo.load(info.root) == info
    named = [file.path for file in info.files] + [info.vocabularies["items"].path, "dataset.json", ".lock"]
    assert sorted(str(p.relative_to(info.root)) for p in info.root.rglob("*") if p.is_file()) == sorted(named)
    for file in (*info.files, info.vocabularies["items"]):
        assert file.sha256 == hashlib.sha256(info.locate(file.path).read_bytes()).hexdigest()
    for file in info.files:
        with pq.ParquetFile(info.locate(file.path)) as parquet:
            groups = [parquet.read_row_group(number) for number in range(parquet.num_row_groups)]
        assert file.group_rows == tuple(group.num_rows for group in groups)
        assert file.group_events == tuple(sum(group["num_events"].to_pylist()) for group in groups)
        assert file.group_train_events == tuple(sum(group["num_train"].to_pylist()) for group in groups)
        assert (file.rows, file.row_groups) == (sum(file.group_rows), len(groups))


def assert_as_if_prepared_together(grown, whole):
    assert_whole(grown)
    assert content(grown) == content(whole)
    assert (grown.counts, grown.lengths, grown.split) == (whole.counts, whole.lengths, whole.split)
    assert (grown.roles, grown.columns, grown.sources) == (whole.roles, whole.columns, whole.sources)


@pytest.fixture
def small_files(monkeypatch):
    """Several files of a few users each."""
    monkeypatch.setattr(writing, "USERS_PER_ROW_GROUP", 16)
    monkeypatch.setattr(writing, "ROW_GROUPS_PER_FILE", 2)


SPLITS = {
    "none": {"user_columns": ("level",)},
    "leave last": {"leave_last": 2},
    "split time": {"split_time": 90, "user_columns": ("level",)},
    "validation time": {"split_time": 90, "validation_time": 70, "user_columns": ("level",)},
}


@pytest.mark.parametrize("split", SPLITS)
def test_appending_twice_equals_preparing_all_logs_together(tmp_path, small_files, split):
    """Late events, new users and items, ties between old and new events, users who have test events only."""
    times = [(0, 100), (40, 120), (90, 130)] if "time" in split else [(0, 50), (40, 60), (50, 60)]
    users, items = [(0, 90), (60, 130), (0, 150)], [(0, 40), (20, 60), (50, 80)]
    logs = [
        write_log(tmp_path / f"{part}.parquet", random_log(400, seed=part, users=u, items=i, times=t))
        for part, (u, i, t) in enumerate(zip(users, items, times, strict=True))
    ]
    whole = prepare_log(tmp_path / "whole", *logs, **SPLITS[split])
    info = prepare_log(tmp_path / "out", logs[0], **SPLITS[split])
    before = pq.read_table(info.root / "items.parquet")["item_id"].to_pylist()
    for log in logs[1:]:
        info = append(tmp_path / "out", (log,), memory_limit="1GB")
    assert_as_if_prepared_together(info, whole)
    now = pq.read_table(info.locate(info.vocabularies["items"].path))["item_id"].to_pylist()
    assert now[: len(before)] == before
    assert len(now) > len(before)
    assert (info.counts.unknown_item_events > 0) == ("time" in split)


@pytest.mark.parametrize(
    ("time", "level", "change"),
    [
        (60, [3, 4], "from 3 to 4"),
        (60, [4, 4], "from 8 to 4"),
        (-1, [4, 4], "from 4 to 8"),
        (60, [None] * 2, "from 8 to None"),
    ],
)
def test_a_user_column_does_not_change_by_newer_training_events(tmp_path, time, level, change):
    old = {"user": [1, 1, 2], "item": [1, 1, 1], "time": [0, 1, 1], "level": [8, 8, 9]}
    new = {
        "user": [5, 5] if level == [3, 4] else [1, 1],
        "item": [1, 1],
        "time": [time, time],
        "level": pa.array(level, pa.int64()),
    }
    prepare(
        PrepareOptions(
            logs=(write_log(tmp_path / "old.parquet", old),), out=tmp_path / "out", user_columns=("level",), **ROLES
        )
    )
    refuses(
        tmp_path / "out",
        f"'level' changes {change} among the training events",
        write_log(tmp_path / "new.parquet", new),
    )


def test_newer_events_of_the_test_period_may_have_another_value_in_a_user_column(tmp_path):
    old = {"user": [1, 1, 3], "item": [1, 1, 1], "time": [0, 100, 100], "level": [8, 6, 6]}
    new = {"user": [1, 2, 3], "item": [1, 1, 1], "time": [100, 100, 0], "level": [7, 9, 5]}
    logs = [write_log(tmp_path / f"{k}.parquet", log) for k, log in enumerate((old, new))]
    prepare(PrepareOptions(logs=logs[:1], out=tmp_path / "out", split_time=90, user_columns=("level",), **ROLES))
    users, _ = content(append(tmp_path / "out", (logs[1],)))
    assert {user: row["level"] for user, row in users.items()} == {1: 8, 2: None, 3: 5}


def two_logs(tmp_path, **changes):
    """Two old files of 32 users each, and a new log for one user of the second and one new user."""
    old = random_log(600, seed=0, users=(0, 64), items=(0, 40), times=(0, 50))
    new = random_log(6, seed=1, users=(0, 1), items=(0, 40), times=(60, 70))
    new["user"] = np.array([40, 40, 99, 99, 99, 40])
    return write_log(tmp_path / "old.parquet", old), write_log(tmp_path / "new.parquet", new | changes)


def test_files_without_new_events_stay_as_they_are(tmp_path, small_files):
    old, new = two_logs(tmp_path)
    before = prepare_log(tmp_path / "out", old)
    assert len(before.files) == 2
    status = before.history_paths[0].stat()
    after = append(tmp_path / "out", (new,))
    assert after.files[0] == before.files[0]
    assert (status.st_ino, status.st_mtime_ns) == (
        after.history_paths[0].stat().st_ino,
        after.history_paths[0].stat().st_mtime_ns,
    )
    assert [file.path for file in after.files[1:]] == ["histories/part-00002.parquet", "histories/part-00003.parquet"]
    assert pq.read_table(after.history_paths[2])["user_id"].to_pylist() == [99]
    assert after.fingerprint != before.fingerprint


def files_of(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != ".lock"}


def refuses(out, message, *logs, **options):
    before = files_of(out)
    with pytest.raises(UserError, match=message):
        append(out, logs, **options)
    assert files_of(out) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"min_user_events": 2, "min_item_events": 3},
            "prepared with --min-user-events 2 and --min-item-events 3; .* not kept: prepare all logs together",
        ),
        (
            {"leave_last": 1, "user_columns": ("level",)},
            "--leave-last 1 and the user column 'level': its value at events that become training events is not kept",
        ),
    ],
)
def test_what_the_histories_do_not_hold_is_not_guessed(tmp_path, options, message):
    old, new = two_logs(tmp_path)
    prepare_log(tmp_path / "out", old, **options)
    refuses(tmp_path / "out", message, new)


def test_ties_that_an_order_column_decides_are_refused_between_old_and_new_events(tmp_path):
    old, new = (
        write_log(tmp_path / f"{start}.parquet", {"user": [1, 2], "item": [1, 1], "time": [start, 5], "step": [2, 1]})
        for start in (3, 4)
    )
    prepare(PrepareOptions(logs=(old,), out=tmp_path / "out", order="step", **ROLES))
    refuses(tmp_path / "out", "user 2 has events at the time 5 both in the dataset and in the new log; .* is not", new)


def test_a_new_training_item_is_refused_where_unknown_items_might_be_it(tmp_path):
    log = {"user": [1, 1], "item": [7, 8], "time": [1, 9]}
    prepare(PrepareOptions(logs=(write_log(tmp_path / "a.parquet", log),), out=tmp_path / "out", split_time=5, **ROLES))
    new = write_log(tmp_path / "b.parquet", {"user": [2], "item": [8], "time": [2]})
    refuses(
        tmp_path / "out", "the new log has the item 8 in the training period, and .* has 1 test event of unknown", new
    )


def test_the_new_log_has_the_types_of_the_old(tmp_path):
    old, new = two_logs(tmp_path, item=np.arange(6))
    prepare_log(tmp_path / "out", old)
    refuses(tmp_path / "out", "--item 'item' is int64 in the new log and string in .*out; convert", new)
    _, new = two_logs(tmp_path, word=np.arange(6))
    refuses(tmp_path / "out", "--column 'word' is int64 in the new log and string in .*out; convert", new)


def test_a_log_is_not_appended_twice(tmp_path):
    old, new = two_logs(tmp_path)
    prepare_log(tmp_path / "out", old)
    refuses(tmp_path / "out", "old.parquet is in .*out already; append newer logs only", new, old)


def test_a_log_is_not_appended_twice_under_another_name(tmp_path, monkeypatch):
    old, _ = two_logs(tmp_path)
    monkeypatch.chdir(tmp_path)
    prepare_log(tmp_path / "out", "old.parquet")
    (tmp_path / "link.parquet").symlink_to(old)
    shutil.copy(old, tmp_path / "copy.parquet")
    for name in (old, "link.parquet", "copy.parquet"):
        refuses(tmp_path / "out", f"{name} is in .*out already, as old.parquet; append newer logs only", name)


def test_a_new_log_of_the_same_name_and_size_is_appended(tmp_path):
    log = {"user": ["a"], "item": [1], "time": [5]}
    path = Path(write_log(tmp_path / "log.parquet", log))
    info, size = prepare(PrepareOptions(logs=(str(path),), out=tmp_path / "out", **ROLES)), path.stat().st_size
    write_log(path, log | {"user": ["b"]})
    assert path.stat().st_size == size
    assert append(info.root, (str(path),)).counts.users == 2


def test_a_log_is_not_appended_twice_to_a_dataset_without_checksums_of_its_sources(tmp_path, monkeypatch):
    old, new = two_logs(tmp_path)
    monkeypatch.chdir(tmp_path)
    info = prepare_log(tmp_path / "out", "old.parquet")
    dataclasses.replace(info, sources=tuple(dataclasses.replace(each, sha256="") for each in info.sources)).write()
    for name in (old, "old.parquet"):
        refuses(tmp_path / "out", "old.parquet is in .*out already", name)
    assert append(tmp_path / "out", (new,)).counts.events == 606


@pytest.mark.parametrize(("size", "found"), [(None, "is missing"), (100, "has 100 bytes, but dataset.json says")])
def test_a_damaged_history_file_is_named_and_nothing_is_appended(tmp_path, size, found):
    old, new = two_logs(tmp_path)
    info = prepare_log(tmp_path / "out", old)
    if size is None:
        info.history_paths[0].unlink()
    else:
        os.truncate(info.history_paths[0], size)
    refuses(tmp_path / "out", f"part-00000.parquet {found}", new)


def flip_a_bit(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def values_begin(path, name):
    """Where the values of a column of the first row group stand, behind their page's header."""
    chunks = pq.read_metadata(path).row_group(0)
    chunk = next(chunks.column(k) for k in range(chunks.num_columns) if chunks.column(k).path_in_schema == name)
    return (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 8


@pytest.mark.parametrize("column", ["user_id", "item_id", "count", "footer of the histories", "footer of the items"])
def test_no_flipped_bit_of_the_old_files_reaches_the_new_ones(tmp_path, column):
    old, new = two_logs(tmp_path)
    info = prepare_log(tmp_path / "out", old)
    path = info.history_paths[0] if column in ("user_id", "footer of the histories") else info.root / "items.parquet"
    flip_a_bit(path, -20 if column.startswith("footer") else values_begin(path, column))
    refuses(tmp_path / "out", f"{path} is damaged: its SHA-256 is not the one in dataset.json; restore it", new)


@pytest.mark.parametrize(("size", "found"), [(None, "is missing"), (100, "is damaged")])
def test_damaged_items_are_named_and_nothing_is_appended(tmp_path, size, found):
    old, new = two_logs(tmp_path)
    path = prepare_log(tmp_path / "out", old).root / "items.parquet"
    if size is None:
        path.unlink()
    else:
        os.truncate(path, size)
    refuses(tmp_path / "out", f"items.parquet {found}", new)


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path):
    old, new = two_logs(tmp_path)
    path = prepare_log(tmp_path / "out", old).root / "items.parquet"
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"items.parquet cannot be read \(Is a directory\); restore it"):
        append(tmp_path / "out", (new,))


def test_one_process_appends_at_a_time(tmp_path):
    old, new = two_logs(tmp_path)
    prepare_log(tmp_path / "out", old)
    descriptor = os.open(tmp_path / "out" / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    refuses(tmp_path / "out", "another process is appending to .*out now; wait for it", new)
    os.close(descriptor)
    assert append(tmp_path / "out", (new,)).counts.users == 65


def test_a_dataset_of_version_1_does_not_grow(tmp_path):
    old, new = two_logs(tmp_path)
    info = prepare_log(tmp_path / "out", old)
    dataclasses.replace(info, minimums=None, lengths=None, schema_version=1).write()
    refuses(tmp_path / "out", "was prepared by an older version, which kept too little; prepare all", new)


def test_what_a_killed_append_left_is_removed(tmp_path):
    old, new = two_logs(tmp_path)
    info = prepare_log(tmp_path / "out", old)
    (info.root / "append.tmp-1" / "histories").mkdir(parents=True)
    (info.root / "append.tmp-1" / "work").touch()
    (info.root / "items-1.parquet").write_bytes(b"half")
    (info.root / "histories/part-00001.parquet").write_bytes(b"half")
    assert_whole(append(info.root, (new,)))


@pytest.mark.parametrize("name", ["items_titles.parquet", "items-2020-01.parquet", "histories/part-of-mine.parquet"])
def test_files_that_the_user_put_beside_a_dataset_stay(tmp_path, name):
    old, new = two_logs(tmp_path)
    info = prepare_log(tmp_path / "out", old)
    (info.folder / name).write_bytes(b"mine")
    append(info.root, (new,))
    assert (info.folder / name).read_bytes() == b"mine"


MOMENTS = [
    ("os.mkdir", 1), ("os.rename", 0), ("os.rename", 1), ("os.rename", 2), ("os.rename", 3),
    ("os.remove", 0), ("os.remove", 2), ("shutil.rmtree", 0),
]  # fmt: skip
"""The kind of a step, and how many such come before: its folder is made; two history files and the items are moved, and
`dataset.json` is replaced; three files that it no longer names are removed, and the folder."""

STRUCK = """
import argparse, os, sys
from ultrarec.data import append, prepare
from ultrarec.data.preparation import growth

def strike(event, number, how):
    seen = 0
    def hook(name, arguments):
        nonlocal seen
        if name == event:
            seen += 1
            if seen == number + 1:
                os.kill(os.getpid(), how)
    sys.addaudithook(hook)

def run(out, log, event, number, how):
    os.dup2(os.open(out + ".said", os.O_CREAT | os.O_WRONLY), 2)
    strike(event, number, how)
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    os._exit(prepare.run(parser.parse_args([log, "--append", "--out", out])))

log, *cases = sys.argv[1:]
for case in cases:
    out, event, number, how = case.split(",")
    child = os.fork()
    if not child:
        run(out, log, event, int(number), int(how))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
"""Appends to several datasets, and sends itself a signal before a certain step of its own of each."""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_an_append_that_is_struck_at_any_step_leaves_the_old_dataset_or_the_new(tmp_path, small_files, how):
    old, new = (
        write_log(
            tmp_path / f"{part}.parquet",
            random_log(600, seed=part, users=(0, 64), items=(0, 40), times=(40 * part, 40 * part + 50)),
        )
        for part in range(2)
    )
    before, whole = prepare_log(tmp_path / "out", old), prepare_log(tmp_path / "whole", old, new)
    cases = []
    for place, (event, number) in enumerate(MOMENTS):
        shutil.copytree(before.root, tmp_path / f"out-{place}")
        cases.append(f"{tmp_path}/out-{place},{event},{number},{int(how)}")
    struck = subprocess.run(
        [sys.executable, "-c", STRUCK, new, *cases], capture_output=True, text=True, check=True, timeout=60
    )
    codes = [int(line) for line in struck.stdout.split()]
    assert codes == [-how if how == signal.SIGKILL else 128 + how] * len(MOMENTS), struck.stderr
    are_new = []
    for place in range(len(MOMENTS)):
        root = tmp_path / f"out-{place}"
        info = DatasetInfo.load(root)
        are_new.append(info.fingerprint != before.fingerprint)
        assert content(info) == content(whole if are_new[-1] else before)
        if how == signal.SIGTERM:
            said = Path(f"{root}.said").read_text().splitlines()[-1]
            left = "complete, with" if are_new[-1] else "as it was, without"
            assert said == f"stopped by SIGTERM: {root} is {left} the new logs"
            assert_whole(info)
        if not are_new[-1]:
            assert_as_if_prepared_together(append(root, (new,)), whole)
    assert are_new == sorted(are_new)
    assert are_new.count(True) == 3


def run_command(*arguments):
    parser = argparse.ArgumentParser()
    prepare_command.add_arguments(parser)
    return prepare_command.run(parser.parse_args([str(argument) for argument in arguments]))


def test_the_command_appends_with_the_columns_of_the_dataset(tmp_path, capsys):
    old, new = two_logs(tmp_path)
    prepare_log(tmp_path / "out", old)
    assert run_command(new, "--append", "--out", tmp_path / "out") == 0
    said = capsys.readouterr().err.splitlines()
    assert "1 user with new events, 1 new user" in said
    assert said[-1].startswith("runs that began with the dataset as it was before cannot continue")
    assert DatasetInfo.load(tmp_path / "out").counts.events == 606


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--user", "user"), "--user user with --append: .*out has decided that; leave it out"),
        (("--leave-last", "1"), "--leave-last 1 with --append: .*out has decided that"),
    ],
)
def test_the_command_takes_nothing_that_the_dataset_has_decided(tmp_path, options, message):
    old, new = two_logs(tmp_path)
    prepare_log(tmp_path / "out", old)
    with pytest.raises(UserError, match=message):
        run_command(new, "--append", "--out", tmp_path / "out", *options)


def test_only_a_dataset_can_be_appended_to(tmp_path):
    _, new = two_logs(tmp_path)
    with pytest.raises(UserError, match="nowhere does not exist; make it with"):
        append(tmp_path / "nowhere", (new,))
    with pytest.raises(UserError, match="is not a prepared dataset"):
        append(tmp_path, (new,))


def test_a_new_dataset_needs_its_columns_named(tmp_path):
    _, new = two_logs(tmp_path)
    with pytest.raises(UserError, match="--user is missing: name the column of the log that has it"):
        run_command(new, "--out", tmp_path / "out")
