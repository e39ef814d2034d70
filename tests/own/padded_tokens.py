"""A loss per token, with padding: the loss is divided by the tokens, the noise is per example."""

import math

import jax.numpy as jnp
import numpy as np
import optax

import bigbatch as bb
from tests.own.mapped_tokens import Bigram

SETTINGS = {"microbatch_examples_per_device": 32}


def next_token(logits, examples):
    tokens, length = examples["tokens"], examples["length"]
    mask = (jnp.arange(11) < length[:, None] - 1) * examples["weight"][:, None]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return {"loss": jnp.sum(mask * losses), "count": jnp.sum(mask)}


def perplexity(means):
    return math.exp(means["loss"])


def texts(examples, seed):
    rng = np.random.default_rng(seed)
    tokens = (rng.integers(0, 32, (examples, 1)) + np.arange(12)) % 32
    return {"tokens": np.int32(tokens), "length": np.int32(rng.integers(3, 13, examples))}


def prepare(**options):
    task = bb.Task.from_nnx(Bigram, next_token, metrics={"perplexity": perplexity})
    data = bb.Data(texts(320, seed=0), test=texts(100, seed=1))
    recipe = bb.grow_batch(bb.step_decay(0.5, 16, 0.0, boundaries_epochs=[1, 2], factor=0.5))
    plan = bb.make_plan(recipe, train_examples=320, epochs=3)
    return bb.prepare(task, data, plan, bb.Sgd(), **SETTINGS | options)
