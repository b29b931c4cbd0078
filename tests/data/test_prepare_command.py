"""`ultrarec prepare` as a user calls it: on the files of public data sets, with progress, and interrupted."""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from interaction_logs import ROLES, histories, log_with_ties, original_items, write_log

from ultrarec.data import prepare as prepare_command
from ultrarec.data.errors import UserError
from ultrarec.data.locks import is_locked, open_lock
from ultrarec.data.prepare import PrepareOptions, prepare
from ultrarec.data.schema import UNKNOWN_ITEM, DatasetInfo
from ultrarec.data.synthetic_log import SPLIT_TIME

DATASETS = Path(__file__).parents[2] / "docs" / "datasets.md"


# The official files of public data sets, as docs/datasets.md prepares them

KUAIRAND_ACTIONS = (
    "is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view", "is_profile_enter",
)  # fmt: skip


def run_command(*arguments):
    parser = argparse.ArgumentParser()
    prepare_command.add_arguments(parser)
    return prepare_command.run(parser.parse_args([str(argument) for argument in arguments]))


def test_movielens_1m_ratings_dat_is_read(tmp_path):
    (tmp_path / "ratings.dat").write_text("1::1193::5::978300760\n1::661::3::978302109\n2::914::3::978300760\n")
    assert run_command(
        tmp_path / "ratings.dat", "--out", tmp_path / "out", "--csv-columns", "user_id,item_id,rating,timestamp",
        "--user", "user_id", "--item", "item_id", "--time", "timestamp", "--column", "rating",
    ) == 0  # fmt: skip
    info = DatasetInfo.load(tmp_path / "out")
    assert original_items(info) == {1: [1193, 661], 2: [914]}
    assert histories(info)[0]["rating"] == [5, 3]


def test_movielens_20m_ratings_csv_is_read(tmp_path):
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,2,3.5,1112486027\n1,29,3.5,1112484676\n")
    run_command(
        tmp_path / "ratings.csv", "--out", tmp_path / "out", "--user", "userId", "--item", "movieId",
        "--time", "timestamp", "--column", "rating",
    )  # fmt: skip
    info = DatasetInfo.load(tmp_path / "out")
    assert original_items(info) == {1: [29, 2]}
    assert info.columns["rating"].type == "double"


def test_amazon_ratings_books_csv_is_read(tmp_path):
    (tmp_path / "ratings_Books.csv").write_text(
        "AH2L9G3DQHHAJ,0000000116,4.0,1019865600\nA2IIIDRK3PRRZY,B000AAA,1.0,1395619200\n"
    )
    run_command(
        tmp_path / "ratings_Books.csv", "--out", tmp_path / "out", "--csv-columns", "user_id,item_id,rating,timestamp",
        "--user", "user_id", "--item", "item_id", "--time", "timestamp",
    )  # fmt: skip
    info = DatasetInfo.load(tmp_path / "out")
    assert original_items(info) == {"A2IIIDRK3PRRZY": ["B000AAA"], "AH2L9G3DQHHAJ": ["0000000116"]}


def test_kuairand_log_standard_csv_files_are_read(tmp_path):
    header = (
        "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
        "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab\n"
    )
    early = "0,3,20220408,900,1649379606000,1,0,0,0,0,0,1,22000,11000,0,0,1,0,1\n"
    late = "0,5,20220501,1800,1651399200000,0,0,0,0,0,0,0,0,9000,0,0,0,0,4\n"
    (tmp_path / "log_standard_4_08_to_4_21_pure.csv").write_text(header + early)
    (tmp_path / "log_standard_4_22_to_5_08_pure.csv").write_text(header + late)
    actions = [argument for name in KUAIRAND_ACTIONS for argument in ("--action", name)]
    run_command(
        tmp_path / "log_standard_*.csv", "--out", tmp_path / "out", "--user", "user_id", "--item", "video_id",
        "--time", "time_ms", *actions, "--column", "play_time_ms", "--column", "duration_ms", "--column", "tab",
        "--split-time", 1651330969569,
    )  # fmt: skip
    row = histories(DatasetInfo.load(tmp_path / "out"))[0]
    assert (row["items"], row["actions"], row["tab"]) == ([1, UNKNOWN_ITEM], [1 + 64 + 128, 0], [1, 4])


NEW_DATASETS = re.findall(r"(?m)^    ultrarec prepare ([^…].+(?:\n        .+)*)", DATASETS.read_text())


@pytest.mark.parametrize("block", [block for block in NEW_DATASETS if "--append" not in block])
def test_the_commands_in_the_documentation_are_valid(block):
    parser = argparse.ArgumentParser()
    prepare_command.add_arguments(parser)
    args = parser.parse_args(shlex.split(block.replace("\\\n", " ")))
    options = prepare_command.options_of(args)
    assert options.leave_last == 1 or options.split_time in (1651330969569, SPLIT_TIME)


# The command


def test_declaring_the_arguments_loads_nothing_heavy():
    code = (
        "import argparse, sys; from ultrarec.data import prepare; prepare.add_arguments(argparse.ArgumentParser()); "
        "sys.exit(' '.join({'duckdb', 'pyarrow', 'numpy', 'torch', 'pydantic'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr.strip() == ""
    )


def test_progress_is_reported_line_by_line(tmp_path):
    path = write_log(tmp_path / "log.parquet", log_with_ties(50))
    lines = []
    prepare(PrepareOptions(logs=(path,), out=tmp_path / "out", **ROLES), report=lines.append)
    assert "50 events read" in lines
    assert lines[-1] == f"{tmp_path / 'out'}: 25 users, 50 events, 35 items"


def test_progress_counts_one_of_a_kind_in_the_singular(tmp_path):
    path = write_log(tmp_path / "log.parquet", {"user": [1], "item": [1], "time": [0]})
    lines = []
    prepare(PrepareOptions(logs=(path,), out=tmp_path / "out", **ROLES), report=lines.append)
    assert {"1 event read", "sorting 1 event of 1 user"} < set(lines)
    assert lines[-1] == f"{tmp_path / 'out'}: 1 user, 1 event, 1 item"


def test_the_command_leaves_the_handling_of_sigterm_as_it_was(tmp_path):
    path = write_log(tmp_path / "log.parquet", log_with_ties(50))
    before = signal.getsignal(signal.SIGTERM)
    run_command(path, "--out", tmp_path / "out", "--user", "user", "--item", "item", "--time", "time")
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_a_killed_process_left_goes_and_what_a_running_one_makes_stays(tmp_path):
    path = write_log(tmp_path / "log.parquet", log_with_ties(50))
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    left = [tmp_path / f"out.tmp-{killed.pid}", tmp_path / f"out.tmp-{os.getpid()}"]  # containers use a number again
    kept = [tmp_path / f"out.tmp-{os.getppid()}", tmp_path / f"other.tmp-{killed.pid}", tmp_path / "out.tmp-mine"]
    for folder in (*left, *kept):
        (folder / "work").mkdir(parents=True)
        (folder / ".lock").touch()
    locked = tmp_path / f"out.tmp-0{killed.pid}"
    locked.mkdir()
    held = open_lock(locked)
    assert is_locked(held)
    prepare(PrepareOptions(logs=(path,), out=tmp_path / "out", **ROLES))
    os.close(held)
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "log.parquet", tmp_path / "out", locked, *kept])


def test_a_folder_that_somebody_makes_meanwhile_is_not_overwritten(tmp_path):
    path = write_log(tmp_path / "log.parquet", log_with_ties(50))

    def make_it(line):
        if line.startswith("sorting"):
            prepare(PrepareOptions(logs=(path,), out=tmp_path / "made", **ROLES))
            (tmp_path / "made").rename(tmp_path / "out")

    with pytest.raises(UserError, match=r"--out .*out exists already; nothing is overwritten"):
        prepare(PrepareOptions(logs=(path,), out=tmp_path / "out", **ROLES), report=make_it)
    assert DatasetInfo.load(tmp_path / "out").counts.events == 50
    assert sorted(each.name for each in tmp_path.iterdir()) == ["log.parquet", "out"]


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", ["reading", "sorting"])
def test_an_interruption_leaves_nothing_behind(tmp_path, stage, signal_number):
    path = write_log(tmp_path / "log.parquet", log_with_ties(2_000_000, num_users=50_000), row_group_size=100_000)
    out = tmp_path / "out"
    code = (
        "import argparse; from ultrarec.data import prepare; parser = argparse.ArgumentParser(); "
        "prepare.add_arguments(parser); raise SystemExit(prepare.run(parser.parse_args()))"
    )
    arguments = [path, "--out", str(out), "--user", "user", "--item", "item", "--time", "time"]
    # A shell starts background jobs with Ctrl-C ignored, and children inherit that: a user's terminal does not.
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads here
    )
    assert any(line.strip().startswith(stage) for line in process.stderr)
    time.sleep(0.05)  # to the middle of the stage, which takes ten times as long
    assert list(tmp_path.glob("out.tmp-*/work/stage.duckdb"))
    process.send_signal(signal_number)
    _, messages = process.communicate(timeout=30)
    name = signal.Signals(signal_number).name
    left = f"stopped by {name}: {out} was not made, and nothing is left half-written"
    assert messages.splitlines()[-1] == left, messages
    assert process.returncode == 128 + signal_number
    assert [p.name for p in tmp_path.iterdir()] == ["log.parquet"]
