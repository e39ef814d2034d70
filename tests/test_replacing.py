"""Whatever goes wrong while a file is written, the one that was there before stays."""

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bigbatch import constant, make_plan
from bigbatch.commands.plan_figure import draw_plan
from bigbatch.commands.report import write_report
from bigbatch.data.records import tfrecord_index
from bigbatch.errors import RunError, UserError
from bigbatch.places import replacing as replacing_lib
from bigbatch.places.replacing import replacing
from bigbatch.workdir import network_file
from bigbatch.workdir.files import write_json
from tests.report_runs import DECAY, falling_loss, write_run
from tests.storm import ROOT


def replace(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


def test_an_error_keeps_the_old_file_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    replace(out, b"old")

    def fail(error):
        with replacing(out) as file:
            file.write(b"new")
            raise error

    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            fail(error)
        assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("out", b"old")]


def test_a_kill_keeps_the_old_file(tmp_path):
    out = tmp_path / "out"
    replace(out, b"old")
    code = (
        "import os, sys; from bigbatch.places.replacing import replacing\n"
        "with replacing(sys.argv[1]) as file: file.write(b'new'); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert out.read_bytes() == b"old"


def test_the_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    out, done = tmp_path / "out", []
    out.write_bytes(b"old")

    def fsync(descriptor):
        done.append(("fsync", os.fstat(descriptor).st_size))

    def replace_name(source, target):
        done.append(("replace", Path(target) == out))

    monkeypatch.setattr(replacing_lib.os, "fsync", fsync)
    monkeypatch.setattr(replacing_lib.os, "replace", replace_name)
    replace(out, b"newer")
    assert done == [("fsync", 5), ("replace", True)]


def test_permissions_and_links_stay_and_devices_are_written_as_they_are(tmp_path):
    out, link, long = tmp_path / "out", tmp_path / "link", tmp_path / ("x" * 250)
    out.touch(0o640)
    link.symlink_to("out")
    for path in (link, long):
        replace(path, b"new")
        assert path.read_bytes() == b"new"
    assert link.is_symlink()
    assert stat.S_IMODE(out.stat().st_mode) == 0o640
    replace(Path(os.devnull), b"new")
    assert not Path(os.devnull).is_file()


def report(out: Path) -> None:
    runs = out.parents[1] / "runs"
    if not runs.exists():
        write_run(runs, "decay", 0, DECAY, falling_loss(0, epochs=4))
    write_report([runs / "decay" / "seed_0"], out.parent)


PLAN = make_plan(constant(0.1, 8, 0.9), train_examples=100, epochs=1)
NETWORK = network_file.Network({"w": np.ones(3)}, {})
INDEX = tfrecord_index.Index(np.array([9]), (np.array([0, 9]),))
WRITERS = {
    "bench.json": lambda out: write_json(out, {"a": 1}),
    "network.npz": lambda out: network_file.write(out, NETWORK),
    "plan.svg": lambda out: draw_plan(out, PLAN),
    "index.npz": lambda out: tfrecord_index._save(out, INDEX),
    "growing_batch.png": report,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_keeps_what_every_writer_would_replace(tmp_path, monkeypatch, name):
    """Where it shows only when the bytes are to reach the disk."""
    out = tmp_path / "out" / name
    out.parent.mkdir()
    out.write_bytes(b"old")

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(replacing_lib.os, "fsync", fsync)
        with pytest.raises((OSError, RunError, UserError), match="No space left"):
            WRITERS[name](out)
    assert out.read_bytes() == b"old"
    assert not list(tmp_path.rglob("*.being-written"))
    WRITERS[name](out)
    assert len(out.read_bytes()) > 3
