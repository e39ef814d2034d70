"""OLMo-core: the callback for batch sizes, which moves the learning rate too, and its schedulers.

Batch sizes and times are in tokens. The callback multiplies the base learning rate by the root of
each ratio of batch sizes; the ratios must be whole. A batch size that rises waits until the batches
done are a multiple of the ratio. The learning rate of an update is that of the time after it.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bigbatch.checks import Checks
from bigbatch.schedule.noise_scale import Array
from bigbatch.schedule.plan import Plan
from bigbatch.schedule.policy import Policy
from bigbatch.schedule.trainers.curve import curves
from bigbatch.schedule.trainers.recipe import Recipe, check_stages, fields, tree_of

_FIELDS = {
    "batch_sizes": (list, ...),
    "schedule": (list, ...),
    "max_duration": (Mapping, ...),
    "lr": (float, ...),
    "scheduler": (Mapping, {"type": "constant"}),
}
_TOKENS = ("tokens",)
_DURATION = {"value": (int, ...), "unit": (_TOKENS, ...)}
_CURVE = {
    "units": (_TOKENS, ...),
    "warmup": (int, None),
    "warmup_fraction": (float, None),
    "warmup_min_lr": (float, 0.0),
}
_SCHEDULERS: dict[str, dict[str, tuple[Any, Any]]] = {
    "constant": {},
    "constant_with_warmup": _CURVE,
    "wsd": _CURVE
    | {"decay": (int, None), "decay_fraction": (float, None), "decay_min_lr": (float, 0.0)},
    "cos_with_warmup": _CURVE | {"alpha_f": (float, 0.1), "t_max": (int, None)},
    "linear_with_warmup": _CURVE | {"alpha_f": (float, 0.1), "t_max": (int, None)},
}  # fmt: skip


def olmo_core(config: dict[str, Any] | str, sequence_length: int, *, train_examples: int) -> Policy:
    """The recipe of OLMo-core's batch size callback and learning-rate scheduler.

    Args:
      config: `batch_sizes` and `schedule` of the callback, `max_duration` of the trainer, `lr` of
        the optimizer and `scheduler` of the train module; as a mapping, as YAML or JSON, or as the
        path of such a file. All times are in tokens.
      sequence_length: tokens of an example.
      train_examples: size N of the training set (context).

    Raises:
      UserError: a field is unknown, missing, or out of its range.
    """
    return read(config, sequence_length).policy(train_examples)


def read(config: str | Mapping[str, Any], sequence_length: int) -> Recipe:
    """As `olmo_core`, for any training set."""
    checks = Checks()
    checks.whole("sequence_length", sequence_length, "tokens of an example, at least 1")
    f = fields(checks, tree_of(config), _FIELDS)
    checks.done()
    given = [fields(checks, each, _DURATION, "schedule.") for each in f["schedule"]]
    end = fields(checks, f["max_duration"], _DURATION, "max_duration.")["value"]
    kind = dict(f["scheduler"])
    name = fields(checks, {"type": kind.pop("type", None)}, {"type": (tuple(_SCHEDULERS), ...)})
    checks.done()
    curve = fields(checks, kind, _SCHEDULERS[name["type"]], "scheduler.")
    thresholds, tokens = [each["value"] for each in given], f["batch_sizes"]
    same = len(thresholds) == len(tokens)
    checks.require(same, "batch_sizes", tokens, f"{len(thresholds)} of them, one a start")
    checks.done()
    for part in ("warmup", "decay"):
        of_both = {field: curve[field] for field in (part, f"{part}_fraction") if field in curve}
        told = [value for value in of_both.values() if value is not None]
        allowed = f"one of scheduler.{part} and scheduler.{part}_fraction"
        if of_both and checks.require(len(told) == 1, f"scheduler.{part}", of_both, allowed):
            whole = curve.get("t_max") or end
            curve[part] = told[0] if curve[part] is not None else round(told[0] * whole)
    for i, size in enumerate(tokens):
        allowed = f"a whole number of tokens, a multiple of the {sequence_length} of an example"
        checks.require(
            isinstance(size, int) and size > 0 and size % sequence_length == 0,
            f"batch_sizes[{i}]", size, allowed,
        )  # fmt: skip
    checks.done()
    for i, (a, b) in enumerate(itertools.pairwise(tokens), 1):
        allowed = f"another size, by a whole ratio to the one before it, {a}"
        whole = a != b and max(a, b) % min(a, b) == 0
        checks.require(whole, f"batch_sizes[{i}]", b, allowed, max(2, round(b / a)) * a)
    check_stages(checks, "schedule", thresholds, tokens)
    checks.done()
    starts, sizes = _reached(
        [-(-threshold // sequence_length) for threshold in thresholds],
        [size // sequence_length for size in tokens],
    )

    def rate(positions: Array, updates: Array, batch_sizes: Array) -> Array:
        base = f["lr"] * np.sqrt(batch_sizes / sizes[0])
        after = (positions + batch_sizes) * sequence_length
        return _rate(name["type"], curve, base, after, end)

    turning = (curve.get("warmup") or 0) / sequence_length
    return Recipe(starts, sizes, rate, -(-end // sequence_length), 0.0, (turning,))


def _reached(thresholds: list[int], sizes: list[int]) -> tuple[list[int], list[int]]:
    """Where each size begins: at an update, and where it grows by a ratio after as many batches."""
    starts, held, batches = [0], [sizes[0]], 0
    for i, (threshold, size) in enumerate(zip(thresholds, sizes, strict=True)):
        last, growth = held[-1], size // held[-1]
        more = max(-(-(threshold - starts[-1]) // last), 0)
        # Its counter of batches is divided by the growth, so it waits until that can be done.
        unit = max(growth, 1)
        done = -(-(batches + more) // unit) * unit
        start = starts[-1] + (done - batches) * last
        # The next threshold may come first: then this size is passed over.
        if i and (i + 1 == len(sizes) or start < thresholds[i + 1]):
            batches = done // growth if growth else done * (last // size)
            starts.append(start)
            held.append(size)
    return starts, held


def _rate(kind: str, f: dict[str, Any], base: Array, after: Array, end: int) -> Array:
    """Its learning rate after a number of tokens."""
    if kind == "constant":
        return base
    warmup, first = f["warmup"], f["warmup_min_lr"]
    rates, is_rising = base, after <= warmup
    if kind == "wsd":
        # Below 0 after the end, to which a last update may lead.
        share = np.minimum((end - after) / max(f["decay"], 1), 1)
        low = f["decay_min_lr"]
        rates = np.where(after >= end - f["decay"], low + (base - low) * share, base)
    elif kind != "constant_with_warmup":
        end, is_rising = f["t_max"] or end, after < warmup
        share = np.clip((after - warmup) / (end - warmup), 0, 1)
        left = 1 - share if kind == "linear_with_warmup" else (1 + np.cos(np.pi * share)) / 2
        rates = base * (f["alpha_f"] + (1 - f["alpha_f"]) * left)
    rising = first + (base - first) * after / max(warmup, 1)
    return np.where(is_rising, rising, rates)


def write(plan: Plan, ranks: int, sequence_length: int) -> Iterator[str]:
    """The fields, as JSON."""
    stages: list[tuple[int, int]] = []
    for stage in plan.stages:
        size, before = stage.batch_size, stages[-1][1] if stages else stage.batch_size
        # The nearest below that has a whole ratio to the size before it.
        size = size // before * before or max(d for d in range(1, size + 1) if before % d == 0)
        if not stages or size != before:
            stages.append((stage.first_example, size))
    tokens = plan.num_examples * sequence_length
    sizes = np.array([size for _, size in stages])
    held = sizes[np.searchsorted([s for s, _ in stages], plan.first_examples, side="right") - 1]
    rates = plan.hypers["learning_rate"] / np.sqrt(held / held[0])
    ends = (plan.first_examples + plan.batch_sizes) * float(sequence_length)
    for curve in curves(ends, rates, ("cosine", "linear")):
        common = {"units": "tokens", "warmup": round(curve.warmup), "warmup_min_lr": curve.first}
        alpha = {"alpha_f": curve.floor / curve.peak, "t_max": round(curve.end)}
        decay = {"decay": round(curve.end - curve.start), "decay_fraction": None}
        schedulers: list[dict[str, Any]] = [{"type": "constant_with_warmup"}]
        if curve.style == "cosine":
            schedulers = [{"type": "cos_with_warmup"} | alpha]
        elif curve.style == "linear":
            schedulers = [
                {"type": "linear_with_warmup"} | alpha,
                {"type": "wsd"} | decay | {"decay_min_lr": curve.floor},
            ]
        for scheduler in schedulers:
            config = {
                "batch_sizes": [size * sequence_length for _, size in stages],
                "schedule": [
                    {"value": start * sequence_length, "unit": "tokens"} for start, _ in stages
                ],
                "max_duration": {"value": tokens, "unit": "tokens"},
                "lr": curve.peak,
                "scheduler": scheduler | common,
            }
            yield (
                "{\n" + ",\n".join(f'  "{k}": {json.dumps(v)}' for k, v in config.items()) + "\n}\n"
            )


def run(text: str, plan: Plan, ranks: int, sequence_length: int) -> Plan:
    """What the trainer does with a text, on the training set of a plan."""
    return read(text, sequence_length).plan(plan.train_examples)
