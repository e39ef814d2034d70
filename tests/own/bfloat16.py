"""Parameters in bfloat16: sums and the optimizer's state are float32, masters where asked."""

import jax.numpy as jnp
import optax
from flax import nnx

import bigbatch as bb
from tests.own.nnx_grain import example


class Network(nnx.Module):
    def __init__(self, rngs):
        kinds = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        self.hidden = nnx.Linear(8, 32, rngs=rngs, **kinds)
        self.out = nnx.Linear(32, 4, rngs=rngs, **kinds)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x))).astype(jnp.float32)


class Examples:
    def __init__(self, number):
        self.number = number

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        return example(int(index))


def adamw(learning_rate, weight_decay=1e-4):
    return optax.adamw(learning_rate, weight_decay=weight_decay)


def prepare(**options):
    data = bb.Data(Examples(320), test=Examples(100))
    task = bb.Task.from_nnx(Network, bb.cross_entropy_sums, metrics={"accuracy": "correct"})
    recipe = bb.grow_batch(bb.step_decay(0.01, 16, 0.0, boundaries_epochs=[1, 2], factor=0.5))
    plan = bb.make_plan(recipe, train_examples=320, epochs=3)
    settings = {"microbatch_examples_per_device": 32, **options}
    return bb.prepare(task, data, plan, adamw, **settings)
