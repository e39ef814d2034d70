"""Other trainers' loops over a schedule, update by update, from their sources and documents.

Each takes what a user would give the trainer and returns one (batch size, learning rate, momentum)
an update. They share no code with `bigbatch.schedule.trainers`: they parse by other means, count as
the trainers do, and know no arrays.
"""

import argparse
import ast
import csv
import io
import json
import math
import struct

import yaml


def megatron_args(flags):
    """Its command line, as argparse reads it."""
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    for name in ("seq-length", "global-batch-size", "train-samples", "train-iters"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--step-batch-size-schedule")
    parser.add_argument("--rampup-batch-size", nargs=3, type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--min-lr", type=float, default=0.0)
    parser.add_argument("--lr-decay-style", default="linear")
    parser.add_argument("--lr-wsd-decay-style", default="exponential")
    parser.add_argument("--lr-warmup-init", type=float, default=0.0)
    parser.add_argument("--lr-warmup-fraction", type=float)
    for name in ("samples", "iters"):
        parser.add_argument(f"--lr-decay-{name}", type=int)
        parser.add_argument(f"--lr-warmup-{name}", type=int, default=0)
        parser.add_argument(f"--lr-wsd-decay-{name}", type=int)
    parser.add_argument("--optimizer", default="adam")
    parser.add_argument("--sgd-momentum", type=float, default=0.9)
    words = []
    for i, quoted in enumerate(flags.replace("\\\n", " ").split('"')):
        words += [quoted] if i % 2 else quoted.split()
    return parser.parse_args(words)


def megatron(flags: str, most_updates=200_000):
    """Megatron-LM: training.py's loop, the calculator of microbatches, OptimizerParamScheduler."""
    args = megatron_args(flags)

    def batch_size(consumed):
        if args.step_batch_size_schedule:
            size = None
            for entry in args.step_batch_size_schedule.split():
                threshold, value = entry.split(":")
                if consumed >= tokens(threshold) // args.seq_length:
                    size = tokens(value)
            return size
        if args.rampup_batch_size:
            start, increment, samples = args.rampup_batch_size
            if consumed > samples:
                return args.global_batch_size
            each = samples / ((args.global_batch_size - start) // increment)
            return start + int(consumed / each) * increment
        return args.global_batch_size

    if args.train_iters:
        unit, updates = args.global_batch_size, args.train_iters
        decay = (args.lr_decay_iters or updates) * unit
        warmup, wsd = args.lr_warmup_iters * unit, (args.lr_wsd_decay_iters or 0) * unit
    else:
        decay = args.lr_decay_samples or args.train_samples
        warmup, wsd = args.lr_warmup_samples, args.lr_wsd_decay_samples
        updates = consumed = 0
        while consumed < args.train_samples:
            size = batch_size(consumed)
            if not args.step_batch_size_schedule and consumed + size > args.train_samples:
                break
            consumed += size
            updates += 1
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * decay

    def rate(steps):
        span = args.lr - args.min_lr
        if warmup > 0 and steps <= warmup:
            return args.lr_warmup_init + (args.lr - args.lr_warmup_init) * steps / warmup
        if args.lr_decay_style == "constant":
            return args.lr
        if steps > decay:
            return args.min_lr
        if args.lr_decay_style == "inverse-square-root":
            return max(args.min_lr, args.lr * max(warmup, 1) ** 0.5 / max(steps, 1) ** 0.5)
        done = (steps - warmup) / (decay - warmup)
        if args.lr_decay_style == "linear":
            return args.min_lr + span * (1.0 - done)
        if args.lr_decay_style == "cosine":
            return args.min_lr + span * 0.5 * (math.cos(math.pi * done) + 1.0)
        assert args.lr_decay_style == "WSD"
        if steps <= decay - wsd:
            return args.min_lr + span
        done = (steps - (decay - wsd)) / wsd
        left = {
            "linear": 1.0 - done,
            "cosine": 0.5 * (math.cos(math.pi * done) + 1.0),
            "exponential": 2.0 * math.pow(0.5, done) - 1.0,
            "minus_sqrt": 1.0 - math.sqrt(done),
        }
        return args.min_lr + span * left[args.lr_wsd_decay_style]

    rows, consumed = [], 0
    for _ in range(min(updates, most_updates)):
        size = batch_size(consumed)
        momentum = args.sgd_momentum if args.optimizer == "sgd" else 0.0
        rows.append((size, rate(consumed), momentum))
        consumed += size
    return rows


def tokens(text):
    factor = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1].upper())
    return int(float(text[:-1]) * factor) if factor else int(float(text))


def levanter(text):
    """levanter: the BatchSchedule of marin's repository, and OptimizerConfig.lr_scheduler."""
    config = yaml.safe_load(text)
    trainer, optimizer = config["trainer"], config["optimizer"]
    updates, sizes = trainer["num_train_steps"], trainer["train_batch_size"]

    def steps(value, total):
        return int(value * total) if value <= 1.0 else int(value)

    peak = optimizer["learning_rate"]
    low = peak * optimizer.get("min_lr_ratio", 0.1)
    warmup = min(steps(optimizer.get("warmup", 0.01), updates), updates)
    decay = optimizer.get("decay")
    decay = updates - warmup if decay is None else min(steps(decay, updates), updates - warmup)
    style = optimizer.get("lr_schedule", "cosine")
    rows = []
    for step in range(updates):
        size = sizes
        if isinstance(sizes, list):
            size = [each["value"] for each in sizes if each["start"] <= step][-1]
        if step < warmup:
            rate = peak * step / warmup
        elif step < updates - decay or style == "constant":
            rate = peak
        else:
            done = (step - (updates - decay)) / decay
            left = 1 - done if style == "linear" else 0.5 * (1 + math.cos(math.pi * done))
            rate = low + (peak - low) * left
        rows.append((size, rate, 0.0))
    return rows


def maxtext(text, devices):
    """MaxText: RampupBatchManager and create_learning_rate_schedule."""
    config = yaml.safe_load(text)
    last = int(devices * config["per_device_batch_size"])
    size = last
    if config.get("enable_rampup_batch_size"):
        size = int(devices * config.get("per_device_batch_size_start", 4.0))
        increment = int(devices * config.get("per_device_batch_size_increment", 2.0))
        each = config.get("global_rampup_samples", 500) / ((last - size) // increment)
    length = config.get("learning_rate_schedule_steps") or config["steps"]
    peak = config["learning_rate"]
    low = peak * config.get("learning_rate_final_fraction", 0.1)
    warmup = int(length * config.get("warmup_steps_fraction", 0.1))
    is_wsd = config.get("lr_schedule_type", "cosine") == "wsd"
    decay = int(length * config.get("wsd_decay_steps_fraction", 0.1)) if is_wsd else length - warmup
    is_line = is_wsd and config.get("wsd_decay_style", "linear") == "linear"
    rows, accumulated = [], 0
    for step in range(config["steps"]):
        at = step - (length - decay)
        if step >= length:
            rate = 0.0
        elif step < warmup:
            rate = peak * step / warmup
        elif at < 0:
            rate = peak
        elif is_line:
            rate = peak + (low - peak) * (at / (decay - 1) if decay > 1 else 0)
        else:
            a = 0.5 * (math.cos(math.pi * (at / (decay - 1) if decay > 1 else 1.0)) + 1)
            rate = peak * a + low * (1 - a)
        rows.append((size, rate, 0.0))
        if size < last:
            accumulated += size
            if accumulated >= each:
                size, accumulated = min(size + increment, last), 0
    return rows


def olmo_core(text, sequence_length):
    """OLMo-core: Trainer._fit_epoch, BatchSizeSchedulerCallback, TextDataLoaderBase, Scheduler."""
    config = yaml.safe_load(text.replace("None", "null"))
    scheduler = config.get("scheduler") or {"type": "constant"}
    sizes, starts = config["batch_sizes"], [each["value"] for each in config["schedule"]]
    end = config["max_duration"]["value"]
    size, batches, seen, base, rows = sizes[0], 0, 0, config["lr"], []
    while seen < end:
        for target, start in reversed(list(zip(sizes, starts, strict=True))):
            if seen >= start:
                if target > size and batches % (target // size) == 0:
                    batches //= target // size
                    base *= math.sqrt(target / size)
                    size = target
                elif target < size:
                    batches *= size // target
                    base *= math.sqrt(target / size)
                    size = target
                break
        batches += 1
        seen += size
        rows.append((size // sequence_length, olmo_rate(scheduler, base, seen, end), 0.0))
    return rows


def olmo_rate(scheduler, base, current, t_max):
    kind = scheduler["type"]
    if kind == "constant":
        return base
    if scheduler.get("t_max"):
        t_max = scheduler["t_max"]
    warmup = scheduler.get("warmup")
    if warmup is None:
        warmup = round(t_max * scheduler["warmup_fraction"])
    least = scheduler.get("warmup_min_lr", 0.0)
    strict = kind in ("cos_with_warmup", "linear_with_warmup")
    if current < warmup or (current == warmup and not strict):
        return least + (base - least) * current / warmup
    if kind == "constant_with_warmup":
        return base
    if kind == "wsd":
        decay = scheduler.get("decay")
        if decay is None:
            decay = round(t_max * scheduler["decay_fraction"])
        if current < t_max - decay:
            return base
        low = scheduler.get("decay_min_lr", 0.0)
        return low + (base - low) * min(t_max - current, decay) / decay
    low = base * scheduler.get("alpha_f", 0.1)
    if current >= t_max:
        return low
    done = (current - warmup) / (t_max - warmup)
    if kind == "linear_with_warmup":
        return base - (base - low) * done
    return low + (base - low) * (1 + math.cos(math.pi * done)) / 2


def table(text):
    """A CSV file, by the standard library."""
    rows = csv.DictReader(io.StringIO(text))
    return [(int(r["batch_size"]), float(r["learning_rate"]), float(r["momentum"])) for r in rows]


def columns(text):
    """plan.json."""
    found = json.loads(text)["columns"]
    names = ("batch_size", "learning_rate", "momentum")
    spread = ([value for value, count in found[name] for _ in range(count)] for name in names)
    return list(zip(*spread, strict=True))


def pytorch(text):
    """A module that is imported, and asked before each update as its docstring says."""
    module = {}
    exec(compile(ast.parse(text), "schedule.py", "exec"), module)
    rows, seen = [], 0
    for _ in range(module["NUM_UPDATES"]):
        now = module["at"](seen)
        rows.append((now["batch_size"], now["learning_rate"], now["momentum"]))
        seen += now["batch_size"]
    assert seen == module["NUM_EXAMPLES"]
    return rows


def optax(text):
    """A module that is read, not run: values from update starts on, in single precision."""
    found = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and not isinstance(node.value, ast.Call)
    }
    names, rows = ("batch_size", "learning_rate", "momentum"), []
    for update in range(found["NUM_UPDATES"]):
        row = []
        for starts, values in (found["COLUMNS"][name] for name in names):
            row.append(values[max(i for i, start in enumerate(starts) if start <= update)])
        rows.append((row[0], *struct.unpack("2f", struct.pack("2f", *row[1:]))))
    return rows
