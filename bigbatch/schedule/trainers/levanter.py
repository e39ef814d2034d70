"""levanter: `trainer.train_batch_size` and `optimizer`, both counted in updates."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bigbatch.checks import Checks
from bigbatch.schedule.noise_scale import Array
from bigbatch.schedule.plan import Plan
from bigbatch.schedule.policy import Policy
from bigbatch.schedule.trainers.curve import curves
from bigbatch.schedule.trainers.recipe import (
    Recipe,
    check_stages,
    course,
    fields,
    in_updates,
    tree_of,
)

_STYLES = ("constant", "cosine", "linear")
_TRAINER = {"train_batch_size": (int | list, ...), "num_train_steps": (int, ...)}
_OPTIMIZER = {
    "learning_rate": (float, ...),
    "lr_schedule": (_STYLES, "cosine"),
    "min_lr_ratio": (float, 0.1),
    "warmup": (float, 0.01),
    "decay": (float, None),
}
_STEP = {"start": (int, ...), "value": (int, ...)}


def levanter(config: dict[str, Any] | str, *, train_examples: int) -> Policy:
    """The recipe of a levanter config.

    Args:
      config: `trainer` and `optimizer` with the fields of the schedule alone, as a mapping, as
        YAML, or as the path of a file of YAML.
      train_examples: size N of the training set (context).

    Raises:
      UserError: a field is unknown, missing, or out of its range.
    """
    return read(config).policy(train_examples)


def read(config: str | Mapping[str, Any], ranks: int = 1, sequence_length: int = 1) -> Recipe:
    """As `levanter`, for any training set."""
    checks = Checks()
    groups = {"trainer": (Mapping, ...), "optimizer": (Mapping, ...)}
    tree = fields(checks, tree_of(config), groups)
    checks.done()
    trainer = fields(checks, tree["trainer"], _TRAINER, "trainer.")
    f = fields(checks, tree["optimizer"], _OPTIMIZER, "optimizer.")
    given = trainer["train_batch_size"]
    steps = given if isinstance(given, list) else [{"start": 0, "value": given}]
    stages = [fields(checks, step, _STEP, "trainer.train_batch_size.") for step in steps]
    checks.done()
    starts = [stage["start"] for stage in stages]
    sizes = [stage["value"] for stage in stages]
    check_stages(checks, "trainer.train_batch_size", starts, sizes)
    updates = trainer["num_train_steps"]
    checks.whole("trainer.num_train_steps", updates, "updates, at least 1")
    for name in ("warmup", "decay"):
        value = f[name] or 0.0
        allowed = "a share of the updates up to 1, or more than one update"
        whole = value <= 1 or value % 1 == 0
        checks.require(whole, f"optimizer.{name}", value, allowed, round(value))
    checks.done()
    warmup, decay = (
        min(updates, int(value * updates if value <= 1 else value))
        for value in (f["warmup"], 1.0 if f["decay"] is None else f["decay"])
    )
    decay = min(decay, updates - warmup)
    peak, style = f["learning_rate"], f["lr_schedule"]

    def rate(positions: Array, done: Array, batch_sizes: Array) -> Array:
        at = warmup, updates - decay, updates
        return course(done, style, peak, 0.0, peak * f["min_lr_ratio"], at)

    return in_updates(starts, sizes, updates, warmup, rate)


def write(plan: Plan, ranks: int, sequence_length: int) -> Iterator[str]:
    """The config's two groups, as YAML."""
    updates = plan.num_updates
    steps = ", ".join(f"{{start: {s.first_update}, value: {s.batch_size}}}" for s in plan.stages)
    trainer = f"trainer:\n  num_train_steps: {updates}\n  train_batch_size: [{steps}]\n"
    for curve in curves(np.arange(updates) * 1.0, plan.hypers["learning_rate"], _STYLES[1:]):
        decay = min(updates, max(0, updates - round(curve.start)))
        # Up to 1 it is a share of the updates: 1 itself would be all of them.
        one = {1: 1.5 / updates}
        optimizer = {
            "learning_rate": curve.peak,
            "lr_schedule": curve.style,
            "min_lr_ratio": curve.floor / curve.peak,
            "warmup": one.get(round(curve.warmup), round(curve.warmup)),
            "decay": one.get(decay, decay),
        }
        lines = "".join(f"  {name}: {json.dumps(value)}\n" for name, value in optimizer.items())
        yield f"{trainer}optimizer:\n{lines}"
