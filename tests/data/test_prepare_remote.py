"""Logs in an S3 store, a real server on this machine that can be made to fail, and what `prepare` makes of them."""

import gzip
import signal
import subprocess
import sys
import time

import boto3
import pytest
from interaction_logs import ROLES, log_with_ties, prepare_log, write_csv, write_log
from object_store import FAILURES, running_proxy, running_store

from ultrarec.data import patience, storage
from ultrarec.data.errors import StorageError, UserError
from ultrarec.data.preparation import sources
from ultrarec.data.prepare import PrepareOptions
from ultrarec.launch.cli import main

COLUMNS = ("--user", "user", "--item", "item", "--time", "time")


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A folder of logs, with files that are no part of one."""
    root = tmp_path_factory.mktemp("remote") / "logs"
    for folder in ("parquet/2024", "parquet/_tmp", "csv"):
        (root / folder).mkdir(parents=True)
    for seed, name in enumerate(("b.parquet", "a [1].parquet", "2024/c.parquet", "_tmp/d.parquet")):
        write_log(root / "parquet" / name, log_with_ties(500, seed=seed))
    (root / "parquet" / "_SUCCESS").touch()
    write_csv(root / "csv" / "a.csv", log_with_ties(30_000, seed=5))
    (root / "csv" / "b.csv.gz").write_bytes(gzip.compress((root / "csv" / "a.csv").read_bytes()))
    return root


@pytest.fixture(scope="module")
def server(local):
    with running_store(local, "shop") as address:
        yield address


@pytest.fixture
def proxy(server, monkeypatch):
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.01)
    with running_proxy(server) as running:
        yield running


@pytest.fixture
def remote(proxy):
    host = f"127.0.0.1:{proxy.server_address[1]}"
    return lambda path: f"s3://key:secret@logs/shop/{path}?scheme=http&endpoint_override={host}&region=us-east-1"


def conflict(handler):
    """A failure that the store's own client hands on at once."""
    handler.answer(409, {"Content-Length": "0"}, b"")


def contents(info):
    return {path.name: path.read_bytes() for path in info.history_paths}


def found(remote, path):
    options = PrepareOptions(logs=(remote(path),), out="out", **ROLES)
    return [name.removeprefix("s3://logs/shop/") for name in sources.find_log(options).names]


@pytest.mark.parametrize("kind", ["parquet/b.parquet", "parquet/2024", "csv"])
def test_a_log_in_a_store_gives_the_dataset_that_it_gives_on_a_disk(tmp_path, local, remote, kind):
    there = prepare_log(tmp_path / "there", remote(kind), columns=("place",))
    here = prepare_log(tmp_path / "here", str(local / kind), columns=("place",))
    assert contents(there) == contents(here)
    assert there.fingerprint == here.fingerprint
    assert [source.bytes for source in there.sources] == [source.bytes for source in here.sources]
    text = (tmp_path / "there" / "dataset.json").read_text()
    assert "s3://logs/shop/" in text
    assert "secret" not in text


def test_a_newer_log_in_a_store_is_appended(tmp_path, local, remote, capsys):
    prepare_log(tmp_path / "out", str(local / "parquet" / "b.parquet"))
    assert main(["prepare", remote("parquet/2024"), "--append", "--out", str(tmp_path / "out")]) == 0
    assert main(["prepare", remote("parquet/2024"), "--append", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "s3://logs/shop/parquet/2024/c.parquet is in" in said
    assert "secret" not in said


@pytest.mark.parametrize(
    ("address", "names"),
    [
        ("parquet", ["parquet/2024/c.parquet", "parquet/a [1].parquet", "parquet/b.parquet"]),
        ("parquet/", ["parquet/2024/c.parquet", "parquet/a [1].parquet", "parquet/b.parquet"]),
        ("parquet/a%20%5B1%5D.parquet", ["parquet/a [1].parquet"]),
        ("parquet/*.parquet", ["parquet/a [1].parquet", "parquet/b.parquet"]),
        ("parquet/[b-z]*.parquet", ["parquet/b.parquet"]),
        ("parquet/20*/*.parquet", ["parquet/2024/c.parquet"]),
        ("parquet/**/c*", ["parquet/2024/c.parquet"]),
        ("csv/**", ["csv/a.csv", "csv/b.csv.gz"]),
    ],
)
def test_an_address_stands_for_a_file_a_folder_or_a_pattern(remote, address, names):
    assert found(remote, address) == names


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nothing.parquet", "s3://logs/shop/nothing.parquet: no such file, and no file matches; check the address"),
        ("*.csv", r"s3://logs/shop/\*.csv: no such file, and no file matches"),
        ("parquet/_tmp/x*", r"s3://logs/shop/parquet/_tmp/x\*: no such file"),
        ("parquet/_SUCCESS", r"s3://logs/shop/parquet/_SUCCESS is empty \(0 bytes\)"),
    ],
)
def test_an_address_that_stands_for_nothing_is_named_without_the_keys(tmp_path, remote, address, message):
    with pytest.raises(UserError, match=message) as raised:
        prepare_log(tmp_path / "out", remote(address))
    assert "secret" not in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "log"),
    [
        ("an error 500", "parquet/b.parquet"),
        ("a reset connection", "csv"),
        ("an answer that breaks off", "parquet/b.parquet"),
        ("slowness", "csv"),
    ],
)
def test_what_fails_for_a_moment_is_tried_again(tmp_path, local, proxy, remote, kind, log):
    def misbehave(handler):
        """The first three requests for a range fail."""
        fails = handler.command == "GET" and "range" in handler.headers and proxy.failures < 3
        if fails and kind == "slowness":
            time.sleep(0.05)
            return False
        if fails:
            FAILURES[kind](handler)
        return fails

    proxy.misbehave = misbehave
    there = prepare_log(tmp_path / "there", remote(log))
    assert contents(there) == contents(prepare_log(tmp_path / "here", str(local / log)))
    assert proxy.failures == (0 if kind == "slowness" else 3)


@pytest.mark.parametrize(("log", "served"), [("parquet/b.parquet", 4), ("csv/a.csv", 1), ("csv/b.csv.gz", 1)])
def test_a_store_that_goes_down_ends_in_one_error_and_leaves_nothing(
    tmp_path, proxy, remote, monkeypatch, capsys, log, served
):
    monkeypatch.setattr(storage.Storage.__init__, "__kwdefaults__", {"retry_seconds": 0.3, "purpose": storage.DATASET})
    ranges = []

    def misbehave(handler):
        """Only the first requests for a range are answered: until DuckDB reads."""
        if handler.command != "GET" or "range" not in handler.headers:
            return False
        ranges.append(handler.path)
        if len(ranges) > served:
            conflict(handler)
        return len(ranges) > served

    proxy.misbehave = misbehave
    assert main(["prepare", remote(log), "--out", str(tmp_path / "out"), *COLUMNS]) == StorageError.exit_code == 75
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: s3://logs/shop/{log} cannot be read: ")
    assert error.endswith("check the storage and the network, then prepare again: nothing was written")
    assert not list(tmp_path.iterdir())


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, local, proxy, server, remote):
    """Rows are added to it when its first bytes have been asked for."""
    client = boto3.client(
        "s3", endpoint_url=server, aws_access_key_id="key", aws_secret_access_key="secret", region_name="us-east-1"
    )
    client.upload_file(str(local / "csv" / "a.csv"), "logs", "changing/a.csv")
    longer = (local / "csv" / "a.csv").read_bytes() + b"1,2,3,4\n"

    def misbehave(handler):
        if handler.command == "GET" and "range" in handler.headers:
            client.put_object(Body=longer, Bucket="logs", Key="changing/a.csv")
        return False

    proxy.misbehave = misbehave
    with pytest.raises(UserError, match=r"s3://logs/changing/a.csv changed while it was read .* then prepare again"):
        prepare_log(tmp_path / "out", remote("x").replace("shop/x", "changing/a.csv"))
    assert not list(tmp_path.iterdir())


def test_an_interruption_does_not_wait_for_the_store(tmp_path, proxy, remote):
    def misbehave(handler):
        """Served until DuckDB's own threads read; on the main one, Ctrl-C would end the waiting by itself."""
        fails = handler.command == "GET" and "range" in handler.headers and proxy.served >= 4
        proxy.served += not fails
        if fails:
            conflict(handler)
        return fails

    proxy.served, proxy.misbehave = 0, misbehave
    command = [sys.executable, "-m", "ultrarec.launch.cli", "prepare", remote("parquet/b.parquet")]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out"), *COLUMNS],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - background jobs ignore it
    )
    deadline = time.monotonic() + 60
    while proxy.failures < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    try:
        _, said = process.communicate(timeout=20)  # a store is waited for three minutes
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert said.splitlines()[-1].startswith("stopped by SIGINT: ")
    assert not list(tmp_path.iterdir())


def test_spark_leaves_stores_to_duckdb(tmp_path):
    with pytest.raises(UserError, match=r"s3://logs/a\.parquet: --engine spark reads .* --engine duckdb"):
        prepare_log(tmp_path / "out", "s3://key:secret@logs/a.parquet", engine="spark")


def test_a_dataset_is_not_prepared_into_a_store(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["prepare", "log.csv", "--out", "s3://key:secret@logs/out", *COLUMNS])
    said = capsys.readouterr().err
    assert "s3://logs/out is in an object store; prepare in a folder of this machine, then copy it there" in said
    assert "secret" not in said
