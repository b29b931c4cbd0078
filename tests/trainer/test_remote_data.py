"""A run on a dataset in an S3 store, a real server on this machine: it needs nothing local, and repeats no key."""

import os

import boto3
import pytest
from moto.server import ThreadedMotoServer
from process_group import run_ranks
from small_runs import config_of, lines, make_dataset, train_on_ranks

from ultrarec.launch.cli import main
from ultrarec.trainer.__main__ import main as trainer
from ultrarec.trainer.attempts import final_exit_code
from ultrarec.trainer.config import load_config

SECRET = "tops3cret/+key"


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    """A local dataset, and the address of its copy, keys included."""
    dataset = make_dataset(tmp_path_factory.mktemp("remote") / "dataset")
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host = "{}:{}".format(*moto.get_host_and_port())
    keys = {"aws_access_key_id": "AKIAKEY", "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=f"http://{host}", **keys)
    client.create_bucket(Bucket="logs")
    for path in dataset.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "logs", f"shop/{path.relative_to(dataset)}")
    escaped = SECRET.replace("/", "%2F").replace("+", "%2B")
    yield dataset, f"s3://AKIAKEY:{escaped}@logs/shop?scheme=http&endpoint_override={host}&region=us-east-1"
    moto.stop()


def train_saying(config, out, said):
    """`train_on_ranks`, with all that it says in a file."""
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        train_on_ranks([(config, out)])


def test_a_run_with_in_batch_negatives_is_the_same_from_a_store_and_leaves_no_key_behind(remote, tmp_path, capsys):
    dataset, address = remote
    settings = ("objective.num_in_batch=4", "trainer.epochs=1", "trainer.max_steps=3")
    local, stored = (
        config_of(dataset, "sampled_softmax", *settings, *path) for path in ((), (f"data.path={address}",))
    )
    said, out = tmp_path / "said.txt", tmp_path / "run"
    run_ranks(train_saying, stored, out, said, world_size=1)
    run_ranks(train_on_ranks, [(local, tmp_path / "local")], world_size=1)
    assert lines(out) == lines(tmp_path / "local")
    for path in [said, *(path for path in out.rglob("*") if path.is_file())]:
        content = path.read_bytes()
        assert b"AKIAKEY" not in content, path
        assert b"s3cret" not in content, path
    kept = load_config(str(out / "config.toml")).data.path
    assert kept == address.replace(address[5 : address.index("@") + 1], "").replace(":", "%3A").replace("s3%3A", "s3:")
    assert main(["data", "describe", address]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("s3://logs/shop\n")
    assert "s3cret" not in shown.out + shown.err


def test_storage_that_is_down_ends_a_run_with_one_error_that_a_restart_may_mend(tmp_path, monkeypatch, capsys):
    config_of(tmp_path / "dataset", "ranking")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_0/0/error.json"))
    (tmp_path / "attempt_0/0").mkdir(parents=True)
    address = "s3://AKIAKEY:tops3cret@logs/shop?scheme=http&endpoint_override=127.0.0.1:1&region=us-east-1"
    settings = [f"data.path={address}", "data.batch_rows=8", "data.retry_seconds=0"]
    overrides = [part for setting in settings for part in ("--set", setting)]
    assert trainer([str(tmp_path / "ranking.toml"), "--out", str(tmp_path / "run"), *overrides]) == 75
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: s3://logs/shop/dataset.json cannot be read: 1 attempt in ")
    assert "AKIAKEY" not in said
    assert "s3cret" not in said
    assert final_exit_code() is None
