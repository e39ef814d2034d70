"""Megatron-LM: its flags for the batch size and the learning rate.

Both follow the examples consumed. `--step-batch-size-schedule` has thresholds in tokens. Its
forerunner `--rampup-batch-size` knows equal steps only, and versions after core 0.16 accept it and
ignore it.
"""

import itertools
import math
import re
import shlex
from collections.abc import Iterator
from typing import Any

import numpy as np

from bigbatch.checks import Checks
from bigbatch.schedule.noise_scale import Array
from bigbatch.schedule.plan import Plan
from bigbatch.schedule.policy import Policy
from bigbatch.schedule.trainers.curve import curves, ramp
from bigbatch.schedule.trainers.recipe import Recipe, check_stages, course, fields

_DECAYS = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
_WSD_STYLES = ("exponential", "linear", "cosine", "minus_sqrt")
_FLAGS: dict[str, tuple[Any, Any]] = {
    "step-batch-size-schedule": (str, None),
    "rampup-batch-size": (list, None),
    "lr": (float, ...),
    "min-lr": (float, 0.0),
    "lr-decay-style": (_DECAYS, "linear"),
    "lr-warmup-init": (float, 0.0),
    "lr-warmup-fraction": (float, None),
    "lr-wsd-decay-style": (_WSD_STYLES, "exponential"),
    "optimizer": (("adam", "sgd"), "adam"),
    "sgd-momentum": (float, 0.9),
    "seq-length": (int, None),
    "global-batch-size": (int, None),
}
for _part in ("train", "lr-decay", "lr-warmup", "lr-wsd-decay"):
    _FLAGS |= {f"{_part}-samples": (int, None), f"{_part}-iters": (int, None)}
_NUMBER = r"(\d+\.?\d*(?:E\d{1,2})?)([KMBT]?)"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def megatron(flags: str, *, train_examples: int) -> Policy:
    """The recipe of Megatron-LM's flags.

    Args:
      flags: those of the schedule, as on its command line. Other flags are refused, so that none
        of a schedule is passed over.
      train_examples: size N of the training set (context).

    Raises:
      UserError: a flag is unknown, of the wrong kind, missing, or contradicts another.
    """
    return read(flags).policy(train_examples)


def read(flags: str, ranks: int = 1, sequence_length: int = 1) -> Recipe:
    """As `megatron`, for any training set."""
    checks = Checks()
    f = fields(checks, _parsed(checks, flags), _FLAGS, "--")
    checks.done()
    unit, other_unit = "iters", "samples"
    if f["train-iters"] is None:
        unit, other_unit = other_unit, unit
    stepped, ramped, size = (
        f[name] for name in ("step-batch-size-schedule", "rampup-batch-size", "global-batch-size")
    )
    alone = "one of them alone"
    for one, other, allowed in (
        ("train-iters", "train-samples", alone),
        ("step-batch-size-schedule", "rampup-batch-size", alone),
        ("step-batch-size-schedule", "global-batch-size", alone),
        ("train-iters", "step-batch-size-schedule", "--train-samples where the batch size changes"),
        ("train-iters", "rampup-batch-size", "--train-samples where the batch size changes"),
        ("lr-warmup-fraction", "lr-warmup-samples", alone),
        ("lr-warmup-fraction", "lr-warmup-iters", alone),
        *(
            (f"train-{unit}", f"lr-{part}-{other_unit}", f"--lr-{part}-{unit} with --train-{unit}")
            for part in ("decay", "warmup", "wsd-decay")
        ),
    ):
        both = {f"--{name}": f[name] for name in (one, other)}
        checks.require(not all(both.values()), f"--{other}", both, allowed)
    length = f[f"train-{unit}"]
    allowed = "the length of the run: --train-samples or, with one batch size, --train-iters"
    checks.require(bool(length), "--train-samples", "nothing", allowed)
    sized = bool(stepped or size)
    checks.require(sized, "--global-batch-size", "nothing", "examples of an update")
    checks.done()
    stages = {0: size}
    if stepped:
        stages = _steps(checks, stepped, f["seq-length"])
    elif ramped:
        stages = _ramp(checks, ramped, size)
    starts, sizes = [*stages], [*stages.values()]
    check_stages(checks, "--step-batch-size-schedule", starts, sizes)
    each = size if unit == "iters" else 1
    decay, warmup = (f[f"lr-decay-{unit}"] or length) * each, (f[f"lr-warmup-{unit}"] or 0) * each
    if f["lr-warmup-fraction"] is not None:
        warmup = f["lr-warmup-fraction"] * decay
    wsd, style = f[f"lr-wsd-decay-{unit}"], f["lr-decay-style"]
    allowed = "the length of the decay at the end, with --lr-decay-style WSD"
    checks.require((style == "WSD") == bool(wsd), f"--lr-wsd-decay-{unit}", wsd, allowed)
    checks.require(warmup < decay, f"--lr-warmup-{unit}", warmup, f"below the decay's {decay}")
    peak, floor, first = f["lr"], f["min-lr"], f["lr-warmup-init"]
    for name in ("min-lr", "lr-warmup-init"):
        checks.number(f"--{name}", f[name], "at most --lr", at_most=peak)
    checks.done()
    at, shape = (warmup, warmup, decay), style
    if style == "WSD":
        at, shape = (warmup, decay - wsd * each, decay), f["lr-wsd-decay-style"]

    def rate(positions: Array, updates: Array, batch_sizes: Array) -> Array:
        if style != "inverse-square-root":
            return course(positions, shape, peak, first, floor, at)
        falling = np.maximum(floor, peak * np.sqrt(max(warmup, 1) / np.maximum(positions, 1)))
        falling = np.where(positions > decay, floor, falling)
        return np.where(
            positions < warmup, course(positions, "constant", peak, first, peak, at), falling
        )

    momentum = f["sgd-momentum"] if f["optimizer"] == "sgd" else 0.0
    return Recipe(starts, sizes, rate, length * each, warmup, momentum, not stepped)


def _parsed(checks: Checks, flags: str) -> dict[str, Any]:
    """The values by flag."""
    words: list[str] = []
    try:
        words = shlex.split(flags.replace("\\\n", " "))
    except (ValueError, OverflowError) as error:
        checks.require(False, "flags", flags, f"flags as a shell reads them ({error})")
    places = [i for i, word in enumerate(words) if word.startswith("--")]
    checks.require(places[:1] in ([0], words), "flags", flags, "flags, which begin with --")
    values: dict[str, Any] = {}
    for start, end in itertools.pairwise([*places, len(words)]):
        name, equals, value = words[start][2:].partition("=")
        given = [value] * bool(equals) + words[start + 1 : end]
        is_list = name == "rampup-batch-size"
        checks.require(name not in values, f"--{name}", given, "each flag once")
        checks.require(is_list or len(given) == 1, f"--{name}", given, "one value")
        values[name] = given if is_list else " ".join(given)
    return values


def _steps(checks: Checks, text: str, sequence_length: int | None) -> dict[int, int]:
    """Batch sizes by where they start, in examples."""
    allowed = "the tokens of an example: the thresholds are in tokens (1 where an example is one)"
    checks.require(bool(sequence_length), "--seq-length", sequence_length or "nothing", allowed)
    stages = {}
    for entry in text.replace(",", " ").split():
        found = re.fullmatch(f"{_NUMBER}:{_NUMBER}", entry.upper())
        allowed = "THRESHOLD:SIZE, with K, M, B, T for thousands"
        if checks.require(bool(found), "--step-batch-size-schedule", entry, allowed) and found:
            start, one, size, other = found.groups()
            at = int(float(start) * _UNITS[one]) // (sequence_length or 1)
            allowed = f"another threshold than {at}"
            checks.require(at not in stages, "--step-batch-size-schedule", entry, allowed)
            stages[at] = int(float(size) * _UNITS[other])
    checks.done()
    return dict(sorted(stages.items()))


def _ramp(checks: Checks, given: list[str], last: int) -> dict[int, int]:
    """Batch sizes by where they start, in examples."""
    field = "--rampup-batch-size"
    allowed = "three whole numbers: the first size, the increment, and the samples of the ramp"
    checks.require(len(given) == 3 and all(g.isdecimal() for g in given), field, given, allowed)
    checks.done()
    first, increment, samples = map(int, given)
    count, rest = divmod(last - first, increment or 1)
    allowed = f"an increment that is a whole share of the way from {first} to {last}"
    ok = min(increment, count, samples, first) > 0 and not rest
    checks.require(ok, field, given, allowed)
    checks.done()
    stages, each = {0: first}, samples / count
    for i in range(1, count + 1):
        # Divided as it is there, in floats; past the samples it is the last size.
        near = itertools.count(max(0, math.floor(i * each) - 1))
        start = next(position for position in near if int(position / each) >= i)
        stages[min(start, samples + 1) if i == count else start] = first + i * increment
    return stages


def write(plan: Plan, ranks: int, sequence_length: int) -> Iterator[str]:
    """The flags, with `--step-batch-size-schedule`."""
    steps = " ".join(f"{s.first_example * sequence_length}:{s.batch_size}" for s in plan.stages)
    size = f'--seq-length {sequence_length} --step-batch-size-schedule "{steps}"'
    return _written(plan, [size])


def write_ramp(plan: Plan, ranks: int, sequence_length: int) -> Iterator[str]:
    """The flags, with `--rampup-batch-size`, as versions up to core 0.16 take them."""
    first, most = int(plan.batch_sizes[0]), int(plan.batch_sizes.max())
    ramps = [
        f"--rampup-batch-size {first} {increment} {samples} --global-batch-size {last}"
        for first, increment, last, samples in (ramp(plan) if most > first else ())
    ]
    return _written(plan, ramps or [f"--global-batch-size {most}"])


def _written(plan: Plan, sizes: list[str]) -> Iterator[str]:
    momentum = float(plan.hypers["momentum"][0])
    tail = f"--optimizer sgd --sgd-momentum {momentum!r}\n" if momentum else ""
    for curve in curves(plan.first_examples, plan.hypers["learning_rate"], tuple(_WSD_STYLES)):
        warmup, start, end = (round(time) for time in (curve.warmup, curve.start, curve.end))
        end = max(end, warmup + 1, plan.num_examples if curve.style == "constant" else 1)
        rate = f"--lr {curve.peak!r} --min-lr {curve.floor!r} --lr-decay-samples {end}"
        if warmup:
            rate += f" --lr-warmup-samples {warmup} --lr-warmup-init {curve.first!r}"
        is_plain = curve.style == "constant" or abs(start - warmup) <= 1
        styles = [f" --lr-decay-style {curve.style}"] if is_plain and curve.style in _DECAYS else []
        if curve.style != "constant":
            wsd = f" --lr-decay-style WSD --lr-wsd-decay-style {curve.style}"
            styles.append(f"{wsd} --lr-wsd-decay-samples {max(1, end - start)}")
        for style in styles:
            for size in sizes:
                yield f"{size} \\\n--train-samples {plan.num_examples} \\\n{rate}{style}\n{tail}"
