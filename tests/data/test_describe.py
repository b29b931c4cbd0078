"""`ultrarec data describe` says what the dataset holds."""

import dataclasses
import shutil
from importlib.util import find_spec

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ultrarec.data.prepare import PrepareOptions, prepare
from ultrarec.launch.cli import main


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """100 users with 1 to 64 events, and an item that has half of them."""
    folder = tmp_path_factory.mktemp("describe")
    lengths = [1] * 50 + [2] * 30 + [3] * 10 + [7] * 9 + [64]
    users = np.repeat(np.arange(100), lengths)
    number = np.arange(len(users))
    log = {"user": users, "item": np.where(number % 2, 0, number), "time": number, "word": ["x"] * len(users)}
    pq.write_table(pa.table(log), folder / "log.parquet")
    roles = {"user": "user", "item": "item", "time": "time"}
    options = {"columns": ("word",), "split_time": len(users) - 10}
    return prepare(PrepareOptions(logs=(str(folder / "log.parquet"),), out=folder / "out", **roles, **options))


@pytest.fixture
def info(prepared, tmp_path):
    """A copy that a test may break."""
    shutil.copytree(prepared.root, tmp_path / "out")
    return dataclasses.replace(prepared, root=tmp_path / "out")


def test_it_shows_counts_split_columns_skew_and_lengths(info, capsys):
    assert main(["data", "describe", str(info.root)]) == 0
    shown = capsys.readouterr().out
    for line in (
        f"fingerprint {info.fingerprint}",
        f"100 users, 267 events, {info.num_items} items",
        "tested from time 257",
        "train                  257 events   96.3%",
        "test                    10 events    3.7%",
        "5 events    1.9%  items not in training",
        "word (string, per event)",
        f"items: {info.num_items:,} ids",
        "50.2% on the top 0.1%",
        "1 row group of up to 267 events",
        "mean 2.7 events",
        "50% 1, 75% 2, 90% 3, 99% 7, 100% 64",
        f"                4–7              9      9.0%      23.6%  {'#' * 8}",
        "                 64              1      1.0%      24.0%  #",
    ):
        assert line in shown, line


@pytest.mark.skipif(
    find_spec("matplotlib") is None, reason="the picture needs matplotlib: pip install 'ultrarec[bench]'"
)
def test_it_draws_the_lengths(info, tmp_path, capsys):
    picture = tmp_path / "lengths.png"
    assert main(["data", "describe", str(info.root), "--picture", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.endswith(f"picture: {picture}\n")


def test_the_picture_names_the_extra_that_it_needs(info, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ultrarec.data.data_command.find_spec", lambda name: None)
    assert main(["data", "describe", str(info.root), "--picture", str(tmp_path / "a.png")]) == 2
    assert "needs matplotlib; install it with: pip install 'ultrarec[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("picture", "message"), [("a.jpeg", "the name must end in .png"), ("no/a.png", "no; make it first")]
)
def test_a_picture_that_cannot_be_written_is_refused_at_once(info, tmp_path, capsys, picture, message):
    assert main(["data", "describe", str(info.root), "--picture", str(tmp_path / picture)]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""


def test_a_picture_that_turns_out_not_to_be_writable_is_named(info, tmp_path, capsys):
    (tmp_path / "a.png").mkdir()
    assert main(["data", "describe", str(info.root), "--picture", str(tmp_path / "a.png")]) == 2
    assert "a.png cannot be written (Is a directory); see who may write there" in capsys.readouterr().err


def test_a_dataset_of_version_1_is_described_without_its_lengths(info, tmp_path, capsys):
    dataclasses.replace(info, lengths=None, minimums=None, schema_version=1).write()
    assert main(["data", "describe", str(info.root)]) == 0
    assert "lengths      not stated: prepared by an older version" in capsys.readouterr().out
    assert main(["data", "describe", str(info.root), "--picture", str(tmp_path / "a.png")]) == 2
    assert "was prepared before datasets held their lengths; prepare it again" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "problem"), [(None, "is missing"), (100, "has 100 bytes, but dataset.json says ")])
def test_history_files_that_are_missing_or_cut_off_are_told_in_a_line(info, size, problem, capsys):
    assert main(["data", "describe", str(info.root)]) == 0
    assert "DAMAGED" not in capsys.readouterr().out
    path = info.history_paths[0]
    if size is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:size])
    assert main(["data", "describe", str(info.root)]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "DAMAGED" in line]
    assert f"histories/part-00000.parquet {problem}" in line
    assert line.endswith("; restore what is damaged, or prepare the dataset again")


def test_a_dataset_that_lost_all_its_history_files_is_still_described(info, capsys):
    shutil.rmtree(info.root / "histories")
    assert main(["data", "describe", str(info.root)]) == 0
    assert "DAMAGED      histories/part-00000.parquet is missing; restore" in capsys.readouterr().out


def test_a_missing_vocabulary_is_named(info, capsys):
    info.locate("items.parquet").unlink()
    assert main(["data", "describe", str(info.root)]) == 2
    assert "items.parquet is damaged (there is no such file); restore it" in capsys.readouterr().err
