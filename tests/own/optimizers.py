"""Optax optimizers of one's own, as functions of the plan's columns."""

import optax

import bigbatch as bb
from tests.own import regression


def labels(params):
    return {name: "matrix" if value.ndim > 1 else "vector" for name, value in params.items()}


OPTIMIZERS = {
    "muon": lambda learning_rate: optax.contrib.muon(learning_rate),
    "lion": lambda learning_rate: optax.lion(0.1 * learning_rate),
    "adafactor": lambda learning_rate: optax.adafactor(learning_rate),
    "schedule_free": lambda learning_rate: optax.contrib.schedule_free_sgd(learning_rate),
    "two_rates": lambda learning_rate: optax.multi_transform(
        {"matrix": optax.adam(learning_rate), "vector": optax.sgd(0.1 * learning_rate)}, labels
    ),
    "clipped": lambda learning_rate, weight_decay=1e-4: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, weight_decay=weight_decay)
    ),
}


def prepare(name, **options):
    recipe = bb.grow_batch(bb.step_decay(0.01, 16, 0.0, boundaries_epochs=[1, 2], factor=0.5))
    plan = bb.make_plan(recipe, train_examples=320, epochs=3)
    return regression.prepare(plan=plan, optimizer=OPTIMIZERS[name], hidden=8, **options)
