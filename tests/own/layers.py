"""A network whose layers are whole only while they are computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import bigbatch as bb

WIDTH, LAYERS = 32, 4


def init(key):
    keys = jax.random.split(key, LAYERS)
    layers = [{"kernel": jax.random.normal(k, (WIDTH, WIDTH)) / WIDTH**0.5} for k in keys]
    return {"layers": layers, "out": jnp.zeros(WIDTH)}, {}


@jax.checkpoint
def layer(params, x):
    # In bfloat16 it travels at half the bytes; its gradient travels in float32.
    kernel = bb.whole(params["kernel"], (WIDTH, WIDTH), dtype=jnp.bfloat16)
    return x + jnp.tanh(x.astype(kernel.dtype) @ kernel).astype(x.dtype)


def apply(params, statistics, examples, train):
    x = functools.reduce(lambda x, each: layer(each, x), params["layers"], examples["x"])
    return x @ bb.whole(params["out"], (WIDTH,)), {}


def loss(outputs, examples):
    weight = examples["weight"]
    squares = weight * (outputs - examples["y"]) ** 2
    return {"loss": jnp.sum(squares), "count": jnp.sum(weight)}


def prepare(**options):
    x = np.random.default_rng(0).normal(size=(320, WIDTH)).astype(np.float32)
    recipe = bb.grow_batch(bb.step_decay(0.01, 16, 0.0, boundaries_epochs=[1, 2], factor=0.5))
    plan = bb.make_plan(recipe, train_examples=320, epochs=3)
    settings = {"microbatch_examples_per_device": 2, "shard": {"layer": 4}, **options}
    arrays = {"x": x, "y": np.sin(x[:, 0])}
    return bb.prepare(bb.Task(init, apply, loss), arrays, plan, bb.AdamW(), **settings)
