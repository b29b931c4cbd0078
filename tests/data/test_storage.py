"""Datasets in an S3 store, a real server on this machine that can be made to fail, and what the loader makes of it."""

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import boto3
import pytest
from moto.server import ThreadedMotoServer
from random_datasets import random_histories, write_dataset

from ultrarec.data import patience
from ultrarec.data.config import DataConfig
from ultrarec.data.errors import StorageError, UserError
from ultrarec.data.loader import Loader, RankingSampler
from ultrarec.data.storage import Storage, load_dataset

HISTORY = "part-00001.parquet"


class Proxy(ThreadingHTTPServer):
    """Hands requests on to a server, unless `misbehave(handler)` has done something else and says so."""

    daemon_threads = True

    def __init__(self, target):
        super().__init__(("127.0.0.1", 0), Forward)
        self.target = target
        self.misbehave = lambda handler: False
        self.failures = 0


class Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def forward(self):
        if self.server.misbehave(self):
            self.server.failures += 1
            return
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
            with urlopen(Request(self.server.target + self.path, headers=headers, method=self.command)) as answer:
                self.answer(answer.status, answer.headers, answer.read())
        except HTTPError as error:
            self.answer(error.code, error.headers, error.read())

    do_GET = do_HEAD = forward

    def answer(self, status, headers, body):
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "date", "server"):
                self.send_header(name, value)
        if "content-length" not in {name.lower() for name in headers}:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def refuse(handler):
    handler.answer(500, {"Content-Length": "0"}, b"")


def reset(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)


def hang_up_half_way(handler):
    handler.send_response(206)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    handler.wfile.write(b"PAR1")
    handler.connection.shutdown(socket.SHUT_RDWR)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


FAILURES = {"an error 500": refuse, "a reset connection": reset, "an answer that breaks off": hang_up_half_way}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    root = tmp_path_factory.mktemp("storage") / "dataset"
    histories = random_histories(num_users=16, num_items=20, mean_events=5, seed=3)
    return write_dataset(root, histories, num_items=20, num_files=2, rows_per_group=4).root


def filled(moto, local):
    """The address of a server that is started, with the dataset in it."""
    moto.start()
    address = "http://{}:{}".format(*moto.get_host_and_port())
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=address, **keys)
    client.create_bucket(Bucket="logs")
    for path in local.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "logs", f"prepared/{path.relative_to(local)}")
    return address


@pytest.fixture(scope="module")
def server(local):
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    yield filled(moto, local)
    moto.stop()


def stop(moto):
    """End a server, and free its port, which it would keep."""
    moto.stop()
    moto._server.server_close()


@pytest.fixture
def own_server(local, monkeypatch):
    """A server that a test may stop, and the dataset's address in it."""
    monkeypatch.setattr(patience, "SILENT_SECONDS", 0.5)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=free_port(), verbose=False)
    host = filled(moto, local).removeprefix("http://")
    yield moto, f"s3://key:secret@logs/prepared?scheme=http&endpoint_override={host}&region=us-east-1"
    moto.stop()


@pytest.fixture
def proxy(server, monkeypatch):
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.01)
    with Proxy(server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


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
