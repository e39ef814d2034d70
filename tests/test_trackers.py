"""Trackers with wandb's interface hold what the log holds, however a run was ended in between."""

import itertools
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.errors import UserError
from bigbatch.training import loop
from bigbatch.workdir import metrics
from bigbatch.workdir.event_files import numbers_by_tag
from bigbatch.workdir.files import Workdir
from bigbatch.workdir.trackers import Continued
from tests import trained
from tests.storm import ROOT


class Library:
    """wandb's interface. What is logged is kept at the end, or of a kill as much as is told.

    "wandb" keeps it in a folder for each start, "trackio" in a store of its own.
    """

    def __init__(self, name):
        self.__name__, self.store, self.running = name, {}, None

    def init(self, project, name, config, resume, id=None, dir=None, mode=None):
        assert (self.running, resume) == (None, "allow")
        assert (id is None) == (self.__name__ == "trackio")
        assert mode in (None, "offline")
        self.running, self.buffer = self, []
        self.place = project, name
        if dir is not None:
            self.folder = Path(dir, "wandb", f"offline-run-{random.random()}-{id}")
            self.folder.mkdir(parents=True)
        return self

    def log(self, numbers, step):
        self.buffer.append([step, numbers])

    def keep(self, count):
        kept, self.running = self.buffer[:count], None
        if self.__name__ == "wandb":
            (self.folder / "history").write_text(json.dumps(kept))
        elif kept:
            self.store.setdefault(self.place, []).extend(kept)

    def finish(self):
        self.keep(len(self.buffer))

    def Api(self):  # noqa: N802 - trackio's name
        def runs(project):
            names = [name for of, name in self.store if of == project]
            if not names:
                raise ValueError("no such project")
            return [
                types.SimpleNamespace(
                    name=name, delete=lambda name=name: self.store.pop((project, name))
                )
                for name in names
            ]

        return types.SimpleNamespace(runs=runs)

    def found(self, files):
        if self.__name__ == "trackio":
            return [*itertools.chain(*self.store.values())]
        folders = files.trackers.glob("wandb/offline-run-*/history")
        return [*itertools.chain(*sorted(json.loads(path.read_text()) for path in folders))]


def records(first, last):
    for update in range(first + 1, last + 1):
        yield {"update": update, "train_loss": 1 / update, "unix_s": random.random()}
        if update % 3 == 0:
            yield {"update": update, "test_loss": 2 / update, "unix_s": 0.0}


def logged(files):
    return [json.loads(line) for line in files.metrics.read_text().splitlines()]


# Updates that a start makes, how many of them are saved, and how many records a killed tracker has
# kept; None: it was closed.
STARTS = st.lists(
    st.tuples(st.integers(0, 7), st.integers(0, 7), st.none() | st.integers(0, 9)), max_size=5
)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
@settings(deadline=None, max_examples=25)
@given(starts=STARTS)
def test_the_record_is_the_logs(name, starts):
    library, saved = Library(name), 0
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, library)
        files = Workdir(Path(directory))
        for updates, kept_updates, kept_records in [*starts, (2, 2, None)]:
            metrics.truncate(files.metrics, last_update=saved)
            tracker = Continued(name, files, {"seed": 3}, "run")
            with metrics.MetricsLog(files.metrics, [tracker]) as log:
                for record in records(saved, saved + updates):
                    log.write(record)
                if kept_records is not None:
                    library.keep(kept_records)
                    tracker.close = lambda: None
            saved += min(updates, kept_updates)
        expected = [[each["update"], numbers_by_tag(each)] for each in logged(files)]
        assert library.found(files) == expected


def test_a_run_tells_them_and_goes_on(monkeypatch, tmp_path):
    """One that ends with an error, past its checkpoint, and is started again."""
    libraries = [Library("wandb"), Library("trackio")]
    for library in libraries:
        monkeypatch.setitem(sys.modules, library.__name__, library)
    run = trained.prepared(trained.quick(trackers=["wandb", "trackio"]))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "updates", trained.stopping(loop.updates, 8))
        with pytest.raises(trained.StopError):
            trained.train(run, tmp_path)
    trained.train(run, tmp_path)
    files = Workdir(tmp_path)
    assert not files.tensorboard.exists()
    expected = [[each["update"], numbers_by_tag(each)] for each in logged(files)]
    assert len(expected) == 22
    for library in libraries:
        assert library.found(files) == expected


def test_one_that_is_not_installed_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"trackers: given 'wandb'; .*pip install 'bigbatch\[wandb"):
        trained.train(trained.prepared(trained.quick(trackers=["wandb"])), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"trackers: given .* one of tensorboard, wandb, trackio"):
        trained.quick(trackers=["wandbb"])


def start(name, directory, first, last, ends):
    """A part of a run with the real library, which ends by itself or by SIGKILL."""
    files = Workdir(Path(directory))
    metrics.truncate(files.metrics, last_update=first)
    tracker = Continued(name, files, {"seed": 3}, "run")
    with metrics.MetricsLog(files.metrics, [tracker]) as log:
        for record in records(first, last):
            log.write(record)
        if not ends:
            os.kill(os.getpid(), signal.SIGKILL)


def wandb_history(path):
    """Steps and numbers in a file of wandb's: protocol buffers in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            record, part = Record.FromString(part), b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}


@pytest.mark.long
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_libraries_themselves_after_three_kills(name, tmp_path, monkeypatch):
    # It reads that when it is imported.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    pytest.importorskip(name)
    for first, last, ends in ((0, 12, 0), (10, 23, 0), (20, 31, 0), (30, 35, 1), (35, 40, 1)):
        code = (
            f"from tests.test_trackers import start; start({name!r}, '.', {first}, {last}, {ends})"
        )
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment)
        assert done.returncode == (0 if ends else -signal.SIGKILL)
    expected = {}
    for each in logged(Workdir(tmp_path)):
        expected.setdefault(each["update"], {}).update(numbers_by_tag(each))
    if name == "wandb":
        paths = sorted(tmp_path.glob("trackers/wandb/offline-run-*/*.wandb"))
        rows = [row for path in paths for row in wandb_history(path)]
        found = [(row["_step"], {k: v for k, v in row.items() if k[0] != "_"}) for row in rows]
        assert found == sorted(expected.items())
    else:
        from trackio.sqlite_storage import SQLiteStorage

        (run,) = SQLiteStorage.get_runs("bigbatch")
        rows = SQLiteStorage.get_logs("bigbatch", run)
        assert len(rows) == len(logged(Workdir(tmp_path)))
        joined = {}
        for row in rows:
            numbers = {k: v for k, v in row.items() if "/" in k}
            assert not numbers.keys() & joined.setdefault(row["step"], {}).keys()
            joined[row["step"]].update(numbers)
        assert joined == expected
