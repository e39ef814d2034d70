"""A regression: pure functions, no network library, no labels and no accuracy."""

import jax.numpy as jnp
import numpy as np

import bigbatch as bb


def squared_error(prediction, examples):
    weight, error = examples["weight"], prediction - examples["y"]
    return {"loss": jnp.sum(weight * error**2), "count": jnp.sum(weight)}


def points(examples, seed):
    x = np.random.default_rng(seed).normal(size=(examples, 3)).astype(np.float32)
    return {"x": x, "y": x @ np.float32([1, 2, 3])}


def prepare(**options):
    task = bb.Task(
        init=lambda key: ({"w": jnp.zeros(3)}, {}),
        apply=lambda params, statistics, examples, train: (examples["x"] @ params["w"], {}),
        loss=squared_error,
    )
    data = bb.Data(points(320, seed=0), test=points(100, seed=1))
    recipe = bb.grow_batch(bb.step_decay(0.01, 16, 0.9, boundaries_epochs=[1, 2], factor=0.5))
    plan = bb.make_plan(recipe, train_examples=320, epochs=3)
    settings = {"microbatch_examples_per_device": 32, **options}
    return bb.prepare(task, data, plan, bb.Momentum(), **settings)
