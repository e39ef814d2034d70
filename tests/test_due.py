"""When a run is saved by the clock: what loses least, and processes that agree on it."""

import math
import threading
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch import distributed
from bigbatch.errors import UserError
from bigbatch.schedule.intervals import Every, Intervals
from bigbatch.training.due import Clock, best_interval_s
from bigbatch.training.watch import Watchdog
from tests import trained

UPDATE = Every(1, "updates")


def expected_share(interval_s, save_s, failure_s):
    """Time by useful time, where failures come by chance and work since the checkpoint is lost."""
    return failure_s * np.expm1((interval_s + save_s) / failure_s) / interval_s


@given(st.floats(1e-3, 100.0), st.floats(1e-5, 0.5))
@settings(max_examples=60)
def test_no_other_interval_loses_less(save_s, share):
    """Against every interval of a grid as fine as 1 %."""
    failure_s = save_s / share
    tried = failure_s * np.exp(np.linspace(math.log(share / 10), math.log(10), 1_000))
    least = expected_share(tried, save_s, failure_s).min()
    found = best_interval_s(save_s, failure_s)
    assert expected_share(found, save_s, failure_s) <= least * (1 + 2e-3 * share + 1e-6)
    # Young's is its beginning.
    young_s = math.sqrt(2 * save_s * failure_s)
    assert found == pytest.approx(young_s, rel=2 * math.sqrt(share))


def test_one_that_is_lost_sooner_than_saved_is_saved_all_the_same():
    assert best_interval_s(10.0, 4.0) == 4.0


def simulated_share(interval_s, save_s, failure_s, rng, intervals=20_000):
    """The same by chance: each interval is tried until no failure falls into it."""
    spent_s = 0.0
    for _ in range(intervals):
        while (failed_s := rng.exponential(failure_s)) < interval_s + save_s:
            spent_s += failed_s
        spent_s += interval_s + save_s
    return spent_s / (intervals * interval_s)


def test_failures_by_chance_cost_what_is_expected_and_more_at_other_intervals():
    save_s, failure_s, rng = 3.0, 100.0, np.random.default_rng(0)
    best_s = best_interval_s(save_s, failure_s)
    shares = [simulated_share(f * best_s, save_s, failure_s, rng) for f in (0.5, 1.0, 2.0)]
    for share, factor in zip(shares, (0.5, 1.0, 2.0), strict=True):
        assert share == pytest.approx(expected_share(factor * best_s, save_s, failure_s), rel=0.01)
    assert shares[1] < min(shares[0], shares[2])


def intervals_of(**fields):
    return Intervals.of(fields, {"log_every": UPDATE, "evaluate_every": UPDATE})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"checkpoint_every_minutes": "auto"}, "failure_every_hours: given 'nothing'"),
        ({"checkpoint_every_minutes": "auto", "failure_every_hours": 0}, "hours: given 0"),
        ({"checkpoint_every_minutes": "often"}, "minutes: given 'often'; allowed: a number"),
        ({"checkpoint_every_minutes": 0}, "minutes: given 0; allowed: a number above 0"),
        ({"checkpoint_every_minutes": 5, "failure_every_hours": 5}, "nothing without"),
        ({"checkpoint_every_minutes": 5, "checkpoint_every_updates": 5}, "exactly one of"),
    ],
)
def test_mistakes_are_told(fields, words):
    with pytest.raises(UserError, match=words):
        intervals_of(**fields)


class Told:
    """Time that passes when it is told to, for each thread another."""

    def __init__(self):
        self.local = threading.local()

    def __call__(self):
        return getattr(self.local, "now_s", 0.0)

    def sleep(self, seconds):
        self.local.now_s = self() + seconds


@pytest.fixture
def told(monkeypatch):
    clock = Told()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def saves_of(clock, told, update_s, num_updates, wait=lambda: None):
    """The updates after which a run of so many is saved."""
    saves = []
    for done in range(1, num_updates + 1):
        told.sleep(update_s(done))
        if clock.due(done, wait):
            clock.saved(done)
            saves.append(done)
    return saves


def test_one_process_saves_after_the_update_in_which_the_time_is_over(told):
    clock = Clock(intervals_of(checkpoint_every_minutes=1), 0, Watchdog())
    found = saves_of(clock, told, lambda done: 7.0 if done <= 20 else 25.0, 30)
    # 9 updates of 7 s are 63 s; of 25 s it takes 3.
    assert found == [9, 18, 22, 25, 28]


def test_auto_follows_what_updates_have_waited(told):
    due = intervals_of(checkpoint_every_minutes="auto", failure_every_hours=10)
    watchdog = Watchdog()
    clock = Clock(due, 0, watchdog)
    assert clock.interval_s() == best_interval_s(1.0, 36_000)
    for _ in range(4):
        with watchdog.phase("checkpoint"):
            told.sleep(0.25)
        clock.saved(1)
    assert clock.interval_s() == best_interval_s(0.25, 36_000)


def test_processes_whose_clocks_differ_save_after_the_same_updates(told, monkeypatch):
    """Process 1's clock is a third as fast, and 2's stands; updates grow tenfold on the way."""
    processes, waits = 3, []
    barrier, here, said = threading.Barrier(processes), threading.local(), [b""] * processes

    def gather(message):
        said[here.process] = message
        barrier.wait(30)
        answer = list(said)
        barrier.wait(30)
        return answer

    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(distributed, "gather", gather)
    saves = [[]] * processes

    def run(process):
        here.process = process
        clock = Clock(intervals_of(checkpoint_every_minutes=10), 0, Watchdog())
        speed = (1.0, 1 / 3, 0.0)[process]

        def update_s(done):
            return speed * (1.0 if done <= 2_000 else 10.0)

        saves[process] = saves_of(clock, told, update_s, 3_000, lambda: waits.append(process))

    threads = [threading.Thread(target=run, args=(process,)) for process in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert saves[0] == saves[1] == saves[2]
    # 600 updates of a second, at most a few more; then 60.
    gaps = np.diff([0, *saves[0]])
    assert all(600 <= gap <= 603 for gap in gaps[:3])
    assert all(60 <= gap <= 63 for gap in gaps[4:])
    # A look waits for the device: few, on all at once.
    assert waits.count(0) == waits.count(2) <= 12 * (len(gaps) + 1)


def test_a_run_that_is_saved_by_the_clock_ends_as_any(tmp_path):
    config = trained.quick(checkpoint_every_minutes=1e-9, keep_checkpoints=100)
    run = trained.prepared(config)
    found = trained.train(run, tmp_path / "clock")
    expected = trained.train(trained.prepared(trained.quick()), tmp_path / "updates")
    assert found["params_sha256"] == expected["params_sha256"]
    saved = {int(path.name) for path in (tmp_path / "clock" / "checkpoints").iterdir()}
    assert saved == set(range(1, found["updates"] + 1))
