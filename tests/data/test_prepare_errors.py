"""What a user can get wrong: each mistake ends in one message (value, rule, remedy) and leaves nothing on disk."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from permissions import unreadable

from ultrarec.data.errors import UserError
from ultrarec.data.prepare import PrepareOptions, prepare

LOG = {
    "user": [1, 1, 1, 2],
    "item": [5, 6, 7, 5],
    "time": [10, 20, 30, 20],
    "click": [0, 1, 0, 1],
    "word": ["a", "b", "c", "d"],
}
ROLES = {"user": "user", "item": "item", "time": "time"}


def write_parquet(path, **changes):
    columns = {name: values for name, values in {**LOG, **changes}.items() if values is not None}
    pq.write_table(pa.table(columns), path)
    return str(path)


def write_text(path, text):
    path.write_text(text)
    return str(path)


def fails(tmp_path, message, *logs, **options):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as caught:
        prepare(PrepareOptions(logs=logs, out=tmp_path / "new" / "out", **{**ROLES, **options}))
    assert sorted(tmp_path.rglob("*")) == before
    assert "\n" not in str(caught.value)


# Options that contradict each other: refused before anything is read


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logs": ()}, "no log given; name Parquet or CSV files"),
        ({"user": ""}, "--user is empty; name a column"),
        ({"item": "user"}, "column 'user' is given as --user and as --item; .* drop one of the two"),
        ({"order": "time"}, "column 'time' is given as --time and as --order"),
        ({"actions": ("click", "click")}, "column 'click' is given as --action and as --action"),
        ({"columns": ("word",), "user_columns": ("word",)}, "'word' is given as --column and as --user-column"),
        ({"columns": ("items",)}, "--column 'items': the histories have a column of that name already; rename"),
        ({"actions": tuple(f"a{k}" for k in range(64))}, "64 actions; one 64-bit mask holds at most 63: declare fewer"),
        ({"leave_last": 1, "split_time": 9}, "--leave-last 1 and --split-time 9 exclude each other; give one"),
        ({"leave_last": 0}, "--leave-last 0: at least 1 event"),
        ({"validation_time": 5}, "--validation-time 5 needs --split-time"),
        ({"split_time": 5, "validation_time": 5}, "--validation-time 5 is not before --split-time 5"),
        ({"min_user_events": -1}, "--min-user-events -1 is negative; give 0"),
        ({"min_item_events": -2}, "--min-item-events -2 is negative; give 0"),
        ({"memory_limit": "lots"}, "--memory-limit 'lots' is not a size; write it like 512MB or 4GB"),
        ({"memory_limit": "4"}, "--memory-limit '4' is not a size"),
        ({"threads": 0}, "--threads 0: at least 1, at most 1024; leave"),
        ({"threads": 1025}, "--threads 1025: at least 1, at most 1024; leave the option out for all cores"),
        ({"csv_delimiter": ""}, "--csv-delimiter '': 1 to 4 bytes"),
        ({"csv_delimiter": "<tab>"}, "--csv-delimiter '<tab>': 1 to 4 bytes"),
    ],
)
def test_contradicting_options_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        PrepareOptions(**{"logs": ("log.csv",), "out": tmp_path / "out", **ROLES, **options})


# Files


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("missing.parquet", r"missing.parquet: no such file, and no file matches; check the path"),
        ("*.csv", r"\*.csv: no such file, and no file matches"),
        ("empty", "empty: no file in the folder ends in .parquet, .pq, .csv"),
        ("sample:netflix", "sample:netflix does not exist; there is sample:kuairand"),
        ("nothing.csv", r"nothing.csv is empty \(0 bytes\); remove it"),
        ("nothing.parquet", r"nothing.parquet is empty \(0 bytes\); remove it"),
    ],
)
def test_a_log_that_is_not_there_is_named(tmp_path, monkeypatch, log, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    if log.startswith("nothing"):
        (tmp_path / log).touch()
    fails(tmp_path, message, log)


def test_a_file_given_twice_is_refused(tmp_path):
    path = write_parquet(tmp_path / "log.parquet")
    fails(tmp_path, "log.parquet is given more than once; each file of a log is read once", path, str(tmp_path))


def test_parquet_and_csv_do_not_mix(tmp_path):
    first = write_parquet(tmp_path / "a.parquet")
    fails(
        tmp_path, "a.parquet and .*b.csv are of two formats", first, write_text(tmp_path / "b.csv", "user,item,time\n")
    )


@pytest.mark.parametrize("name", ["log.parquet", "log.csv", "log"])
def test_a_log_that_the_user_may_not_read_is_told_from_a_damaged_one(tmp_path, name):
    with TemporaryDirectory() as folder:  # which others may enter, unlike tmp_path
        path = Path(folder, name)
        write_parquet(path)
        path.parent.chmod(0o755)
        with unreadable(path), pytest.raises(UserError, match=rf"{name} cannot be read \(.*\); check its permissions"):
            prepare(PrepareOptions(logs=(str(path),), out=tmp_path / "out", **ROLES))


@pytest.mark.parametrize("content", [b"PAR1 and then something else", b"no Parquet at all"])
def test_a_file_that_is_not_parquet_is_refused(tmp_path, content):
    (tmp_path / "log.parquet").write_bytes(content)
    fails(tmp_path, "log.parquet cannot be read as Parquet .* write it again", str(tmp_path / "log.parquet"))


def test_a_truncated_parquet_file_is_refused(tmp_path):
    path = tmp_path / "log.parquet"
    write_parquet(path)
    path.write_bytes(path.read_bytes()[:-30])
    fails(tmp_path, "log.parquet cannot be read as Parquet", str(path))


def test_a_parquet_file_with_damaged_pages_is_refused(tmp_path):
    path = tmp_path / "log.parquet"
    numbers = list(range(100_000))
    pq.write_table(pa.table({"user": numbers, "item": numbers, "time": numbers}), path)
    content = bytearray(path.read_bytes())
    content[2000:3000] = b"\x55" * 1000
    path.write_bytes(content)
    fails(tmp_path, "the log cannot be read: .*log.parquet.*; mend the file or write it again", str(path))


def test_a_csv_line_with_too_few_fields_is_named(tmp_path):
    path = write_text(tmp_path / "log.csv", "user,item,time\n1,2,3\n1,2\n")
    fails(tmp_path, "log.csv: .*Line: 3; Original Line: 1,2; Expected Number of Columns: 3 Found: 2", path)


def test_a_csv_file_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(b"user,item,time\n1,\xff\xfe,3\n")
    fails(tmp_path, "log.csv: .*not utf-8 encoded", str(path))


def test_csv_files_of_one_log_have_the_same_columns(tmp_path):
    first = write_text(tmp_path / "a.csv", "user,item,time\n1,2,3\n")
    second = write_text(tmp_path / "b.csv", "item,user,time\n1,2,3\n")
    fails(tmp_path, "b.csv has the columns item, user, time, but .*a.csv has user, item, time", first, second)


def test_csv_columns_must_name_every_field(tmp_path):
    path = write_text(tmp_path / "log.csv", "1,2,3,4\n")
    names = ("user", "item", "time")
    fails(tmp_path, "first line has 4 fields .*, --csv-columns names 3; name every column", path, csv_columns=names)


def test_a_csv_file_without_delimiter_asks_for_one(tmp_path):
    path = write_text(tmp_path / "log.csv", "user item time\n1 2 3\n")
    fails(tmp_path, "no delimiter found in the first line 'user item time'; give --csv-delimiter", path)


# Columns


def test_a_missing_column_suggests_the_close_ones(tmp_path):
    path = write_parquet(tmp_path / "log.parquet")
    fails(tmp_path, "--item 'Items' is not a column of .*log.parquet; did you mean 'item'?", path, item="Items")


def test_a_missing_column_without_likeness_lists_what_there_is(tmp_path):
    path = write_parquet(tmp_path / "log.parquet")
    fails(
        tmp_path, "--action 'zzz' is not a column of .*; it has user, item, time, click, word", path, actions=("zzz",)
    )


def test_a_column_missing_in_a_later_file_names_that_file(tmp_path):
    paths = [write_parquet(tmp_path / "a.parquet"), write_parquet(tmp_path / "b.parquet", click=None)]
    fails(tmp_path, "--action 'click' is not a column of .*b.parquet", *paths, actions=("click",))


def test_a_csv_file_without_header_points_to_csv_columns(tmp_path):
    path = write_text(tmp_path / "ratings.dat", "1::1193::5::978300760\n")
    fails(tmp_path, "its first line is 1, 1193, 5, 978300760: name the columns .* --csv-columns", path)


def test_columns_that_differ_in_case_only_are_refused(tmp_path):
    path = write_parquet(tmp_path / "log.parquet", Item=[1, 2, 3, 4])
    fails(tmp_path, "the columns item, Item differ in case only; rename all but one", path)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"user": [0.5] * 4}, {}, "--user 'user' is of type DOUBLE; ids are integers of 64 bits or strings: convert"),
        ({"item": [b"x"] * 4}, {}, "--item 'item' is of type BLOB; ids are integers"),
        ({}, {"time": "word"}, "--time 'word' is of type VARCHAR; times are whole numbers of 64 bits, or timestamps"),
        ({"time": [True] * 4}, {}, "--time 'time' is of type BOOLEAN"),
        (
            {},
            {"actions": ("word",)},
            "--action 'word' is of type VARCHAR; actions are booleans, or the integers 0 and 1",
        ),
        (
            {"word": [[1]] * 4},
            {"columns": ("word",)},
            r"--column 'word' is of type BIGINT\[\]; further columns are num",
        ),
        ({"word": [[1]] * 4}, {"order": "word"}, r"--order 'word' is of type BIGINT\[\]; the order is a number"),
    ],
)
def test_a_column_of_the_wrong_type_is_refused(tmp_path, changes, options, message):
    fails(tmp_path, message, write_parquet(tmp_path / "log.parquet", **changes), **options)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {"time": [1.0, 2.5, 3.0, 4.5]},
            {},
            r"--time 'time' is '2.5' in .*b.parquet, row 2 \(2 such rows\); times are",
        ),
        (
            {"time": pa.array([1, 2**63 - 1, 2, 3], pa.timestamp("ns", tz="UTC"))},
            {},
            r"--time 'time' is 'infinity' in .*b.parquet, row 2 \(1 such row\); times are",
        ),
        ({"time": [1.0, 2.0, float("nan"), 4.0]}, {}, r"--time 'time' is 'nan' in .*b.parquet, row 3"),
        (
            {"click": [0, 1, 2, 1]},
            {"actions": ("click",)},
            r"--action 'click' is '2' in .*b.parquet, row 3 \(1 such row\)",
        ),
        (
            {"user": pa.array([1, 2, 3, 2**63], pa.uint64())},
            {},
            "--user 'user' is '9223372036854775808' in .*b.parquet, row 4",
        ),
    ],
)
def test_a_value_that_breaks_the_rule_is_shown_with_its_file_and_row(tmp_path, changes, options, message):
    types = {name: pa.array(values).type for name, values in changes.items()}
    good = {name: pa.array([0, 1, 1, 0]).cast(kind) for name, kind in types.items()}
    paths = [write_parquet(tmp_path / "a.parquet", **good), write_parquet(tmp_path / "b.parquet", **changes)]
    fails(tmp_path, message, *paths, **options)


@pytest.mark.parametrize(
    ("option", "role"),
    [("--user", "user"), ("--item", "item"), ("--time", "time"), ("--order", "order"), ("--action", "click")],
)
def test_nulls_are_counted_and_located(tmp_path, option, role):
    column = {"order": "word"}.get(role, role)
    values = [None, *LOG[column][1:3], None]
    path = write_parquet(tmp_path / "log.parquet", **{column: pa.array(values, pa.array(LOG[column]).type)})
    options = {"order": {"order": "word"}, "click": {"actions": ("click",)}}.get(role, {})
    message = f"{option} '{column}' is null in 2 of 4 rows, first in .*log.parquet, row 1; .* fill or drop those rows"
    fails(tmp_path, message, path, **options)


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ("1,2,3,0\n1,2,soon,0\n", {}, r"--time 'time' is 'soon' in .*log.csv, row 2 \(1 such row\); times are whole"),
        ("1,2,3,0\n1,2,4.5,0\n", {}, "--time 'time' is '4.5' in .*log.csv, row 2"),
        ("1,2,3,0\n1,2,4,yes\n", {"actions": ("click",)}, "--action 'click' is 'yes' in .*log.csv, row 2"),
        ("1,,3,0\n", {}, "--item 'item' is null in 1 of 1 row, first"),
    ],
)
def test_a_csv_field_that_breaks_the_rule_is_shown(tmp_path, lines, options, message):
    fails(tmp_path, message, write_text(tmp_path / "log.csv", "user,item,time,click\n" + lines), **options)


# Content


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_log_without_events_is_refused(tmp_path, suffix):
    path = tmp_path / f"log.{suffix}"
    if suffix == "csv":
        path.write_text("user,item,time\n")
    else:
        pq.write_table(pa.table(LOG).slice(0, 0), path)
    fails(tmp_path, r"the log has no events: .*log.* holds no rows; check", str(path))


def test_several_files_without_events_are_all_named(tmp_path):
    paths = [write_text(tmp_path / f"{name}.csv", "user,item,time\n") for name in "ab"]
    fails(tmp_path, r"the log has no events: .*a.csv, .*b.csv hold no rows; check", *paths)


def test_minimums_that_leave_nothing_are_refused(tmp_path):
    path = write_parquet(tmp_path / "log.parquet")
    message = "no events are left after --min-user-events 9 and --min-item-events 0; lower them"
    fails(tmp_path, message, path, min_user_events=9)
    fails(tmp_path, message, path, min_user_events=9, split_time=25)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"split_time": 10}, "--split-time 10 leaves no train events: the log's times run from 10 to 30; .* same unit"),
        ({"split_time": 31}, "--split-time 31 leaves no test events"),
        ({"split_time": 30, "validation_time": 21}, "--split-time 30 --validation-time 21 leaves no validation events"),
        (
            {"leave_last": 2},
            "--leave-last 2 leaves nothing to test: no user has the 5 events that it needs .*; lower it",
        ),
    ],
)
def test_a_split_that_leaves_a_part_empty_is_refused(tmp_path, split, message):
    fails(tmp_path, message, write_parquet(tmp_path / "log.parquet"), **split)


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_an_output_that_exists_is_left_alone(tmp_path, kind):
    path, out = write_parquet(tmp_path / "log.parquet"), tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "mine").touch()
    elif kind == "file":
        out.touch()
    else:
        out.symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="out exists already; nothing is overwritten: give a new folder, or remove"):
        prepare(PrepareOptions(logs=(path,), out=out, **ROLES))
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_below_a_file_is_refused(tmp_path):
    path = write_parquet(tmp_path / "log.parquet")
    with pytest.raises(UserError, match=r"--out .*log.parquet/out: .* cannot be made \(Not a directory\)"):
        prepare(PrepareOptions(logs=(path,), out=tmp_path / "log.parquet" / "out", **ROLES))


@pytest.mark.parametrize("name", ["n" * 250, "n" * 300, "n" * 5000, "n" * 300 + "/out"])
def test_an_output_with_too_long_a_name_is_refused(tmp_path, name):
    path = write_parquet(tmp_path / "log.parquet")
    message = r"--out .*n: .* cannot be made \(File name too long\); give another place"
    if "/" in name:
        message = message.replace("n: ", "n/out: ")
    with pytest.raises(UserError, match=message):
        prepare(PrepareOptions(logs=(path,), out=tmp_path / "new" / name, **ROLES))
    assert list(tmp_path.iterdir()) == [tmp_path / "log.parquet"]


def test_more_memory_than_can_be_counted_is_refused(tmp_path):
    path, limit = write_parquet(tmp_path / "log.parquet"), "99999999999999TB"
    fails(tmp_path, f"--memory-limit {limit}: .*too large; give less, like 4GB", path, memory_limit=limit)


def test_too_little_memory_names_the_limit(tmp_path):
    numbers = list(range(300_000))
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({"user": numbers, "item": numbers, "time": numbers}), path)
    fails(tmp_path, "--memory-limit 5MB is too little for this log .*; raise it", str(path), memory_limit="5MB")
