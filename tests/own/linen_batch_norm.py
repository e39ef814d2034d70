"""A Flax Linen network with Flax's own batch norm."""

import numpy as np
from flax import linen as nn

import bigbatch as bb


class Network(nn.Module):
    @nn.compact
    def __call__(self, image, train):
        x = nn.Conv(8, (3, 3), strides=2)(image / 4)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def digits(examples, seed):
    labels = np.random.default_rng(seed).integers(0, 10, examples)
    noise = np.random.default_rng(seed + 1).normal(size=(examples, 8, 8, 1))
    images = noise + 8 * np.eye(64)[6 * labels].reshape(-1, 8, 8, 1)
    return {"image": np.float32(images), "label": labels}


def prepare(**options):
    data = bb.Data(digits(320, seed=0), test=digits(100, seed=2))
    task = bb.Task.from_linen(Network(), bb.cross_entropy_sums, metrics={"accuracy": "correct"})
    recipe = bb.grow_batch(bb.step_decay(0.05, 16, 0.9, boundaries_epochs=[1, 2], factor=0.5))
    plan = bb.make_plan(recipe, train_examples=320, epochs=3, batch_multiple_examples=16)
    settings = {"ghost_batch_examples": 16, "microbatch_examples_per_device": 32, **options}
    return bb.prepare(task, data, plan, bb.Momentum(), **settings)
