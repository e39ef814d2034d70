"""A model, a loss and arrays of one's own, against a plain loop in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import bigbatch
from bigbatch.data import stream
from bigbatch.engine import functions as step
from bigbatch.engine.optimizer import Adam, Momentum
from bigbatch.engine.task import Task
from bigbatch.errors import UserError
from bigbatch.models.classification import image_classification
from bigbatch.models.ghost_norm import GhostNorm
from bigbatch.training.evaluate import sums
from bigbatch.training.prepare import prepare
from bigbatch.training.updates import fit

EXAMPLES = 200
RNG = np.random.default_rng(0)
ARRAYS = {
    "x": RNG.normal(size=(EXAMPLES, 4)).astype(np.float32),
    "y": RNG.normal(size=(EXAMPLES, 2)).astype(np.float32),
    "weight": RNG.integers(0, 4, size=EXAMPLES).astype(np.float32),
}


def task():
    def loss(outputs, examples):
        weight = examples["weight"]
        assert "key" not in examples, "nobody asked for keys"
        # Inputs are float32, parameters and so all arithmetic float64.
        error = jnp.sum(jnp.square(outputs - examples["y"]), axis=1)
        return {"loss": jnp.sum(weight * error), "count": jnp.sum(weight)}

    return Task(
        init=lambda key: ({"kernel": jnp.zeros((4, 2))}, {}),
        apply=lambda params, statistics, examples, train: (examples["x"] @ params["kernel"], {}),
        loss=loss,
    )


def plan():
    recipe = bigbatch.step_decay(0.05, 10, 0.9, boundaries_epochs=[1, 2], factor=0.3)
    growing = bigbatch.grow_batch(recipe, max_batch_size=70)
    return bigbatch.make_plan(growing, train_examples=EXAMPLES, epochs=3)


def by_numpy(weights):
    """The parameters after the plan: heavy ball on the weighted mean of each update's examples."""
    kernel, velocity = np.zeros((4, 2)), np.zeros((4, 2))
    for update in range(plan().num_updates):
        row = plan().row(update)
        index = stream.indices(EXAMPLES, 7, row.first_example, row.batch_size)
        x, y, w = (a[index].astype(float) for a in (ARRAYS["x"], ARRAYS["y"], weights[:, None]))
        gradient = x.T @ (2 * w * (x @ kernel - y)) / w.sum()
        velocity = row.hyper["momentum"] * velocity + gradient
        kernel = kernel - row.hyper["learning_rate"] * velocity
    return kernel


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("weighted", [True, False])
def test_weighted_examples_are_trained_as_in_a_plain_loop(devices, weighted):
    assert set(plan().batch_sizes.tolist()) == {10, 33, 70}
    names = ["x", "y", "weight"] if weighted else ["x", "y"]
    with jax.enable_x64(True):
        run = prepare(
            task(),
            {name: ARRAYS[name] for name in names},
            plan(),
            Momentum(),
            microbatch_examples_per_device=8,
            seed=7,
            mesh=step.data_mesh(jax.devices()[:devices]),
        )
        state = fit(run)
        kernel = jax.device_get(state.params["kernel"])
        weights = ARRAYS["weight"] if weighted else np.ones(EXAMPLES)
        np.testing.assert_allclose(kernel, by_numpy(weights), rtol=1e-10, atol=1e-12)
        test = {name: ARRAYS[name][:77] for name in names}
        found = sums(run, state, test)
    error = np.sum((test["x"] @ kernel - test["y"]) ** 2, axis=1)
    np.testing.assert_allclose(found["loss"], weights[:77] @ error, rtol=1e-10)
    assert found["count"] == weights[:77].sum()


class OwnNetwork(nn.Module):
    """A network of one's own, with the package's norm layer."""

    ghost_batch_examples: int = 8
    dtype: jnp.dtype = jnp.dtype("float64")

    @nn.compact
    def __call__(self, x, *, train):
        dense = functools.partial(nn.Dense, param_dtype=self.dtype)
        x = dense(6)(x.reshape(len(x), -1))
        norm = GhostNorm(self.ghost_batch_examples, axis_name=step.DATA_AXIS)
        return dense(3)(nn.tanh(norm(x, train=train)))


def test_a_flax_module_of_ones_own_trains_alike_on_any_devices():
    rng = np.random.default_rng(3)
    arrays = {
        "image": rng.integers(0, 256, size=(EXAMPLES, 4, 4, 1)).astype(np.uint8),
        "label": rng.integers(0, 3, size=EXAMPLES).astype(np.int32),
    }
    recipe = bigbatch.constant(0.1, 24, 0.9)
    plan = bigbatch.make_plan(recipe, train_examples=EXAMPLES, epochs=1, batch_multiple_examples=8)
    found = []
    with jax.enable_x64(True):
        task = image_classification(OwnNetwork(), (4, 4, 1), (128.0,), (74.0,))
        for devices, share in ((1, 8), (4, 8), (4, 4)):
            run = prepare(
                task,
                arrays,
                plan,
                Momentum(),
                ghost_batch_examples=8,
                microbatch_examples_per_device=share,
                mesh=step.data_mesh(jax.devices()[:devices]),
            )
            state = fit(run)
            found.append(jax.device_get((state.params, state.running_statistics)))
    for other in found[1:]:
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-10), other, found[0]
        )


@pytest.mark.parametrize(
    ("arrays", "optimizer", "fields"),
    [
        (
            {"y": ARRAYS["y"][:-1], "weight": ARRAYS["weight"][:-2]},
            Adam(),
            ["train.y", "train.weight"],
        ),
        ({}, Adam(), ["policy.momentum"]),
    ],
)
def test_arrays_and_optimizers_that_do_not_fit_the_plan_are_all_named(arrays, optimizer, fields):
    with pytest.raises(UserError) as error:
        prepare(task(), ARRAYS | arrays, plan(), optimizer, microbatch_examples_per_device=8)
    assert [p.field for p in error.value.problems] == fields
