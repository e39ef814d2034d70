"""Nobody else trains in a workdir, another process or thread, until the first has ended."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from bigbatch import cli
from bigbatch.errors import UserError
from bigbatch.workdir import storage
from bigbatch.workdir.files import Workdir
from tests.test_distributed import ROOT

DIGITS = ROOT / "configs/digits.py"

HOLDER = """
import os, sys, time
from pathlib import Path
from bigbatch.workdir import storage
storage.hold(Path(sys.argv[1]), "workdir")
storage.hold(Path(sys.argv[1]).parent.with_name("other"), "workdir")
if os.fork() == 0:
    print("held", flush=True)
    time.sleep(60)
time.sleep(60)
"""


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "increase" / "seed_0"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def holder(directory):
    """A process that holds the directory, and has a child that outlives it."""
    command = [sys.executable, "-c", HOLDER, str(directory / "lock")]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, **options) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        os.killpg(process.pid, signal.SIGKILL)


def test_another_process_is_refused_with_who_holds_it_until_that_is_killed(holder, directory):
    words = f"nobody else trains in; process {holder.pid} on {os.uname().nodename}, since 20"
    for _ in range(2):
        with pytest.raises(UserError, match=words):
            Workdir(directory).claim()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    Workdir(directory).claim()
    storage.release(directory / "lock")
    assert list(directory.iterdir()) == []


def test_another_thread_is_refused_and_the_same_is_not(tmp_path):
    files, errors = Workdir(tmp_path), []

    def claim():
        try:
            files.claim()
        except UserError as error:
            errors.append(str(error))

    def released():
        with files.released():
            claim()

    def elsewhere():
        thread = threading.Thread(target=released)
        thread.start()
        thread.join()

    with files.released():
        claim()
        claim()
        elsewhere()
    assert [f"process {os.getpid()} on" in error for error in errors] == [True]
    elsewhere()
    assert len(errors) == 1


def test_a_claim_says_whether_it_is_the_first(tmp_path):
    with Workdir(tmp_path).released():
        assert [Workdir(tmp_path).claim() for _ in range(3)] == [True, False, False]


def test_a_file_system_without_locks_is_used_without(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr(storage.fcntl, "flock", flock)
    with Workdir(tmp_path).released():
        Workdir(tmp_path).claim()
        assert (tmp_path / "lock").exists()


@pytest.mark.parametrize("verb", ["train", "compare"])
def test_a_second_command_is_refused_and_changes_nothing(holder, directory, tmp_path, capsys, verb):
    workdir = directory if verb == "train" else tmp_path
    assert cli.main([verb, f"--config={DIGITS}:increase", f"--workdir={workdir}"]) == 2
    assert f"process {holder.pid} on" in capsys.readouterr().err
    assert [path.name for path in directory.iterdir()] == ["lock"]
