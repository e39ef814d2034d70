"""A memory-mapped file of tokens, far larger than memory need be: only what is shown is read."""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import bigbatch as bb

LENGTH = 128


class Bigram(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.out = nnx.Embed(32, 16, rngs=rngs), nnx.Linear(16, 32, rngs=rngs)

    def __call__(self, tokens):
        return self.out(self.embed(tokens % 32))


def next_token(logits, examples):
    weight = examples["weight"][:, None] * jnp.ones(LENGTH - 1)
    targets = examples["tokens"][:, 1:] % 32
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], targets)
    return {"loss": jnp.sum(weight * losses), "count": jnp.sum(weight)}


def prepare(path, epochs=1.0, **options):
    tokens = np.memmap(path, np.uint16, mode="r").reshape(-1, LENGTH)
    task, data = bb.Task.from_nnx(Bigram, next_token), bb.Data({"tokens": tokens})
    plan = bb.make_plan(bb.constant(0.1, 64, 0.0), train_examples=len(tokens), epochs=epochs)
    settings = {"microbatch_examples_per_device": 64, **options}
    return bb.prepare(task, data, plan, bb.Sgd(), **settings)
