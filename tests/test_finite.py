"""What is not finite ends a run, by every way out; an update without weight changes nothing."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bigbatch as bb
from bigbatch.engine import functions
from bigbatch.errors import RunError
from bigbatch.training.restore import newest
from bigbatch.training.run import Run
from bigbatch.training.updates import updates

SIZE, BATCH = 100, 10


def loss(prediction, examples):
    weight, error = examples["weight"], prediction - examples["y"]
    return {"loss": jnp.sum(weight * error**2), "count": jnp.sum(weight)}


TASK = bb.Task(
    init=lambda key: (jnp.zeros(3), {}),
    apply=lambda params, statistics, examples, train: (examples["x"] @ params, {}),
    loss=loss,
)
X = np.random.default_rng(0).normal(size=(SIZE, 3)).astype(np.float32)
ARRAYS = {"x": X, "y": X @ np.float32([1, 2, 3])}


def prepared(arrays=ARRAYS, test=ARRAYS, rate=0.05, task=TASK, **options) -> Run:
    plan = bb.make_plan(bb.constant(rate, BATCH, 0.9), train_examples=SIZE, epochs=1)
    options |= {"microbatch_examples_per_device": BATCH}
    options |= {"mesh": functions.data_mesh(jax.devices()[:1])}
    return bb.prepare(task, bb.Data(arrays, test), plan, bb.Momentum(), **options)


def test_a_rate_that_only_the_last_update_shows(tmp_path):
    """Finite loss and gradient, infinite parameters: no result, no checkpoint, and so again."""
    plan = bb.make_plan(bb.constant(1e-3, BATCH), train_examples=SIZE, epochs=1)
    rates = np.append(plan.hypers["learning_rate"][:-1], 3e38)
    plan = dataclasses.replace(plan, hypers={**plan.hypers, "learning_rate": rates})
    data = bb.Data(ARRAYS, ARRAYS)
    run = bb.prepare(TASK, data, plan, bb.Sgd(), microbatch_examples_per_device=BATCH)
    for _ in range(2):
        with pytest.raises(RunError, match="the parameters are not finite in update 9"):
            bb.train(run, tmp_path / "run", checkpoint_every_updates=1)
        assert not (tmp_path / "run" / "result.json").exists()
        state, updates_done = newest(run, tmp_path / "run")
        assert updates_done == 9
        assert np.isfinite(state.params).all()


@pytest.mark.parametrize("rate", [0.05, 1e30])
def test_fit_stops(rate):
    arrays = ARRAYS | {"y": ARRAYS["y"].copy()}
    arrays["y"][5] = np.nan if rate < 1 else 0
    with pytest.raises(RunError, match=r"not finite|training loss is"):
        bb.fit(prepared(arrays, rate=rate))


def lines(directory):
    def refused(name):
        raise ValueError(f"{name} is no JSON")

    text = (directory / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refused) for line in text.splitlines()]


def test_a_test_loss_that_is_not_finite(tmp_path):
    """In the middle it is null in the log; at the end the run has failed."""
    test = ARRAYS | {"y": ARRAYS["y"].copy()}
    test["y"][7] = np.inf
    run = prepared(test=test)
    for _ in range(2):
        with pytest.raises(RunError, match="the test loss is inf in update 9"):
            bb.train(run, tmp_path, evaluate_every_updates=3)
        assert not (tmp_path / "result.json").exists()
    losses = [record["test_loss"] for record in lines(tmp_path) if "test_loss" in record]
    assert losses == [None] * 4


def test_a_metric_that_is_not_finite_is_null(tmp_path):
    task = bb.Task(TASK.init, TASK.apply, loss, metrics={"log": lambda means: -np.inf})
    run = prepared(task=task)
    bb.train(run, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["test_log"] is None
    assert lines(tmp_path)[-1]["test_log"] is None


@pytest.mark.parametrize("options", [{}, {"reproducible": True}, {"shard": "update"}])
def test_an_update_without_weight_leaves_the_state_as_it_is(tmp_path, options):
    """The momentum too: its velocity would go on moving the parameters."""
    masked = prepared().data.training(0, 3 * BATCH, BATCH)
    weight = 1 - np.isin(ARRAYS["y"], masked["y"]).astype(np.float32)
    arrays = ARRAYS | {"weight": weight}
    assert weight.sum() == SIZE - BATCH
    run = prepared(arrays, ARRAYS | {"weight": np.ones(SIZE)}, **options)
    states = [
        jax.device_get(state._replace(bounds=()))
        for _, state, _ in updates(run, run.first_state(), 0)
    ]
    jax.tree.map(np.testing.assert_array_equal, states[2], states[3])
    assert not np.array_equal(states[3].params, states[4].params)
    assert np.isfinite(states[-1].params).all()
    bb.train(run, tmp_path)
    records = [record for record in lines(tmp_path) if "examples_per_s" in record]
    assert [record.get("empty_updates", 0) for record in records] == [0, 0, 0, 1] + [0] * 6
    assert ["train_loss" in record for record in records] == [True] * 3 + [False] + [True] * 6
