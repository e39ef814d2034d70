"""OLMo-core: the callback for batch sizes, which moves the learning rate too, and its schedulers.

Batch sizes and times are in tokens. The callback multiplies the base learning rate by the root of
each ratio of batch sizes; the ratios must be whole. A batch size that rises waits until the batches
done are a multiple of the ratio. The learning rate of an update is that of the time after it.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bigbatch.checks import Checks
from bigbatch.schedule.noise_scale import Array
from bigbatch.schedule.plan import Plan
from bigbatch.schedule.policy import Policy
from bigbatch.schedule.trainers.curve import curves
from bigbatch.schedule.trainers.recipe import Recipe, check_stages, course, fields, tree_of

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
_WSD = {"decay": (int, None), "decay_fraction": (float, None), "decay_min_lr": (float, 0.0)}
_FALL = {"alpha_f": (float, 0.1), "t_max": (int, None)}
# The style of its decay, and its fields.
_SCHEDULERS: dict[str, tuple[str, dict[str, tuple[Any, Any]]]] = {
    "constant": ("constant", {}),
    "constant_with_warmup": ("constant", _CURVE),
    "wsd": ("linear", _CURVE | _WSD),
    "cos_with_warmup": ("cosine", _CURVE | _FALL),
    "linear_with_warmup": ("linear", _CURVE | _FALL),
}


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
    return read(config, 1, sequence_length).policy(train_examples)


def read(config: str | Mapping[str, Any], ranks: int = 1, sequence_length: int = 1) -> Recipe:
    """As `olmo_core`, for any training set."""
    checks = Checks()
    checks.whole("sequence_length", sequence_length, "tokens of an example, at least 1")
    f = fields(checks, tree_of(config), _FIELDS)
    checks.done()
    thresholds = [fields(checks, each, _DURATION, "schedule.")["value"] for each in f["schedule"]]
    end = fields(checks, f["max_duration"], _DURATION, "max_duration.")["value"]
    kind = dict(f["scheduler"])
    name = fields(checks, {"type": kind.pop("type", None)}, {"type": (tuple(_SCHEDULERS), ...)})
    checks.done()
    style, known = _SCHEDULERS[name["type"]]
    curve, tokens = fields(checks, kind, known, "scheduler."), f["batch_sizes"]
    same = len(thresholds) == len(tokens)
    checks.require(same, "batch_sizes", tokens, f"{len(thresholds)} of them, one a start")
    checks.done()
    is_wsd, stop = name["type"] == "wsd", curve.get("t_max") or end
    for part in ("warmup", "decay"):
        of_both = {field: curve[field] for field in (part, f"{part}_fraction") if field in curve}
        told = [value for value in of_both.values() if value is not None]
        allowed = f"one of scheduler.{part} and scheduler.{part}_fraction"
        if of_both and checks.require(len(told) == 1, f"scheduler.{part}", of_both, allowed):
            curve[part] = told[0] if curve[part] is not None else round(told[0] * stop)
    # It stops in the run where it would divide by 0, or where a base rate is below these.
    checks.require(curve.get("decay", 1) != 0, "scheduler.decay", 0, "at least 1 token")
    for i, size in enumerate(tokens):
        allowed = f"a whole number of tokens, a multiple of the {sequence_length} of an example"
        whole = isinstance(size, int) and size > 0 and size % sequence_length == 0
        checks.require(whole, f"batch_sizes[{i}]", size, allowed)
    checks.done()
    base = f["lr"] * min(tokens) ** 0.5 / tokens[0] ** 0.5
    for part in [part for part in ("warmup_min_lr", "decay_min_lr") if part in curve]:
        allowed = f"below the base learning rate, which is {base:g} at the least"
        checks.require(curve[part] < base, f"scheduler.{part}", curve[part], allowed)
    for i, (a, b) in enumerate(itertools.pairwise(tokens), 1):
        allowed = f"another size, by a whole ratio to the one before it, {a}"
        whole = a != b and max(a, b) % min(a, b) == 0
        checks.require(whole, f"batch_sizes[{i}]", b, allowed, max(2, round(b / a)) * a)
    warmup = curve.get("warmup") or 0
    if style != "constant":
        checks.require(warmup < stop, "scheduler.warmup", warmup, f"below the {stop} of the end")
    check_stages(checks, "schedule", thresholds, tokens)
    starts, sizes = _reached(
        [-(-threshold // sequence_length) for threshold in thresholds],
        [size // sequence_length for size in tokens],
    )
    at = warmup, stop - curve["decay"] if is_wsd else warmup, stop

    def rate(positions: Array, updates: Array, batch_sizes: Array) -> Array:
        peak = f["lr"] * np.sqrt(batch_sizes / sizes[0])
        floor = curve["decay_min_lr"] if is_wsd else curve.get("alpha_f", 1.0) * peak
        after = (positions + batch_sizes) * sequence_length
        # Its wsd goes on below its end, to which a last update may lead.
        most, first = math.inf if is_wsd else 1.0, curve.get("warmup_min_lr", 0.0)
        return course(after, style, peak, first, floor, at, most)

    return Recipe(starts, sizes, rate, -(-end // sequence_length), warmup / sequence_length)


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
    config = {
        "batch_sizes": [size * sequence_length for _, size in stages],
        "schedule": [{"value": s * sequence_length, "unit": "tokens"} for s, _ in stages],
        "max_duration": {"value": tokens, "unit": "tokens"},
    }
    for curve in curves(ends, rates, ("cosine", "linear")):
        common = {"units": "tokens", "warmup": round(curve.warmup), "warmup_min_lr": curve.first}
        alpha = {"alpha_f": curve.floor / curve.peak, "t_max": round(curve.end)}
        decay = {"decay": round(curve.end - curve.start), "decay_fraction": None}
        kinds: dict[str, dict[str, dict[str, Any]]] = {
            "constant": {"constant_with_warmup": {}},
            "cosine": {"cos_with_warmup": alpha},
            "linear": {"linear_with_warmup": alpha, "wsd": decay | {"decay_min_lr": curve.floor}},
        }
        for kind, others in kinds[curve.style].items():
            scheduler = {"type": kind} | others | common
            whole = config | {"lr": curve.peak, "scheduler": scheduler}
            lines = [f'  "{name}": {json.dumps(value)}' for name, value in whole.items()]
            yield "{\n" + ",\n".join(lines) + "\n}\n"
