"""A frozen backbone below a head that is trained: no gradient, no checkpoint, its hash counts."""

import jax
import jax.numpy as jnp

import bigbatch as bb
from tests.own.regression import points, squared_error


def apply(params, statistics, examples, train, frozen):
    return jnp.tanh(examples["x"] @ frozen["backbone"][:3]) @ params["head"], {}


def pretrained(rows=8):
    return jax.random.normal(jax.random.key(1), (rows, 64))


def prepare(backbone=pretrained, **options):
    task = bb.Task(
        init=lambda key: ({"head": jnp.zeros(64)}, {}),
        apply=apply,
        loss=squared_error,
        frozen={"backbone": backbone()},
    )
    data = bb.Data(points(320, seed=0), test=points(100, seed=1))
    recipe = bb.grow_batch(bb.step_decay(0.003, 16, 0.9, boundaries_epochs=[1, 2], factor=0.5))
    plan = bb.make_plan(recipe, train_examples=320, epochs=3)
    settings = {"microbatch_examples_per_device": 32, **options}
    return bb.prepare(task, data, plan, bb.Momentum(), **settings)
