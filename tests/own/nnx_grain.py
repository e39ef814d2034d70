"""A Flax NNX network with batch norm and dropout, on a Grain data set with a random map."""

import grain
import numpy as np
from flax import nnx

import bigbatch as bb


class Network(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.out = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def example(index):
    x = np.random.default_rng(index).normal(size=8).astype(np.float32)
    return {"x": x, "label": np.int32(np.argmax(x[:4]))}


def jittered(example, rng):
    return {**example, "x": example["x"] + rng.normal(size=8).astype(np.float32) / 10}


def prepare(**options):
    train = grain.MapDataset.range(320).map(example).seed(0).random_map(jittered)
    data = bb.Data(train, test=grain.MapDataset.range(1000, 1100).map(example))
    task = bb.Task.from_nnx(Network, bb.cross_entropy_sums, metrics={"accuracy": "correct"})
    recipe = bb.grow_batch(bb.step_decay(0.1, 16, 0.9, boundaries_epochs=[1, 2], factor=0.5))
    plan = bb.make_plan(recipe, train_examples=320, epochs=3, batch_multiple_examples=16)
    settings = {"ghost_batch_examples": 16, "microbatch_examples_per_device": 32, **options}
    return bb.prepare(task, data, plan, bb.Momentum(), **settings)
