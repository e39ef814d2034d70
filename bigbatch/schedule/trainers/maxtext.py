"""MaxText: its ramp of the batch size in examples, and its learning rate in updates."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bigbatch.checks import Checks
from bigbatch.schedule.noise_scale import Array
from bigbatch.schedule.plan import Plan
from bigbatch.schedule.policy import Policy
from bigbatch.schedule.trainers.curve import curves, ramp
from bigbatch.schedule.trainers.recipe import Recipe, course, fields, in_updates, tree_of

_FIELDS = {
    "steps": (int, ...),
    "learning_rate": (float, ...),
    "lr_schedule_type": (("cosine", "wsd"), "cosine"),
    "learning_rate_schedule_steps": (int, None),
    "learning_rate_final_fraction": (float, 0.1),
    "warmup_steps_fraction": (float, 0.1),
    "wsd_decay_steps_fraction": (float, 0.1),
    "wsd_decay_style": (("linear", "cosine"), "linear"),
    "per_device_batch_size": (float, ...),
    "enable_rampup_batch_size": (bool, False),
    "per_device_batch_size_start": (float, 4.0),
    "per_device_batch_size_increment": (float, 2.0),
    "global_rampup_samples": (int, 500),
}


def maxtext(config: dict[str, Any] | str, devices: int, *, train_examples: int) -> Policy:
    """The recipe of a MaxText config.

    Args:
      config: the fields of the schedule alone, as a mapping, as YAML, or as the path of a file of
        YAML. What is left out has the value of MaxText's base.yml.
      devices: for which its batch sizes a device are meant.
      train_examples: size N of the training set (context).

    Raises:
      UserError: a field is unknown, missing, or out of its range.
    """
    return read(config, devices).policy(train_examples)


def read(config: str | Mapping[str, Any], ranks: int = 1, sequence_length: int = 1) -> Recipe:
    """As `maxtext`, for any training set."""
    checks = Checks()
    f = fields(checks, tree_of(config), _FIELDS)
    checks.whole("devices", ranks, "a whole number, at least 1")
    checks.done()
    first, increment, last = (
        int(ranks * f[f"per_device_batch_size{part}"]) for part in ("_start", "_increment", "")
    )
    checks.require(last >= 1, "per_device_batch_size", last, "at least 1 example in all")
    checks.whole("steps", f["steps"], "updates, at least 1")
    starts, sizes = [0], [last]
    if f["enable_rampup_batch_size"]:
        way = last - first
        allowed = f"a whole share, above 0, of the way from {first} to {last} examples in all"
        fits = first > 0 and increment > 0 and way > 0 and way % increment == 0
        checks.require(fits, "per_device_batch_size_increment", increment, allowed)
        checks.done()
        each = f["global_rampup_samples"] / (way // increment)
        for size in range(first, last, increment):
            sizes.insert(-1, size)
            starts.append(starts[-1] + max(1, math.ceil(each / size)))
    updates = f["learning_rate_schedule_steps"] or f["steps"]
    warmup = int(updates * f["warmup_steps_fraction"])
    decay, style = updates - warmup, "cosine"
    if f["lr_schedule_type"] == "wsd":
        decay, style = int(updates * f["wsd_decay_steps_fraction"]), f["wsd_decay_style"]
    allowed = "shares of warm-up and decay that are at most 1 in all"
    checks.require(0 <= decay <= updates - warmup, "warmup_steps_fraction", warmup, allowed)
    checks.done()
    # The last update of the decay has its last value; a line of one update has its first.
    at, is_one = (warmup, updates - decay, updates - 1), style == "cosine" and decay == 1
    peak, floor = f["learning_rate"], f["learning_rate"] * f["learning_rate_final_fraction"]

    def rate(positions: Array, done: Array, batch_sizes: Array) -> Array:
        rates = course(done, style, peak, 0.0, floor, at)
        rates = np.where(is_one & (done == updates - 1), floor, rates)
        return np.where(done < updates, rates, 0.0)

    return in_updates(starts, sizes, f["steps"], warmup, rate)


def write(plan: Plan, ranks: int, sequence_length: int) -> Iterator[str]:
    """The fields, as YAML for `ranks` devices."""
    first, most = int(plan.batch_sizes[0]), int(plan.batch_sizes.max())
    for start, increment, last, samples in (
        ramp(plan, ranks) if most > first else [(most, 0, most, 0)]
    ):
        sizes: dict[str, Any] = {"per_device_batch_size": last / ranks}
        if increment:
            sizes |= {
                "enable_rampup_batch_size": True,
                "per_device_batch_size_start": start / ranks,
                "per_device_batch_size_increment": increment / ranks,
                "global_rampup_samples": samples,
            }
        # Its updates at each example, which the learning rate is to follow.
        seen, done = [0], [0]
        for size in range(start, last, increment or 1):
            done.append(done[-1] + -(-samples * increment // ((last - start) * size)))
            seen.append(seen[-1] + (done[-1] - done[-2]) * size)
        done.append(done[-1] + max(1, -(-(plan.num_examples - seen[-1]) // last)))
        seen.append(seen[-1] + (done[-1] - done[-2]) * last)
        steps = math.ceil(np.interp(plan.num_examples, seen, done))
        times = np.interp(plan.first_examples, seen, done)
        for rate in _rates(times, plan.hypers["learning_rate"], steps):
            yield "".join(f"{n}: {json.dumps(v)}\n" for n, v in (sizes | rate).items())


def _rates(times: Array, rates: Array, steps: int) -> Iterator[dict[str, Any]]:
    for curve in curves(times, rates, ("cosine", "linear")):
        warmup, start = round(curve.warmup), round(curve.start)
        decay = 0 if curve.style == "constant" else round(curve.end) - start + 1
        updates = max(max(start if decay else steps, warmup) + decay, 1)
        yield {
            "steps": steps,
            "learning_rate": curve.peak,
            "learning_rate_schedule_steps": updates,
            "learning_rate_final_fraction": curve.floor / curve.peak,
            # Half an update more, so that it is not rounded down to one less.
            "warmup_steps_fraction": (warmup + 0.5) / updates if warmup else 0.0,
            "lr_schedule_type": "wsd",
            "wsd_decay_steps_fraction": min(1.0, (decay + 0.5) / updates) if decay else 0.0,
            "wsd_decay_style": "linear" if curve.style == "constant" else curve.style,
        }
