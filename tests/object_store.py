"""An S3 store for tests: a real server on this machine, behind a proxy that can be made to fail."""

import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import boto3
from moto.server import ThreadedMotoServer


class Proxy(ThreadingHTTPServer):
    """Hands requests on to a server, unless `misbehave(handler)` has done something else and says so."""

    daemon_threads = True

    def __init__(self, target):
        super().__init__(("127.0.0.1", 0), Forward)
        self.target = target
        self.misbehave = lambda handler: False
        self.failures = 0


@contextmanager
def running_proxy(target):
    """A proxy in front of the server at `target`, while the block lasts."""
    with Proxy(target) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield proxy
        proxy.shutdown()


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


def fill(moto, local, prefix):
    """The address of a server that is started, with the files of a local folder below `prefix` of the bucket "logs"."""
    moto.start()
    address = "http://{}:{}".format(*moto.get_host_and_port())
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=address, **keys)
    client.create_bucket(Bucket="logs")
    for path in local.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "logs", f"{prefix}/{path.relative_to(local)}")
    return address


@contextmanager
def running_store(local, prefix):
    """The address of a server that holds a folder, as long as it is needed."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    yield fill(moto, local, prefix)
    moto.stop()
