"""Policies: the learning rate, batch size and momentum of a training recipe, as functions of time.

A policy knows no training set and no device. Time is epochs, a real number; the batch size is real
too, until a plan is made. The constructors here are recipes as people write them down; the
functions in `bigbatch.schedule.transform` turn one into another with the same gradient noise.

>>> import numpy as np
>>> paper = step_decay(0.1, 128, 0.9, boundaries_epochs=[60, 120, 160], factor=0.2)
>>> settings = paper.at(np.array([0.0, 60.0]))
>>> settings.hyper["learning_rate"].round(6).tolist()
[0.1, 0.02]
>>> settings.batch_size.tolist()
[128.0, 128.0]

Times may be given in epochs, examples or updates (`bigbatch.schedule.durations`). Two arguments are
context that a config never states: `train_examples` (N) and `epochs` (the length of the run).
"""

from collections.abc import Callable

from bigbatch.schedule.policy.base import Policy, Settings, StatedSize
from bigbatch.schedule.policy.batch_size import batch_ramp, batch_stages, stages
from bigbatch.schedule.policy.from_optax import from_optax, from_optax_name
from bigbatch.schedule.policy.learning_rate import (
    constant,
    cosine,
    exponential,
    polynomial,
    step_decay,
    warmup,
    warmup_stable_decay,
)

__all__ = [
    "POLICIES",
    "Policy",
    "Settings",
    "StatedSize",
    "batch_ramp",
    "batch_stages",
    "constant",
    "cosine",
    "exponential",
    "from_optax",
    "from_optax_name",
    "polynomial",
    "stages",
    "step_decay",
    "warmup",
    "warmup_stable_decay",
]

POLICIES: dict[str, Callable[..., Policy]] = {
    "constant": constant,
    "step_decay": step_decay,
    "exponential": exponential,
    "polynomial": polynomial,
    "cosine": cosine,
    "warmup_stable_decay": warmup_stable_decay,
    "stages": stages,
    "optax": from_optax_name,
}
"""By the name that a config gives them; their keyword parameters are its fields."""
