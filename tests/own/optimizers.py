"""Optax optimizers of one's own: functions of the plan's columns, by name."""

import jax
import jax.numpy as jnp
import optax

import bigbatch as bb
from tests.own.regression import points, squared_error


def two_rates(learning_rate, weight_decay=1e-4):
    each = {"kernel": optax.adamw(learning_rate, weight_decay=weight_decay)}
    each["vector"] = optax.sgd(0.1 * learning_rate)
    return optax.multi_transform(each, {"hidden": "kernel", "bias": "vector", "out": "vector"})


OPTIMIZERS = {
    "muon": lambda learning_rate: optax.contrib.muon(learning_rate),
    "lion": lambda learning_rate: optax.lion(0.1 * learning_rate),
    "adafactor": lambda learning_rate: optax.adafactor(learning_rate),
    "schedule_free": lambda learning_rate: optax.contrib.schedule_free_sgd(learning_rate),
    "two_rates": two_rates,
    "clipped": lambda learning_rate: optax.chain(
        optax.clip_by_global_norm(1.0), optax.inject_hyperparams(optax.sgd)(learning_rate, 0.9)
    ),
}


def init(key):
    hidden = jax.random.normal(key, (3, 16)) / 2
    return {"hidden": hidden, "bias": jnp.zeros(16), "out": jnp.ones(16) / 16}, {}


def apply(params, statistics, examples, train):
    return jnp.tanh(examples["x"] @ params["hidden"] + params["bias"]) @ params["out"], {}


def prepare(name="muon", **options):
    task = bb.Task(init, apply, squared_error)
    data = bb.Data(points(320, seed=0), test=points(100, seed=1))
    recipe = bb.grow_batch(bb.step_decay(0.01, 16, 0.0, boundaries_epochs=[1, 2], factor=0.5))
    plan = bb.make_plan(recipe, train_examples=320, epochs=3)
    settings = {"microbatch_examples_per_device": 32, **options}
    return bb.prepare(task, data, plan, OPTIMIZERS[name], **settings)
