"""Megatron-LM: its flags for the batch size and the learning rate.

Both follow the examples consumed. `--step-batch-size-schedule` has thresholds in tokens. Its
forerunner `--rampup-batch-size` knows equal steps only, and versions after core 0.16 accept it and
ignore it.
"""

import math
import shlex
from collections.abc import Iterator
from typing import Any

import numpy as np

from bigbatch.checks import Checks
from bigbatch.schedule.noise_scale import Array
from bigbatch.schedule.plan import Plan
from bigbatch.schedule.policy import Policy
from bigbatch.schedule.trainers.curve import curves, ramp
from bigbatch.schedule.trainers.recipe import Recipe, check_stages, fields

_DECAYS = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
_WSD_STYLES = ("exponential", "linear", "cosine", "minus_sqrt")
_FLAGS = {
    "seq-length": (int, None),
    "step-batch-size-schedule": (str, None),
    "rampup-batch-size": (list, None),
    "global-batch-size": (int, None),
    "train-samples": (int, None),
    "train-iters": (int, None),
    "lr": (float, ...),
    "min-lr": (float, 0.0),
    "lr-decay-style": (_DECAYS, "linear"),
    "lr-decay-samples": (int, None),
    "lr-decay-iters": (int, None),
    "lr-warmup-init": (float, 0.0),
    "lr-warmup-samples": (int, 0),
    "lr-warmup-iters": (int, 0),
    "lr-warmup-fraction": (float, None),
    "lr-wsd-decay-style": (_WSD_STYLES, "exponential"),
    "lr-wsd-decay-samples": (int, None),
    "lr-wsd-decay-iters": (int, None),
    "optimizer": (("adam", "sgd"), "adam"),
    "sgd-momentum": (float, 0.9),
}
_THOUSANDS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


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


def read(flags: str) -> Recipe:
    """As `megatron`, for any training set."""
    checks = Checks()
    f = fields(checks, _parsed(checks, flags), _FLAGS, "--")
    in_iters, size = f["train-iters"] is not None, f["global-batch-size"]
    stepped, ramped = f["step-batch-size-schedule"], f["rampup-batch-size"]
    checks.done()
    for one, other, allowed in (
        ("train-iters", "train-samples", "one of them alone"),
        ("step-batch-size-schedule", "rampup-batch-size", "one of them alone"),
        ("step-batch-size-schedule", "global-batch-size", "one of them alone"),
        ("train-iters", "step-batch-size-schedule", "--train-samples where the batch size changes"),
        ("train-iters", "rampup-batch-size", "--train-samples where the batch size changes"),
        ("lr-warmup-fraction", "lr-warmup-samples", "one of them alone"),
        ("lr-warmup-fraction", "lr-warmup-iters", "one of them alone"),
        *((f"train-{a}", f"lr-{part}-{b}", f"--lr-{part}-{a} with --train-{a}")
          for a, b in (("iters", "samples"), ("samples", "iters"))
          for part in ("decay", "warmup", "wsd-decay")),
    ):  # fmt: skip
        both = {f"--{name}": f[name] for name in (one, other)}
        checks.require(not all(both.values()), f"--{other}", both, allowed)
    length = f["train-iters"] or f["train-samples"]
    allowed = "the length of the run: --train-samples or, with one batch size, --train-iters"
    checks.require(bool(length), "--train-samples", "nothing", allowed)
    if not stepped:
        checks.require(bool(size), "--global-batch-size", "nothing", "examples of an update")
    checks.done()
    if stepped:
        starts, sizes = _steps(checks, stepped, f["seq-length"])
    else:
        starts, sizes = _ramp(checks, ramped, size) if ramped else ([0], [size])
    check_stages(checks, "--step-batch-size-schedule", starts, sizes)
    checks.done()
    unit = size if in_iters else 1
    suffix = "iters" if in_iters else "samples"
    decay = (f[f"lr-decay-{suffix}"] or length) * unit
    warmup = f[f"lr-warmup-{suffix}"] * unit
    if f["lr-warmup-fraction"] is not None:
        warmup = f["lr-warmup-fraction"] * decay
    wsd = f[f"lr-wsd-decay-{suffix}"]
    allowed = "the length of the decay at the end, with --lr-decay-style WSD"
    checks.require(
        (f["lr-decay-style"] == "WSD") == bool(wsd), f"--lr-wsd-decay-{suffix}", wsd, allowed
    )
    checks.require(warmup < decay, f"--lr-warmup-{suffix}", warmup, f"below the decay's {decay}")
    checks.number("--min-lr", f["min-lr"], "at most --lr", at_most=f["lr"])
    checks.done()
    momentum = f["sgd-momentum"] if f["optimizer"] == "sgd" else 0.0

    def rate(positions: Array, updates: Array, batch_sizes: Array) -> Array:
        return _rate(positions, f, warmup, decay, (wsd or 1) * unit)

    end, turning = length * unit, (float(warmup),)
    return Recipe(starts, sizes, rate, end, momentum, turning, leaves_last_out=not stepped)


def _parsed(checks: Checks, flags: str) -> dict[str, Any]:
    """The values by flag."""
    found: dict[str, list[str]] = {}
    words: list[str] = []
    try:
        parts = shlex.split(flags.replace("\\\n", " "))
    except ValueError as error:
        checks.require(False, "flags", flags, f"flags as a shell reads them ({error})")
        parts = []
    for part in parts:
        if part.startswith("--"):
            name, equals, value = part[2:].partition("=")
            checks.require(name not in found, f"--{name}", part, "each flag once")
            words = found[name] = [value] if equals else []
        else:
            checks.require(bool(found), "flags", part, "flags, which begin with --")
            words.append(part)
    values: dict[str, Any] = {}
    for name, given in found.items():
        is_list = name == "rampup-batch-size"
        checks.require(is_list or len(given) == 1, f"--{name}", given, "one value")
        values[name] = given if is_list else " ".join(given)
    return values


def _steps(checks: Checks, text: str, sequence_length: int | None) -> tuple[list[int], list[int]]:
    """Thresholds in examples and batch sizes."""
    field = "--step-batch-size-schedule"
    allowed = "the tokens of an example: the thresholds are in tokens (1 where an example is one)"
    checks.require(bool(sequence_length), "--seq-length", sequence_length or "nothing", allowed)
    pairs = []
    for entry in text.replace(",", " ").split():
        try:
            pairs.append([_number(part) for part in entry.split(":")])
            ok = len(pairs[-1]) == 2
        except (ValueError, OverflowError):
            ok = False
        checks.require(ok, field, entry, "THRESHOLD:SIZE, with K, M, B, T for thousands")
    checks.done()
    pairs.sort()
    return [start // (sequence_length or 1) for start, _ in pairs], [size for _, size in pairs]


def _number(text: str) -> int:
    digits = text.upper().rstrip("KMBT")
    return int(float(digits) * _THOUSANDS.get(text.upper()[len(digits) :] or "", 1))


def _ramp(checks: Checks, given: list[str], last: int) -> tuple[list[int], list[int]]:
    field = "--rampup-batch-size"
    allowed = "three whole numbers: the first size, the increment, and the samples of the ramp"
    checks.require(len(given) == 3 and all(g.isdecimal() for g in given), field, given, allowed)
    checks.done()
    first, increment, samples = map(int, given)
    way = last - first
    allowed = f"an increment that is a whole share of the way from {first} to {last}"
    ok = increment > 0 and way > 0 and way % increment == 0 and samples > 0 and first > 0
    checks.require(ok, field, given, allowed)
    checks.done()
    each = samples / (way // increment)
    starts = [0]
    for i in range(1, way // increment + 1):
        # Divided as it is there, in floats.
        near = range(max(0, math.floor(i * each) - 1), math.floor(i * each) + 3)
        starts.append(next(position for position in near if int(position / each) >= i))
    starts[-1] = min(starts[-1], samples + 1)
    kept = [i for i, start in enumerate(starts) if starts[i + 1 : i + 2] != [start]]
    return [starts[i] for i in kept], [first + i * increment for i in kept]


def _rate(positions: Array, f: dict[str, Any], warmup: float, decay: int, wsd: int) -> Array:
    """Its learning rate at a number of examples consumed."""
    peak, floor, style = f["lr"], f["min-lr"], f["lr-decay-style"]
    p = np.minimum(positions, decay)
    done = (p - warmup) / (decay - warmup)
    if style == "WSD":
        done, style = np.clip((p - (decay - wsd)) / wsd, 0, 1), f["lr-wsd-decay-style"]
    with np.errstate(invalid="ignore", divide="ignore"):
        left = {
            "constant": lambda: np.ones_like(p),
            "linear": lambda: 1.0 - done,
            "cosine": lambda: 0.5 * (np.cos(np.pi * done) + 1.0),
            "exponential": lambda: 2.0 * 0.5**done - 1.0,
            "minus_sqrt": lambda: 1.0 - np.sqrt(done),
            "inverse-square-root": lambda: np.ones_like(p),
        }[style]()
    rates = floor + (peak - floor) * left
    if style == "inverse-square-root":
        rates = np.maximum(floor, peak * np.sqrt(max(warmup, 1)) / np.sqrt(np.maximum(p, 1)))
    rates = np.where((positions > decay) & (style != "constant"), floor, rates)
    first = f["lr-warmup-init"]
    rising = first + (peak - first) * positions / (warmup or 1)
    return np.where((positions <= warmup) & (warmup > 0), rising, rates)


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


def run(text: str, plan: Plan, ranks: int, sequence_length: int) -> Plan:
    """What the trainer does with a text, on the training set of a plan."""
    return read(text).plan(plan.train_examples)
