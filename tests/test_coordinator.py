"""Where process 0 of a run listens, and what is said of a port that is another program's."""

import contextlib
import socket
import subprocess
import sys
import threading

import pytest

from bigbatch import distributed
from bigbatch.errors import UserError
from tests.test_distributed import ROOT

WAITING = """
import threading, sys
from bigbatch import distributed
distributed.start(sys.argv[1], 2, 0)
"""


def free_port():
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return door.getsockname()[1]


@contextlib.contextmanager
def listening(answer: bytes):
    """Another program at a port, which answers with some bytes, or waits to be asked."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        done = threading.Event()

        def serve():
            peer, _ = door.accept()
            with peer:
                peer.sendall(answer)
                done.wait()

        thread = threading.Thread(target=serve)
        thread.start()
        yield door.getsockname()[1]
        done.set()
        thread.join()


@pytest.mark.parametrize("answer", [b"", b"220 mail", b"SSH-2.0-x\r\n"])
def test_a_port_in_use_is_said_on_both_sides(monkeypatch, answer):
    monkeypatch.setattr(distributed, "_ANSWER_S", 0.2)
    with listening(answer) as port:
        for process, words in ((0, "Address already in use"), (1, "another program answers")):
            with pytest.raises(UserError) as caught:
                distributed.start(f"127.0.0.1:{port}", 2, process)
            assert words in str(caught.value)


@pytest.mark.parametrize("host", ["203.0.113.7", "no.such.host.invalid", "x" * 300, "a..b"])
def test_a_host_that_is_not_this_one_is_refused(host):
    with pytest.raises(UserError, match=r"^coordinator: .*an address of the host of process 0"):
        distributed.start(f"{host}:4567", 2, 0)


def test_process_0_listens_where_it_is_told_and_nowhere_else():
    port = free_port()
    command = [sys.executable, "-c", WAITING, f"127.0.0.1:{port}"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None
            threading.Event().wait(0.1)
        # A process that comes later takes it for the coordinator.
        distributed._check_door(f"127.0.0.1:{port}", 1)
        # All of 127.0.0.0/8 is this host: what listens everywhere answers there, too.
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), 1)
    finally:
        process.kill()
        process.wait()
