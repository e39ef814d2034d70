"""Ghost batches over several devices, and dropout, in whole runs."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from bigbatch.config.config import read_config
from bigbatch.data.stream import example_keys
from bigbatch.engine import functions as step
from bigbatch.errors import UserError
from bigbatch.layout.sharing import layout_over
from bigbatch.models import WideResNetConfig
from bigbatch.models.classification import cross_entropy_sums
from bigbatch.models.dropout import dropout
from bigbatch.models.ghost_norm import GHOST_STATISTICS
from bigbatch.training import loop as train
from bigbatch.training.run import Run
from tests import trained

MODEL = {
    "name": "wide_resnet",
    "depth": 10,
    "width": 1,
    "strides": [2, 2, 1],
    "dtype": "float64",
    "dropout_rate": 0.3,
}
# Six updates: 32 examples are one ghost batch, 96 are three.
POLICY = {
    "name": "step_decay",
    "learning_rate": 0.1,
    "batch_size": 32,
    "momentum": 0.9,
    "boundaries_epochs": [0.05],
    "factor": 0.3,
}


def small_config(**changes):
    settings = {
        "epochs": 0.3,
        "model": MODEL,
        "policy": POLICY,
        "transformations": [{"name": "grow_batch", "max_batch_size": 96}],
    }
    return read_config(trained.tree() | settings | changes)


def last_state(run, state):
    """The state at the end of a run from a given one, which may lie anywhere."""
    state = jax.device_put(jax.device_get(state), NamedSharding(run.mesh, step.REPLICATED))
    *_, (_, state, _) = train.updates(run, state, 0)
    return state


class Alone(NamedTuple):
    """A run on one device, its first and its last state."""

    run: Run
    first: step.State
    last: step.State


@pytest.fixture(scope="module")
def alone():
    with jax.enable_x64(True):
        config = small_config()
        run = trained.prepared(config)
        assert sorted(set(run.plan.batch_sizes.tolist())) == [32, 96]
        first = jax.device_get(run.init_state())
        return Alone(run, first, last_state(run, first))


def assert_same(state, expected):
    pairs = (state.params, expected.params), (state.running_statistics, expected.running_statistics)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-10)
    for ours, theirs in pairs:
        jax.tree.map(close, jax.device_get(ours), jax.device_get(theirs))


@pytest.mark.parametrize(
    ("devices", "share"),
    [(8, 4), (2, 16), pytest.param(4, 16, marks=pytest.mark.long)],
)
def test_a_run_is_the_same_however_many_devices_share_a_ghost_batch(alone, devices, share):
    """With dropout, whose keys belong to the examples, and masked ghost batches at the end."""
    with jax.enable_x64(True):
        config = small_config(microbatch_examples_per_device=share)
        run = trained.prepared(config, devices)
        groups = devices * share // 32
        assert run.layout.devices == groups
        assert (run.layout.masked_share(run.plan) > 0) == (groups > 1)
        for accumulate in run.programs.accumulate.values():
            assert "all-gather" in accumulate.as_text()
        assert_same(last_state(run, alone.first), alone.last)


def test_layouts_that_cannot_be_formed_are_refused_with_the_nearest():
    settings = {"ghost_batch_examples": 32, "devices": 6}
    with pytest.raises(UserError) as error:
        layout_over([32], microbatch_examples_per_device=8, **settings)
    assert error.value.problems[0].nearest == 16
    with pytest.raises(UserError) as error:
        small_config(microbatch_examples_per_device=12)
    assert error.value.problems[0].nearest == 32


def test_dropout_depends_on_the_key_and_layer_of_each_example_alone():
    keys = jnp.asarray(example_keys(1000, 3, 990, 40))
    x = jnp.ones((40, 50, 20))
    dropped = dropout(x, keys, rate=0.3, layer=1)
    assert set(np.unique(dropped)) == {0, np.float32(1 / 0.7)}
    # 40,000 elements: the share kept has a standard deviation of 0.0023.
    assert abs(np.mean(dropped > 0) - 0.7) < 0.01
    part = dropout(x[7:9], keys[7:9], rate=0.3, layer=1)
    np.testing.assert_array_equal(part, dropped[7:9])
    other = dropout(x, keys, rate=0.3, layer=2)
    # Two independent masks agree where both keep or both drop.
    assert abs(np.mean((other > 0) == (dropped > 0)) - (0.7**2 + 0.3**2)) < 0.01
    np.testing.assert_array_equal(dropout(x, None, rate=0.0, layer=1), x)


def test_keys_belong_to_positions_and_never_repeat():
    keys = example_keys(10, seed=1, first_example=0, num_examples=35)
    np.testing.assert_array_equal(example_keys(10, 1, 13, 5), keys[13:18])
    assert len({tuple(key) for key in keys.tolist()}) == 35
    far = example_keys(50_000, 1, 2**33, 2)
    assert far.shape == (2, 2)


def test_a_model_with_dropout_asks_for_keys():
    config = WideResNetConfig(depth=10, width=1, dropout_rate=0.5)
    module = config.module(num_classes=2, ghost_batch_examples=2)
    x = jnp.zeros((2, 8, 8, 1))
    variables = jax.eval_shape(functools.partial(module.init, train=True), jax.random.key(0), x)
    apply = functools.partial(module.apply, train=True, mutable=[GHOST_STATISTICS])
    with pytest.raises(UserError, match="keys"):
        jax.eval_shape(apply, variables, x)


def test_label_smoothing_is_the_cross_entropy_with_softened_targets():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(6, 4)), np.arange(6) % 4
    weights = np.array([1, 1, 0, 1, 2, 1.0])
    targets = 0.9 * np.eye(4)[labels] + 0.1 / 4
    log_softmax = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    with jax.enable_x64(True):
        examples = {"label": jnp.asarray(labels), "weight": jnp.asarray(weights)}
        sums = cross_entropy_sums(jnp.asarray(logits), examples, label_smoothing=0.1)
    np.testing.assert_allclose(sums["loss"], -(weights @ (targets * log_softmax).sum(axis=1)))
