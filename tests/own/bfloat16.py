"""Parameters in bfloat16: sums and the optimizer's state are float32, masters where asked."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

import bigbatch as bb


class Network(nnx.Module):
    def __init__(self, rngs):
        kinds = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        self.hidden = nnx.Linear(8, 32, rngs=rngs, **kinds)
        self.out = nnx.Linear(32, 4, rngs=rngs, **kinds)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x))).astype(jnp.float32)


def labelled(examples, seed):
    x = np.random.default_rng(seed).normal(size=(examples, 8)).astype(np.float32)
    return {"x": x, "label": np.argmax(x[:, :4], axis=1)}


def prepare(**options):
    data = bb.Data(labelled(320, seed=0), test=labelled(100, seed=1))
    task = bb.Task.from_nnx(Network, bb.cross_entropy_sums, metrics={"accuracy": "correct"})
    recipe = bb.grow_batch(bb.step_decay(0.01, 16, 0.0, boundaries_epochs=[1, 2], factor=0.5))
    plan = bb.make_plan(recipe, train_examples=320, epochs=3)
    settings = {"microbatch_examples_per_device": 32, **options}
    return bb.prepare(task, data, plan, bb.AdamW(), **settings)
