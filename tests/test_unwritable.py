"""A file system that takes nothing: there is a word, and what was there stays."""

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import sys

import pytest

from bigbatch.errors import RunError
from bigbatch.workdir import storage
from bigbatch.workdir.metrics import MetricsLog
from tests.test_distributed import ROOT

# Permissions do not bind root, unless it gives the right to pass them by away.
AS_ROOT = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]

# It takes seconds; a writer that is left waiting keeps the process for five minutes.
TIMEOUT_S = 200


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    directory = tmp_path_factory.mktemp("unwritable")
    bound = [] if os.geteuid() else AS_ROOT
    if bound and shutil.which(bound[0]) is None:
        pytest.skip("root passes permissions by, and there is no setpriv to prevent it")
    command = [*bound, sys.executable, "-W", "error", "-m", "tests.unwritable_run", str(directory)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    return directory, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("new", 2, "allowed: a directory that can be written (permission denied)"),
        ("begun", 2, "allowed: a directory that can be written (permission denied)"),
        ("checkpoints", 1, "a checkpoint could not be written to {}/checkpoints/checkpoints"),
    ],
)
def test_a_read_only_directory_ends_the_command_with_a_word(reports, name, status, words):
    directory, found = reports
    report = found[name]
    assert report["status"] == status, report["text"]
    assert words.format(directory) in report["text"]
    assert "Traceback" not in report["text"]
    assert report["same"]


@contextlib.contextmanager
def full_disk():
    """No file may grow: writing fails as it does on a full disk.

    Not a fixture: the test's own report may go to a file, too.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_the_file_that_was_to_be_replaced(tmp_path):
    path = tmp_path / "plan.json"
    storage.put(path, "old")
    message = f"{path} cannot be written .{os.strerror(errno.EFBIG)}"
    with pytest.raises(RunError, match=message), full_disk():
        storage.put(path, "new")
    assert path.read_text() == "old"


def test_a_full_disk_ends_the_log_with_a_word(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"update": 1})
    message = f"{path} cannot be written"
    with pytest.raises(RunError, match=message), full_disk(), MetricsLog(path) as log:
        log.write({"update": 2})
    assert path.read_text() == '{"update": 1}\n'
