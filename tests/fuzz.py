"""Inputs that nobody means, for the tests: whatever they are, they end in a sentence.

`python -m tests.fuzz configs|files|figures|texts COUNT` tries so many, seeded, in bounded memory
and time.
"""

import contextlib
import copy
import dataclasses
import gzip
import io
import json
import re
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import numpy as np
import yaml

from bigbatch.commands import plan as plan_table
from bigbatch.commands import plan_adaptive, plan_others
from bigbatch.commands.report import table
from bigbatch.commands.report.page import page
from bigbatch.commands.report.runs import read_run
from bigbatch.commands.report.summary import summarise
from bigbatch.commands.report.write import write_report
from bigbatch.config import file as config_file
from bigbatch.config.config import read_config
from bigbatch.data import sets
from bigbatch.data.records import jpeg
from bigbatch.data.records.reader import BadRecordError, Records, parse
from bigbatch.data.records.tfrecord_index import load_or_build
from bigbatch.data.tfds import idx_files
from bigbatch.data.tfds.metadata import TFRECORD
from bigbatch.errors import RunError, UserError
from bigbatch.layout import time_model
from bigbatch.schedule.from_file import plan_file
from bigbatch.schedule.plan import Plan, make_plan
from bigbatch.schedule.policy import constant
from bigbatch.schedule.trainers.emit import FORMATS
from bigbatch.schedule.trainers.faults import findings
from bigbatch.schedule.trainers.log import PRESETS, read_log
from tests import report_runs, test_images, test_trainers

RUN_FILES = ("config.json", "run.json", "plan.json", "result.json", "metrics.jsonl")
MOST_BYTES, MOST_S = 8 * 2**30, 60
NUMBERS = [0, -1, 1, 2, 7, 0.5, 1e-310, 5e-324, 1e308, -1e308, 10**20, 10**400, 2**31, 2**63, 1e6]
NUMBERS += [float("nan"), float("inf"), 0.1, 1e-13, 1e8, 31, 33, 100_000]
TEXTS = [
    "",
    "a:b",
    "\0",
    "a\nb",
    "$x$",
    "<b>",
    "\udcff",
    "x" * 5_000,
    "../..",
    "~nobody",
    ":",
    "🙂",
]
OTHERS = [None, True, False, [], {}, [[]], [None], {"name": "momentum"}, {"name": {}}, [1, "2"]]
VALUES = [*NUMBERS, *TEXTS, *OTHERS]


def trees():
    """The configs that come with the project, one of each experiment."""
    found = []
    for name in config_file._bundled():
        module = config_file._load_module(name)
        found += [config_file.plain(module.get_config(e)) for e in module.EXPERIMENTS]
    return found


def places(tree, prefix=()):
    """The places of all values in nested ones."""
    keys = tree if isinstance(tree, dict) else range(len(tree) if isinstance(tree, list) else 0)
    for key in keys:
        yield (*prefix, key)
        yield from places(tree[key], (*prefix, key))


def mutated(rng, tree):
    """Nested values of which one to three are others, gone, or under another name."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.integers(1, 4)):
        there = [*places(tree)]
        if not there:
            return tree
        *groups, last = there[rng.integers(len(there))]
        node = tree
        for group in groups:
            node = node[group]
        value = VALUES[rng.integers(len(VALUES))]
        how = rng.integers(8)
        if how == 0:
            del node[last]
        elif how == 1 and isinstance(node, dict):
            node[str(value)] = node.pop(last)
        elif how == 2 and isinstance(node, dict):
            others = [path[-1] for path in there if isinstance(path[-1], str)]
            node[others[rng.integers(len(others))]] = value
        elif how == 3:
            node[last] = [node[last], value]
        else:
            node[last] = copy.deepcopy(value)
    return tree


def damaged(rng, content: bytes) -> bytes:
    """A file's content, cut, with flipped bits, with a stretch of another, or grown."""
    made = bytearray(content)
    how = rng.integers(5)
    if how == 0 or not made:
        return bytes(made[: rng.integers(len(made) + 1)])
    if how == 1:
        for place in rng.integers(len(made), size=rng.integers(1, 20)):
            made[place] ^= 1 << rng.integers(8)
    elif how == 2:
        begin, end = sorted(rng.integers(len(made) + 1, size=2))
        made[begin:end] = rng.bytes(int(rng.integers(40)))
    elif how == 3:
        begin, end = sorted(rng.integers(len(made) + 1, size=2))
        made[begin:begin] = made[begin:end]
    else:
        made += rng.bytes(int(rng.integers(200)))
    return bytes(made)


def other_values(rng, name, content: bytes) -> bytes:
    """JSON with other values: of a log, in one line, or in all of them the same."""
    lines = content.splitlines() if name.endswith(".jsonl") else [content]
    seed, one = rng.integers(2**32), rng.integers(len(lines))
    for number in range(len(lines)) if rng.integers(2) else (one,):
        value = mutated(np.random.default_rng(seed), json.loads(lines[number]))
        lines[number] = json.dumps(value).encode()
    return b"\n".join([*lines, b""])


def try_config(rng, known):
    tree = mutated(rng, known[rng.integers(len(known))])
    config = read_config(tree, "fuzz")
    config.intervals  # noqa: B018
    config.layout(config.plan, int(2 ** rng.integers(12)))
    plan_adaptive.text(config, devices=4) if config.controller else plan_table.text(
        config, devices=4
    )
    if config.plan.num_updates < 2**16:
        again = Plan.from_json(config.plan.to_json())
        assert again.fingerprint == config.plan.fingerprint


def samples(root: Path):
    """Files as they should be, each with a function that reads a directory where it may not be."""
    rng = np.random.default_rng(0)
    run = report_runs.write_run(
        root / "runs",
        "decay",
        0,
        report_runs.DECAY,
        report_runs.falling_loss(0),
        metrics={"m": abs},
    )
    plan = make_plan(constant(0.1, 20, 0.9), train_examples=100, epochs=3)
    bench = dict.fromkeys(("examples_per_s", "call_s", "update_s", "allreduce_gbps"), 1.5)
    images = rng.integers(0, 256, (6, 5, 5), np.uint8)
    parts = {f"{part}_images": images for part in ("train", "test")}
    parts |= {f"{part}_labels": np.arange(6) for part in ("train", "test")}
    packed = io.BytesIO()
    np.savez(packed, **parts)
    idx = b"\0\0\x08\x03" + np.array(images.shape, ">u4").tobytes() + images.tobytes()
    files = {name: (run / name).read_bytes() for name in RUN_FILES}
    files |= {
        "of_another.json": plan.to_json().encode(),
        "bench.json": json.dumps(bench).encode(),
        "d.npz": packed.getvalue(),
        "train-images-idx3-ubyte.gz": gzip.compress(idx),
    }
    prepared, file, _ = test_images.small_set(root, TFRECORD)
    load_or_build([file], (8,))
    (index,) = root.glob("*.bigbatch_index.npz")
    known = {"name": "small", "splits": [{"name": "train", "shardLengths": ["8"]}]}
    shape = {"dimensions": ["6", "6", "3"]}
    features = {"image": {"image": {"shape": shape}}, "label": {"classLabel": {"numClasses": "8"}}}
    files |= {
        "dataset_info.json": json.dumps(known).encode(),
        "features.json": json.dumps({"featuresDict": {"features": features}}).encode(),
        file.name: file.read_bytes(),
        index.name: index.read_bytes(),
    }
    context = {"train_examples": 100, "epochs": 3, "batch_multiple_examples": 1}

    def records(directory):
        found = Records(dataclasses.replace(prepared, directory=directory), "train")
        for number in range(len(found)):
            with contextlib.suppress(BadRecordError):
                jpeg.image_size(parse(found.read(number)).image)
        found.close()

    def described(directory):
        place = directory / "small" / "1.0.0"
        place.mkdir(parents=True, exist_ok=True)
        for name in ("dataset_info.json", "features.json", file.name):
            (place / name).write_bytes((directory / name).read_bytes())
        sets.load("small", directory=directory)

    def told(directory):
        # Figures would take seconds.
        run = read_run(directory)
        if run.usable:
            summary = summarise([run])
            table.markdown(summary)
            page(summary)

    def arrays(directory):
        sets.load("arrays", path=directory / "d.npz")

    read = {
        **dict.fromkeys(RUN_FILES, told),
        "of_another.json": lambda place: plan_file(str(place / "of_another.json"), **context),
        "bench.json": lambda place: time_model.asked(str(place / "bench.json"), {}, 2),
        "d.npz": arrays,
        "train-images-idx3-ubyte.gz": idx_files.read_parts,
        "dataset_info.json": described,
        "features.json": described,
        file.name: records,
        index.name: records,
    }
    return files, read


def try_file(rng, directory, files, read):
    """One of the files is damaged, as bytes or as the values that it holds; then it is read."""
    name = [*files][rng.integers(len(files))]
    content = files[name]
    if name.endswith((".json", ".jsonl")) and rng.integers(2):
        content = other_values(rng, name, content)
    else:
        content = damaged(rng, content)
    (directory / name).write_bytes(content)
    try:
        read[name](directory)
    finally:
        (directory / name).write_bytes(files[name])


def texts():
    """Schedules and logs of other trainers, each with what reads it."""
    plan = make_plan(constant(0.1, 20, 0.9), train_examples=100, epochs=3)

    def against(name):
        run = FORMATS[name].run
        return lambda text: plan_others.beside(plan, run(text, plan, 2, test_trainers.LENGTH))

    def log(text):
        for preset in PRESETS:
            findings(plan, read_log(text, preset, {}), preset, 0)

    rows = [{"update": i, "batch_size": 20, "learning_rate": 0.1, "loss": 1.0} for i in range(15)]
    table = [",".join(map(str, row)) for row in ([*rows[0]], *(row.values() for row in rows))]
    line = " iteration {}/ 15 | learning rate: 1.0E-01 | global batch size: 20 |"
    megatron = [line.format(i) for i in range(15)]
    found = [(text, against(name)) for name, (text, _) in test_trainers.GOLDEN.items()]
    ramp = "--rampup-batch-size 8 8 100 --global-batch-size 32 --train-samples 900 --lr 1 "
    found += [(ramp + "--lr-warmup-samples 30 --lr-decay-style WSD", against("megatron"))]
    found += [(next(FORMATS[name].write(plan, 1, 1)), against(name)) for name in ("csv", "json")]
    lines = "\n".join(map(json.dumps, rows)), "\n".join(table), "\n".join(megatron)
    return found + [(text, log) for text in lines]


def try_text(rng, known):
    """A text with another number or word, damaged, or with other values where it is YAML."""
    text, read = known[rng.integers(len(known))]
    how = rng.integers(3)
    if how == 0:
        text = damaged(rng, text.encode()).decode(errors="replace")
    elif how == 1 and text.startswith("{") and "\n" not in text:
        text = json.dumps(mutated(rng, yaml.safe_load(text)))
    else:
        words = re.split(r"([\w.+-]+)", text)
        for _ in range(rng.integers(1, 4)):
            words[rng.integers(len(words))] = str(VALUES[rng.integers(len(VALUES))])
        text = "".join(words)
    read(text)


def try_figures(rng, directory, files, read):
    """One to three of a run's files hold other values; its report is drawn beside a sound run's."""
    run = directory / "other"
    run.mkdir(exist_ok=True)
    told = rng.choice(RUN_FILES, rng.integers(1, 4), replace=False)
    for name in RUN_FILES:
        content = files[name]
        (run / name).write_bytes(other_values(rng, name, content) if name in told else content)
        (directory / name).write_bytes(files[name])
    write_report([directory, run], directory / "report")


def many(what, count, one):
    """Calls a function with a generator of each seed; gives the seeds that ended otherwise."""
    bad = []

    def too_long(*_):
        raise TimeoutError

    signal.signal(signal.SIGPROF, too_long)
    for seed in range(count):
        rng = np.random.default_rng([seed, len(what)])
        # Of the processor; what waits for ever is ended by the clock.
        signal.setitimer(signal.ITIMER_PROF, MOST_S)
        signal.alarm(60 * MOST_S)
        try:
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("error")
                one(rng)
        except (UserError, RunError) as error:
            str(error).encode("utf-8", "backslashreplace")
        except BaseException:
            bad.append(seed)
            lines = [line[:200] for line in traceback.format_exc().splitlines()]
            print(what, seed, *lines[-24:], sep="\n", file=sys.stderr)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    return bad


def main(what, count):
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    with tempfile.TemporaryDirectory() as root:
        if what == "configs":
            arguments = (trees(),)
        elif what == "texts":
            arguments = (texts(),)
        else:
            files, read = samples(Path(root))
            directory = Path(root) / "tried"
            directory.mkdir()
            for name, content in files.items():
                (directory / name).write_bytes(content)
            arguments = directory, files, read
        tries = {"configs": try_config, "files": try_file, "figures": try_figures}
        one = {**tries, "texts": try_text}[what]
        print(json.dumps(many(what, int(count), lambda rng: one(rng, *arguments))))


if __name__ == "__main__":
    main(*sys.argv[1:])
