"""Adaptive runs: decided while they run, resumed and replayed exactly."""

import json

import pytest

from bigbatch.errors import UserError
from bigbatch.schedule.plan import Plan
from bigbatch.training import loop as train
from bigbatch.workdir.files import Workdir
from tests import trained

# The multiple is large, so that a few updates are enough for several levels.
ADAPTIVE = {
    "name": "adaptive",
    "learning_rate": 0.1,
    "batch_size": 32,
    "momentum": 0.9,
    "max_batch_size": 128,
    "multiple": 16.0,
}
FIELDS = {
    "transformations": [],
    "ghost_batch_examples": 16,
    "noise_small_batch_examples": 16,
    "microbatch_examples_per_device": 32,
    "log_every_updates": 3,
    "evaluate_every_updates": 9,
    "checkpoint_every_updates": 5,
}
SAME = ("updates", "examples", "test_accuracy", "test_loss", "train_loss", "params_sha256")


def config(policy=ADAPTIVE, **changes):
    return trained.quick(**{**FIELDS, "policy": policy, **changes})


@pytest.fixture(scope="module")
def run():
    return trained.prepared(config())


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    return directory, trained.train(run, directory)


def realised(directory):
    return Plan.from_json((directory / "plan.json").read_text())


def records(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    clock = {"examples_per_s": None, "input_wait_s": None, "unix_s": None}
    return [json.loads(line) | clock for line in lines]


def test_the_batch_grows_to_the_cap_and_the_learning_rate_falls_then(run, undisturbed):
    directory, result = undisturbed
    plan = realised(directory)
    assert result["updates"] == plan.num_updates < run.plan.num_updates
    assert result["examples"] == plan.num_examples
    levels = [(stage.batch_size, stage.learning_rate) for stage in plan.stages]
    assert levels[:3] == [(32, 0.1), (64, 0.1), (128, 0.1)]
    assert plan.stages[-1].last_learning_rate < 0.1
    logged = records(directory)
    for record in logged:
        row = plan.row(record["update"] - 1)
        assert record["batch_size"] == row.batch_size
        assert record["learning_rate"] == row.hyper["learning_rate"]
        assert record["examples"] == row.first_example + row.batch_size


def test_nothing_is_compiled_for_a_batch_size(run, undisturbed):
    assert undisturbed[1]["compilations"] == len(run.layout.shapes) + 2 <= 5


@pytest.mark.parametrize("stop_at", [1, 6, 13])
def test_a_killed_run_makes_the_same_decisions_again(
    run, undisturbed, tmp_path, monkeypatch, stop_at
):
    expected_directory, expected = undisturbed
    monkeypatch.setattr(train, "updates", trained.stopping(train.updates, stop_at))
    with pytest.raises(trained.StopError):
        trained.train(run, tmp_path)
    monkeypatch.undo()
    result = trained.train(run, tmp_path)
    assert {k: result[k] for k in SAME} == {k: expected[k] for k in SAME}
    assert records(tmp_path) == records(expected_directory)
    assert (tmp_path / "plan.json").read_bytes() == (expected_directory / "plan.json").read_bytes()


def test_the_realised_plan_runs_again_as_an_ordinary_plan(undisturbed, tmp_path):
    directory, expected = undisturbed
    again = config({"name": "plan_file", "path": str(directory / "plan.json")})
    assert again.controller is None
    assert again.plan.fingerprint == realised(directory).fingerprint
    result = trained.train(trained.prepared(again), tmp_path)
    assert {k: result[k] for k in SAME} == {k: expected[k] for k in SAME}
    assert records(tmp_path) == records(directory)


def test_the_devices_do_not_change_the_decisions(undisturbed, tmp_path):
    """Sums in another order differ in their last bits, which a decision does not hang on."""
    trained.train(trained.prepared(config(), 4), tmp_path)
    assert realised(tmp_path).diff(realised(undisturbed[0])) is None


def test_the_plan_is_written_as_it_is_decided(run, tmp_path, monkeypatch):
    seen = []
    original = train.updates

    def watched(*arguments):
        for row, state, sums in original(*arguments):
            text = (tmp_path / "plan.json").read_text()
            seen.append((row, Plan.from_json(text), json.loads(text)["decided_updates"]))
            yield row, state, sums

    monkeypatch.setattr(train, "updates", watched)
    trained.train(run, tmp_path)
    final = realised(tmp_path)
    for row, plan, decided in seen:
        assert row.batch_size == plan.row(row.update).batch_size
        assert (plan.batch_sizes[:decided] == final.batch_sizes[:decided]).all()
    assert len({decided for _, _, decided in seen}) > 3


def test_a_begun_adaptive_run_goes_on_only_with_its_own_policy(run, tmp_path):
    files = Workdir(tmp_path)
    trained.claimed(files, config(), run.data)
    trained.train(run, tmp_path)
    written = files.plan.read_bytes()
    trained.claimed(files, config(log_every_updates=1), run.data)
    assert files.plan.read_bytes() == written
    with pytest.raises(UserError, match=r"policy\.multiple: given 2\.0; allowed: 16\.0"):
        trained.claimed(files, config(ADAPTIVE | {"multiple": 2.0}), run.data)
    fixed = {n: v for n, v in ADAPTIVE.items() if n in ("learning_rate", "batch_size", "momentum")}
    with pytest.raises(UserError, match=r"policy\.name: given 'nothing'; allowed: 'adaptive'"):
        trained.claimed(files, config({"name": "constant", **fixed}), run.data)


def test_bad_fields():
    broken = ADAPTIVE | {"max_batch_size": 16, "multiple": 0, "growth_factor": 1}
    with pytest.raises(UserError) as caught:
        config(broken)
    problems = {problem.field: problem for problem in caught.value.problems}
    assert problems["policy.max_batch_size"].nearest == 32
    assert problems.keys() >= {"policy.multiple", "policy.growth_factor"}
