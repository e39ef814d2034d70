"""Where the wall time of a run went, over starts that end in every way."""

import json
import subprocess
import time

import pytest

from bigbatch.commands.report import write_report
from bigbatch.training import loop, wall_time
from bigbatch.training.wall_time import WallTime, compiling
from bigbatch.training.watch import Watchdog
from bigbatch.workdir import starts
from bigbatch.workdir.files import Workdir
from tests import trained


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self):
        self.now_s = 1_000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(time, "time", found)
    monkeypatch.setattr(time, "monotonic", found)
    monkeypatch.setattr(wall_time, "_compiled", [])
    return found


def test_every_second_has_one_kind(clock):
    """A start, in seconds: 5 before the programs, 20 for them, 3 after; 60 of the loop."""
    began_s = clock.now_s
    clock.now_s += 5
    with compiling():
        clock.now_s += 20
    clock.now_s += 3
    watchdog = Watchdog()
    wall = WallTime(began_s, {"device": 100.0, "start-up": 7.0}, watchdog)
    for phase, seconds in (("input", 2), ("device", 30), ("evaluation", 6), ("checkpoint", 4)):
        with watchdog.phase(phase):
            clock.now_s += seconds
    with watchdog.phase("evaluation"):
        clock.now_s += 1
        # What lies within another phase is the outer one's.
        with watchdog.phase("input"):
            clock.now_s += 2
    clock.now_s += 15
    assert wall.spent_s() == {
        "device": 100 + 30 + 15,
        "input": 2,
        "start-up": 7 + 5 + 3,
        "compilation": 20,
        "evaluation": 6 + 3,
        "checkpoint": 4,
    }


def test_what_a_kill_took_back_is_lost(clock, tmp_path):
    """Three starts: killed after a checkpoint, killed before one, and one that ends."""
    files = Workdir(tmp_path)
    starts.note(files, ())
    clock.now_s += 10
    starts.lived(files, {"device": 8.0, "start-up": 2.0})
    # Its last record is 6 s later.
    files.metrics.write_text(json.dumps({"update": 7, "unix_s": clock.now_s + 6}) + "\n{half")
    clock.now_s += 100
    starts.note(files, ())
    clock.now_s += 100
    starts.note(files, ())
    assert starts.goodput(starts.before(files.starts)) == {
        **{"device": 8, "start-up": 2},
        "lost": 6,
    }
    clock.now_s += 5
    starts.lived(files, {"device": 12.0, "start-up": 3.0})
    found = starts.before(files.starts)
    assert [start["alive_s"] for start in found] == [16, 0, 5]
    assert starts.goodput(found) == {"device": 12, "start-up": 3, "lost": 6}
    line = "goodput 57 %: of 21.0 s in 3 starts device 12.0, start-up 3.0, lost 6.0"
    assert starts.goodput_line(found) == line


@pytest.mark.parametrize(
    "damaged",
    [[], [{}], [{"alive_s": "long", "spent_s": {"device": 1.0}}], [{"alive_s": 1, "spent_s": 2}]],
)
def test_what_is_not_known_is_not_told(damaged):
    assert starts.goodput(damaged) == {}
    assert starts.goodput_line(damaged) is None


def test_a_run_of_two_starts(tmp_path, monkeypatch):
    """One that was killed with updates past its checkpoint, and one that ends the run."""
    run = trained.prepared(trained.quick(checkpoint_every_updates=4))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "updates", trained.stopping(loop.updates, 7))
        with pytest.raises(trained.StopError):
            trained.train(run, tmp_path)
    killed_s = time.time()
    trained.train(run, tmp_path)
    found = starts.before(tmp_path / "starts.json")
    seconds = starts.goodput(found)
    assert list(seconds) == [*starts.KINDS, "lost"]
    assert min(seconds.values()) >= 0
    assert seconds["device"] > 0 < seconds["checkpoint"]
    # What is added up is what the clock says: nothing is twice in it, or missing.
    wall_s = [start["alive_s"] for start in found]
    assert sum(seconds.values()) == pytest.approx(sum(wall_s), abs=0.02)
    assert wall_s[0] <= killed_s - found[0]["began_unix_s"] + 0.01
    # The records after the checkpoint are gone, and their time is not.
    assert seconds["lost"] > 0
    report = write_report([tmp_path], tmp_path / "report")
    for text in (report.table.read_text(), report.page.read_text()):
        assert "goodput %" in text
        assert "starts that came to no checkpoint" in text


def test_the_commit_of_a_folder(tmp_path):
    def git(*arguments):
        who = "-c", "user.name=a", "-c", "user.email=a@b"
        done = subprocess.run(["git", *who, *arguments], cwd=tmp_path, capture_output=True)
        return done.stdout.decode().strip()

    assert starts._commit(tmp_path) is None
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", ".")
    git("commit", "-m", "first")
    assert starts._commit(tmp_path) == git("rev-parse", "HEAD")[:12]
    (tmp_path / "file").write_text("two")
    assert starts._commit(tmp_path) == git("rev-parse", "HEAD")[:12] + "-dirty"
