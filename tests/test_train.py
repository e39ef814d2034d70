"""The loop: stopped anywhere and continued, it ends where an undisturbed run ends."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from bigbatch import train
from bigbatch.checkpoint import Checkpoints, params_sha256
from bigbatch.errors import RunError
from bigbatch.metrics import truncate
from bigbatch.workdir import Workdir
from tests import trained

ROOT = Path(__file__).parents[1]


def records(directory: Path) -> list[dict]:
    """The log without what depends on the clock."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line) for line in lines]
    clock = {"examples_per_s", "input_wait_s"}
    return [{k: v for k, v in record.items() if k not in clock} for record in parsed]


@pytest.fixture(scope="module")
def run():
    # Evaluations, checkpoints and log records that do not fall on the same updates.
    return trained.prepared(
        trained.config(log_every_updates=3, evaluate_every_updates=4, checkpoint_every_updates=5)
    )


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    return directory, train.train(run, directory)


class StopError(Exception):
    """Stands for anything that ends a process."""


@pytest.mark.parametrize("stop_at", [1, 5, 7, 12, 19, 20])
def test_an_interrupted_run_ends_where_an_undisturbed_one_does(
    run, undisturbed, tmp_path, monkeypatch, stop_at
):
    expected_directory, expected = undisturbed
    original = train.updates

    def interrupted(*arguments):
        for row, state, sums in original(*arguments):
            if row.update == stop_at:
                raise StopError
            yield row, state, sums

    monkeypatch.setattr(train, "updates", interrupted)
    if stop_at < run.plan.num_updates:
        with pytest.raises(StopError):
            train.train(run, tmp_path)
        assert not (tmp_path / "result.json").exists()
    else:
        train.train(run, tmp_path)
        (tmp_path / "result.json").unlink()
    monkeypatch.undo()
    result = train.train(run, tmp_path)
    same = ["updates", "examples", "test_accuracy", "test_loss", "train_loss", "params_sha256"]
    assert {k: result[k] for k in same} == {k: expected[k] for k in same}
    assert records(tmp_path) == records(expected_directory)


def test_a_checkpoint_holds_what_the_loop_had_when_it_was_saved(run, undisturbed):
    """Saving is asynchronous, and the next update is given the state's own buffers."""
    directory, _ = undisturbed
    with Checkpoints(Workdir(directory).checkpoints) as checkpoints:
        update, record = checkpoints.latest()
        assert update == 20
        assert record["progress"]["updates"] == 20
        assert record["plan"] == run.plan.fingerprint
        assert set(record["versions"]) >= {"bigbatch", "jax", "optax", "orbax-checkpoint"}
        saved = checkpoints.restore(15, run.init_state())
    for row, state, _ in train.updates(run, run.init_state(), 0):
        if row.update == 14:
            assert params_sha256(state.params) == params_sha256(saved.params)
            jax.tree.map(np.testing.assert_array_equal, state, saved)


def test_a_checkpoint_is_restored_on_other_devices(undisturbed):
    directory, expected = undisturbed
    other = trained.prepared(trained.config(), devices=4)
    with Checkpoints(Workdir(directory).checkpoints) as checkpoints:
        state, progress = train.restore(other, checkpoints)
    assert progress.updates == 20
    assert len(state.params["stem"]["kernel"].sharding.device_set) == 4
    assert params_sha256(state.params) == expected["params_sha256"]


def test_the_seed_changes_the_run(run, undisturbed, tmp_path):
    other = trained.prepared(trained.config(seed=1))
    assert train.train(other, tmp_path)["params_sha256"] != undisturbed[1]["params_sha256"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoints(tmp_path):
    policy = trained.DECAY | {"learning_rate": 1e30}
    broken = trained.prepared(trained.config(policy=policy, checkpoint_every_updates=1))
    with pytest.raises(RunError, match=r"in update \d+ .* learning_rate 1e\+30"):
        train.train(broken, tmp_path)
    assert not (tmp_path / "result.json").exists()
    with Checkpoints(Workdir(tmp_path).checkpoints) as checkpoints:
        latest = checkpoints.latest()
    logged = records(tmp_path)
    assert all(np.isfinite(record["train_loss"]) for record in logged)
    assert latest is not None
    assert latest[0] <= logged[-1]["update"]


def test_truncate(tmp_path):
    log = tmp_path / "metrics.jsonl"
    truncate(log, last_update=3)
    assert not log.exists()
    lines = [json.dumps({"update": update}) for update in (1, 3, 3, 4)]
    log.write_text("\n".join([*lines[:3], "damaged", lines[3], '{"update": 5, "trai']))
    truncate(log, last_update=3)
    assert log.read_text().splitlines() == lines[:3]


COMMAND = (
    sys.executable,
    *("-W", "error", "-m", "bigbatch", "train", f"--config={ROOT / 'configs/digits.py'}:increase"),
    *("--config.epochs=2", "--config.policy.boundaries_epochs=(0.4,0.8)", "--config.model.width=2"),
    *("--config.checkpoint_every_updates=3", "--config.evaluate_every_updates=5"),
)


def kill_storm(directory: Path, kills: int, seed: int) -> tuple[int, dict]:
    """Runs the command and kills it at random moments; then lets it end."""
    moments = random.Random(seed)
    command = [*COMMAND, f"--workdir={directory}"]
    survived = 0
    for _ in range(kills):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        # Half of the kills wait for the loop, so that not all of them hit the start.
        log = directory / "metrics.jsonl"
        if moments.random() < 0.5:
            seen = log.stat().st_mtime_ns if log.exists() else 0
            while process.poll() is None and (not log.exists() or log.stat().st_mtime_ns == seen):
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 1))
        else:
            time.sleep(moments.uniform(0, 6))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            survived += 1
        process.wait()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return survived, json.loads((directory / "result.json").read_text())


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.long)])
def test_sigkill_at_any_moment_changes_nothing(tmp_path, kills):
    _, expected = kill_storm(tmp_path / "undisturbed", kills=0, seed=0)
    killed, result = kill_storm(tmp_path / "killed", kills=kills, seed=kills)
    assert killed >= kills // 4
    assert result["params_sha256"] == expected["params_sha256"]
    assert records(tmp_path / "killed") == records(tmp_path / "undisturbed")
