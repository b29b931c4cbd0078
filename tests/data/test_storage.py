"""Datasets in an S3 store, a real server on this machine that can be made to fail, and what the loader makes of it."""

import threading
import time

import boto3
import pytest
from moto.server import ThreadedMotoServer
from object_store import FAILURES, fill, free_port, refuse, running_proxy, running_store
from random_datasets import random_histories, write_dataset

from ultrarec.data import patience
from ultrarec.data.config import DataConfig
from ultrarec.data.errors import StorageError, UserError
from ultrarec.data.loader import Loader, RankingSampler
from ultrarec.data.storage import Storage, load_dataset
from ultrarec.launch.cli import main

HISTORY = "part-00001.parquet"


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    root = tmp_path_factory.mktemp("storage") / "dataset"
    histories = random_histories(num_users=16, num_items=20, mean_events=5, seed=3)
    return write_dataset(root, histories, num_items=20, num_files=2, rows_per_group=4).root


@pytest.fixture(scope="module")
def server(local):
    with running_store(local, "prepared") as address:
        yield address


def stop(moto):
    """End a server, and free its port, which it would keep."""
    moto.stop()
    moto._server.server_close()


@pytest.fixture
def own_server(local, monkeypatch):
    """A server that a test may stop, and the dataset's address in it."""
    monkeypatch.setattr(patience, "SILENT_SECONDS", 0.5)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=free_port(), verbose=False)
    host = fill(moto, local, "prepared").removeprefix("http://")
    yield moto, f"s3://key:secret@logs/prepared?scheme=http&endpoint_override={host}&region=us-east-1"
    moto.stop()


@pytest.fixture
def proxy(server, monkeypatch):
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.01)
    with running_proxy(server) as running:
        yield running


@pytest.fixture
def uri(proxy):
    port = proxy.server_address[1]
    return f"s3://key:secret@logs/prepared?scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1"


def loader(path, **options):
    config = DataConfig(path=str(path), batch_rows=20, **{"shuffle_row_groups": 4, **options})
    return Loader(config, RankingSampler(6, 2), split="train", rank=0, world_size=1, epochs=1)


def samples(batches):
    return [batch.samples.tolist() for batch in batches]


def test_a_dataset_in_an_object_store_gives_the_same_batches_as_on_a_disk(local, uri):
    assert samples(loader(uri)) == samples(loader(local))
    assert load_dataset(uri).fingerprint == load_dataset(str(local)).fingerprint


@pytest.mark.parametrize("kind", FAILURES)
def test_what_fails_for_a_moment_is_tried_again_and_nothing_is_missing(local, proxy, uri, kind):
    def misbehave(handler):
        """The first four requests for a range of a history file fail."""
        fails = handler.command == "GET" and "part-" in handler.path and proxy.failures < 4
        if fails:
            FAILURES[kind](handler)
        return fails

    proxy.misbehave = misbehave
    assert samples(loader(uri)) == samples(loader(local))
    assert proxy.failures == 4


def test_a_slow_store_delays_and_changes_nothing(local, proxy, uri):
    proxy.misbehave = lambda handler: time.sleep(0.05) or False
    assert samples(loader(uri)) == samples(loader(local))


@pytest.mark.parametrize("bad_data", ["error", "skip"])
def test_a_store_that_stays_down_is_one_error_with_the_place_and_never_a_gap(proxy, uri, bad_data):
    down = loader(uri, bad_data=bad_data, retry_seconds=0.3)

    def misbehave(handler):
        fails = HISTORY in handler.path
        if fails:
            refuse(handler)
        return fails

    proxy.misbehave = misbehave
    with pytest.raises(
        StorageError, match=rf"s3://logs/prepared/histories/{HISTORY}, row group \d.* attempts? in .* seconds failed"
    ):
        list(down)
    assert proxy.failures >= 1


def test_a_store_that_is_stopped_and_started_again_delays_and_changes_nothing(local, own_server, capfd):
    """A real server, gone for longer than the store's own client tries, and back on the same port."""
    server, path = own_server
    opened = loader(path, retry_seconds=60)
    stop(server)
    back = threading.Timer(8, server.start)
    back.start()
    read = samples(opened)
    back.join()
    assert read == samples(loader(local))
    said = capfd.readouterr().err.splitlines()
    assert any("does not answer" in line and "trying again for up to" in line for line in said), said
    assert any("answers again, after" in line for line in said), said


def test_whoever_waits_for_storage_is_woken_when_it_is_closed(tmp_path):
    waiting = Storage(str(tmp_path), retry_seconds=600)
    attempts = threading.Semaphore(0)

    def fail():
        attempts.release()
        raise OSError("no route to host")

    threading.Timer(0.0, lambda: attempts.acquire() and attempts.acquire() and waiting.close()).start()
    with pytest.raises(StorageError, match=r"a file cannot be read: [2-9] attempts in . seconds failed \(no route"):
        waiting.patiently(fail, "a file")


def test_a_dataset_that_is_not_there_is_named_without_the_credentials(uri):
    with pytest.raises(
        UserError, match=r"^s3://logs/elsewhere/dataset\.json cannot be read: there is no such file; restore it"
    ) as raised:
        loader(uri.replace("prepared", "elsewhere"))
    assert "secret" not in str(raised.value)


def test_an_unknown_kind_of_store_is_named():
    with pytest.raises(UserError, match=r"data\.path=ftp://host/data cannot be opened .* s3://, gs://, hdfs://"):
        Storage("ftp://host/data")


def test_describing_a_dataset_in_a_store_tells_which_history_file_is_missing(own_server, capsys):
    moto, path = own_server
    host, port = moto.get_host_and_port()
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", **keys)
    assert main(["data", "describe", path]) == 0
    assert "DAMAGED" not in capsys.readouterr().out
    client.delete_object(Bucket="logs", Key=f"prepared/histories/{HISTORY}")
    assert main(["data", "describe", path]) == 0
    assert f"DAMAGED      histories/{HISTORY} is missing; restore" in capsys.readouterr().out


def test_a_google_store_that_is_gone_is_given_up_after_retry_seconds_and_not_after_its_clients():
    """That tries for a quarter of an hour, within one call."""
    gone = Storage("gs://anonymous@bucket/data?endpoint_override=127.0.0.1:9&scheme=http", retry_seconds=0.2)
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"^gs://bucket/data/a.parquet cannot be read: .* seconds failed"):
        gone.open("a.parquet")
    assert time.monotonic() - began < 60
