"""What is written for other trainers, by their own code, in an environment of the test's own."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bigbatch.errors import UserError
from bigbatch.schedule.plan import make_plan
from bigbatch.schedule.policy import batch_ramp, constant, cosine, polynomial, stages, warmup
from bigbatch.schedule.trainers import levanter, maxtext, megatron, olmo_core
from tests.test_trainers import LENGTH, READERS

# Of each the modules of the schedule alone are run, so what it needs besides is not installed.
PACKAGES = {
    "megatron_rampup": ["megatron-core==0.16.1"],
    "levanter": ["marin-levanter==0.2.20.dev202606180959"],
    # Its wheel asks for a newer Python than its schedule needs.
    "maxtext": ["--ignore-requires-python", "maxtext==0.2.5"],
    "olmo_core": ["ai2-olmo-core==3.0.0"],
}
READ = {
    "megatron_rampup": megatron.read,
    "levanter": levanter.read,
    "maxtext": maxtext.read,
    "olmo_core": lambda text: olmo_core.read(text, 1, LENGTH),
}
N = 2048


def plans(momentum=0.0):
    """Twenty recipes: curves, warm-ups, stages by whole ratios, and ramps."""
    curves = (
        constant(0.1, 16, momentum),
        cosine(0.1, 16, momentum, epochs=6),
        polynomial(0.1, 16, momentum, epochs=6),
        polynomial(0.1, 16, momentum, from_epoch=2, until_epoch=6),
        stages("0:0.1 2_epochs:0.2 4_epochs:0.4", "0:16 2_epochs:64 4_epochs:256", momentum),
    )
    for curve in curves:
        ramp = {"initial_batch_size": 4, "increment_examples": 4}
        for policy in (
            curve,
            warmup(curve, warmup_epochs=1),
            batch_ramp(curve, **ramp, ramp_epochs=1),
            batch_ramp(warmup(curve, warmup_epochs=1.5), **ramp, ramp_epochs=1.7),
        ):
            yield make_plan(policy, train_examples=N, epochs=6)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An interpreter that has Optax, PyTorch and PyYAML, and not bigbatch."""
    there = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", there], check=True)
    packages = ["optax==0.2.8", "torch==2.13.0", "pyyaml"]
    subprocess.run([there / "bin/pip", "install", "-q", "--no-compile", *packages], check=True)
    return there / "bin/python"


def run_there(python, texts, *arguments):
    """Rows (batch size, learning rate, momentum) of each text, by the trainer's own code."""
    code = str(Path(__file__).with_name("trainers_real.py"))
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"}
    ran = subprocess.run(
        [python, code, *map(str, arguments)],
        input=json.dumps(texts), capture_output=True, text=True, check=False,
        env=environment | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return [np.array(rows).T for rows in json.loads(ran.stdout)]


def difference(rows, plan, rtol):
    """The largest of the learning rate, relative to it; batch sizes are the plan's."""
    sizes, rates, _ = rows
    np.testing.assert_array_equal(sizes, plan.batch_sizes)
    planned = plan.hypers["learning_rate"]
    # Next to 0 the last bits of the peak are much.
    np.testing.assert_allclose(rates, planned, rtol=rtol, atol=1e-9 * planned.max())
    floor = np.maximum(planned, 1e-3 * planned.max())
    return float((np.abs(rates - planned) / floor).max())


def other_peoples(name):
    """Schedules as people write them, with what is read from them."""
    write, rng = READERS[name.partition("_r")[0]][0], random.Random(name)
    while True:
        text = write(rng)
        # The packaged core does not know it.
        if "--step-batch-size-schedule" not in text:
            try:
                yield text, READ[name](text).plan(1000)
            except UserError:
                continue


@pytest.mark.long
@pytest.mark.parametrize("name", PACKAGES)
def test_their_own_code_does_what_was_read(python, tmp_path, name):
    pip = [
        python,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-compile",
        "--no-deps",
        f"--target={tmp_path}",
    ]
    subprocess.run([*pip, *PACKAGES[name]], check=True)
    # Theirs as they are, and written anew; ours.
    texts, made, asked = [], [], []
    rng = other_peoples(name)
    while len(made) < 20:
        text, plan = next(rng)
        done = plan.emit(name, sequence_length=LENGTH)
        if max(done.stray[:2]) < 1e-6:
            texts, made, asked = [*texts, text, done.text], [*made, plan], [*asked, plan, plan]
    for plan in plans():
        done = plan.emit(name, sequence_length=LENGTH)
        texts, asked = [*texts, done.text], [*asked, done.plan]
        if max(done.stray[:2]) < 1e-6:
            made.append(plan)
            texts, asked = [*texts, done.text], [*asked, plan]
    rows = run_there(python, texts, name, tmp_path)
    # What was asked for is a plan, or what is said to stray from it.
    far = [difference(each, plan, 2e-6) for each, plan in zip(rows, asked, strict=True)]
    updates = sum(plan.num_updates for plan in asked)
    print(f"{name}: {len(made)} plans, {len(texts)} texts, {updates:,} updates, {max(far):.1e}")


@pytest.mark.long
@pytest.mark.parametrize("name", ["pytorch", "optax"])
def test_a_written_module_drives_their_optimizer(python, name):
    made = list(plans())[:10]
    for plan in list(plans(0.9))[10:]:
        # The momentum moves, as raise_momentum has it move.
        momentum = np.where(np.arange(plan.num_updates) < plan.num_updates // 3, 0.9, 0.95)
        hypers = {**plan.hypers, "momentum": momentum}
        made.append(dataclasses.replace(plan, hypers=hypers))
    rows = run_there(python, [plan.emit(name).text for plan in made], name)
    far = []
    for plan, each in zip(made, rows, strict=True):
        far.append(difference(each, plan, 1e-10 if name == "pytorch" else 2e-6))
        velocity = [1.0]
        for momentum in plan.hypers["momentum"][1:].tolist():
            velocity.append(momentum * velocity[-1] + 1)
        np.testing.assert_allclose(each[2], velocity, rtol=1e-10 if name == "pytorch" else 2e-6)
    updates = sum(plan.num_updates for plan in made)
    print(f"{name}: {len(made)} plans, {updates:,} updates, {max(far):.1e}")
