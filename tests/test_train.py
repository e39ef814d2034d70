"""The loop: stopped anywhere and continued, it ends where an undisturbed run ends."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

from bigbatch.errors import RunError
from bigbatch.training import loop as train
from bigbatch.workdir.checkpoint import Checkpoints
from bigbatch.workdir.files import Workdir
from bigbatch.workdir.metrics import truncate
from bigbatch.workdir.packing import sha256 as params_sha256
from tests import storm, trained
from tests.storm import records


@pytest.fixture(scope="module")
def run():
    # Evaluations, checkpoints and log records that do not fall on the same updates.
    return trained.prepared(
        trained.quick(log_every_updates=3, evaluate_every_updates=4, checkpoint_every_updates=5)
    )


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    return directory, trained.train(run, directory)


@pytest.mark.parametrize("stop_at", [1, 5, 7, 12, 19, 20])
def test_an_interrupted_run_ends_where_an_undisturbed_one_does(
    run, undisturbed, tmp_path, monkeypatch, stop_at
):
    expected_directory, expected = undisturbed
    monkeypatch.setattr(train, "updates", trained.stopping(train.updates, stop_at))
    if stop_at < run.plan.num_updates:
        with pytest.raises(trained.StopError):
            trained.train(run, tmp_path)
        assert not (tmp_path / "result.json").exists()
    else:
        trained.train(run, tmp_path)
        (tmp_path / "result.json").unlink()
    monkeypatch.undo()
    result = trained.train(run, tmp_path)
    same = ["updates", "examples", "test_accuracy", "test_loss", "train_loss", "params_sha256"]
    assert {k: result[k] for k in same} == {k: expected[k] for k in same}
    first, last = json.loads((tmp_path / "starts.json").read_text())
    assert ("spent_s" in first) == (stop_at >= 5)
    assert re.fullmatch(r"8 x cpu, \w+", last["hardware"])
    assert last["spent_s"].keys() >= {"device", "compilation"}
    assert records(tmp_path) == records(expected_directory)


def test_a_record_s_loss_is_the_mean_over_the_examples_since_the_one_before(run, undisturbed):
    sums = [sums for _, _, sums in train.updates(run, run.init_state(), 0)]
    found = {r["update"]: r["train_loss"] for r in records(undisturbed[0]) if "train_loss" in r}
    assert list(found) == [3, 6, 9, 12, 15, 18, 20]
    before = 0
    for update, loss in found.items():
        losses, counts = zip(*((s["loss"], s["count"]) for s in sums[before:update]), strict=True)
        assert loss == pytest.approx(float(sum(losses)) / float(sum(counts)), rel=1e-5)
        before = update


def test_a_checkpoint_holds_what_the_loop_had_when_it_was_saved(run, undisturbed, tmp_path):
    """Saving is asynchronous, and the next update is given the state's own buffers."""
    directory, _ = undisturbed
    with Checkpoints(Workdir(directory).checkpoints) as checkpoints:
        update, record = checkpoints.latest()
        assert update == 20
        assert record["progress"]["updates"] == 20
        assert record["plan"] == run.plan.fingerprint
        assert set(record["versions"]) >= {"bigbatch", "jax", "optax", "orbax-checkpoint"}
    shutil.copytree(Workdir(directory).checkpoints / "15", tmp_path / "15")
    with Checkpoints(tmp_path) as checkpoints:
        saved, progress = train.restore(run, checkpoints)
    assert progress.updates == 15
    for row, state, _ in train.updates(run, run.init_state(), 0):
        if row.update == 14:
            assert params_sha256(state.params) == params_sha256(saved.params)
            jax.tree.map(np.testing.assert_array_equal, state, saved)


def test_a_checkpoint_is_restored_on_other_devices(undisturbed):
    directory, expected = undisturbed
    other = trained.prepared(trained.quick(), devices=4)
    with Checkpoints(Workdir(directory).checkpoints) as checkpoints:
        state, progress = train.restore(other, checkpoints)
    assert progress.updates == 20
    assert len(state.params["stem"]["kernel"].sharding.device_set) == 4
    assert params_sha256(state.params) == expected["params_sha256"]


@pytest.mark.parametrize("lost", ["moved", "removed", "its log removed"])
def test_a_directory_that_goes_in_mid_run_is_noticed(run, undisturbed, tmp_path, lost):
    """Moved, it gets the state, and the run goes on in it as if nothing had been."""
    expected_directory, expected = undisturbed
    directory, moved = tmp_path / "run", tmp_path / "moved"

    def go(record):
        if record["update"] == 6 and directory.exists():
            if lost == "moved":
                directory.rename(moved)
            elif lost == "removed":
                # A checkpoint may just be written in it.
                shutil.rmtree(directory, ignore_errors=True)
            else:
                (directory / "metrics.jsonl").unlink()

    words = f"nothing was saved after the newest checkpoint|continues with --workdir={moved}$"
    with pytest.raises(RunError, match=words) as told:
        trained.train(run, directory, on_record=go)
    assert str(told.value).startswith(f"{directory} was removed or moved")
    assert not (directory / "result.json").exists()
    if lost == "moved":
        with Checkpoints(Workdir(moved).checkpoints) as checkpoints:
            assert checkpoints.saved()[0] == 8
        result = trained.train(run, moved)
        assert result["params_sha256"] == expected["params_sha256"]
        assert records(moved) == records(expected_directory)


def test_the_seed_changes_the_run(run, undisturbed, tmp_path):
    other = trained.prepared(trained.quick(seed=1))
    assert trained.train(other, tmp_path)["params_sha256"] != undisturbed[1]["params_sha256"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoints(tmp_path):
    policy = trained.DECAY | {"learning_rate": 1e30}
    broken = trained.prepared(trained.quick(policy=policy, checkpoint_every_updates=1))
    with pytest.raises(RunError, match=r"in update \d+ .* learning_rate 1e\+30"):
        trained.train(broken, tmp_path)
    assert not (tmp_path / "result.json").exists()
    with Checkpoints(Workdir(tmp_path).checkpoints) as checkpoints:
        latest = checkpoints.latest()
    logged = records(tmp_path)
    assert all(np.isfinite(record["train_loss"]) for record in logged)
    assert latest is not None
    assert latest[0] <= logged[-1]["update"]


@pytest.mark.parametrize("wait_s", [0.0, 1e9])
def test_when_finished_updates_are_read_changes_nothing(
    run, undisturbed, tmp_path, monkeypatch, wait_s
):
    """Only evaluations and checkpoints cannot wait."""
    reads, record = [], train.progress_lib.record
    monkeypatch.setattr(train, "_UNREAD_S", wait_s)

    def recorded(run, progress, row, *rest):
        reads.append((row.update, sent[-1]))
        return record(run, progress, row, *rest)

    sent, updates = [], train.updates

    def noted(*arguments):
        for one in updates(*arguments):
            sent.append(one[0].update)
            yield one

    monkeypatch.setattr(train.progress_lib, "record", recorded)
    monkeypatch.setattr(train, "updates", noted)
    result = trained.train(run, tmp_path)
    expected_directory, expected = undisturbed
    clock = {"seconds": 0, "compilations": 0}
    assert result | clock == expected | clock
    assert records(tmp_path) == records(expected_directory)
    due = [update for update in range(20) if (update + 1) % 4 == 0 or (update + 1) % 5 == 0]
    late = {u: min(d for d in due if d >= u) if wait_s else u + (u not in due) for u in range(20)}
    assert dict(reads) == late


def test_truncate(tmp_path, capsys):
    log = tmp_path / "metrics.jsonl"
    truncate(log, last_update=3)
    assert not log.exists()
    lines = [json.dumps({"update": update}) for update in (1, 3, 3, 4)]
    damaged = "damaged", "[" * 100_000
    log.write_text("\n".join([*lines[:3], *damaged, lines[3], '{"update": 5, "trai']))
    truncate(log, last_update=3)
    assert log.read_text().splitlines() == lines[:3]
    assert capsys.readouterr().err.endswith("left out damaged lines: [4, 5]\n")


@pytest.mark.parametrize(
    ("kills", "experiment"),
    [
        (1, "increase"),
        pytest.param(50, "increase", marks=pytest.mark.long),
        pytest.param(50, "adaptive", marks=pytest.mark.long),
    ],
)
def test_a_storm_of_kills_changes_nothing(tmp_path, kills, experiment):
    counts, _ = storm.storms(tmp_path, kills, seed=kills, experiment=experiment)
    assert sum(counts.values()) == kills
