"""Time and cost on devices that are not there, against sums by hand and loops over updates."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bigbatch
from bigbatch import cli, models
from bigbatch.commands import bench
from bigbatch.config.file import load_config
from bigbatch.errors import UserError
from bigbatch.layout import time_model
from bigbatch.layout.layout import make_layout
from bigbatch.layout.sharing import layout_over
from bigbatch.layout.time_model import Scaling, Speeds
from bigbatch.models.classification import image_classification
from bigbatch.schedule.intervals import Every
from tests.benchmarks import published_runs
from tests.trained import config

ROOT = Path(__file__).parents[1]
DIGITS = str(ROOT / "configs" / "digits.py")
CIFAR = str(ROOT / "configs" / "cifar10.py")
SPEEDS = Speeds(examples_per_s=1000, call_s=0.003, update_s=0.02, allreduce_gbps=10)


@pytest.mark.parametrize(
    ("model", "shape", "classes"),
    [
        (models.WideResNetConfig(depth=16, width=4), (32, 32, 3), 10),
        (models.WideResNetConfig(depth=22, width=1, strides=(2, 1, 2)), (8, 8, 1), 7),
        (models.ResNetConfig(depth=18), (64, 64, 1), 10),
        (models.ResNetConfig(depth=50), (64, 64, 3), 1000),
        (models.InceptionResNetV2Config(), (75, 75, 3), 100),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, models.ModelConfig) else None,
)
def test_parameters_are_those_of_the_network(model, shape, classes):
    module = model.module(num_classes=classes, ghost_batch_examples=2)
    task = image_classification(module, shape, (0.0,) * shape[2], (1.0,) * shape[2])
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    expected = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert model.num_parameters(image_channels=shape[2], num_classes=classes) == expected


def test_a_ring_of_devices_sends_what_each_hop_sends():
    """Every device sends one n-th of the bytes 2 (n - 1) times, one hop after the other."""
    for devices in (2, 3, 8):
        hops = [4e6 / devices / (10e9 / 8) for _ in range(2 * (devices - 1))]
        assert SPEEDS.allreduce_s(devices, 4_000_000) == pytest.approx(sum(hops))
    assert Speeds(examples_per_s=1).allreduce_s(1, 10**9) == 0


@given(st.integers(2, 5_000), st.floats(0, 1e-2), st.integers(1, 10**9))
def test_the_quicker_of_a_ring_and_two_trees_is_taken(devices, hop_s, gradient_bytes):
    """Hops counted one by one: n - 1 around a ring and back, the depth of a tree up and down."""
    byte_s, depth = 8 / 10e9, next(d for d in range(20) if 2**d >= devices)
    ring_s = sum([hop_s + gradient_bytes / devices * byte_s] * (2 * (devices - 1)))
    tree_s = sum([hop_s] * (2 * depth)) + 2 * gradient_bytes * byte_s
    speeds = dataclasses.replace(SPEEDS, hop_s=hop_s)
    assert speeds.allreduce_s(devices, gradient_bytes) == pytest.approx(min(ring_s, tree_s))


def test_evaluations_checkpoints_and_compilation_are_counted(capsys):
    """Against a walk over the updates of the plan, in fractions."""
    speeds = ["--examples-per-s=1000", "--evaluation-examples-per-s=5000", "--checkpoint-s=3"]
    time = plan_json(capsys, *speeds, "--compile-s=40")["time"]
    plan = load_config(f"{CIFAR}:increase_lr", []).plan
    done, evaluations, checkpoints = 0, 1, 1
    for size in plan.batch_sizes.tolist()[:-1]:
        evaluations += (done + size) // 50_000 > done // 50_000
        checkpoints += (done + size) // 250_000 > done // 250_000
        done += size
    expected = {"evaluation": evaluations * 2.0, "checkpoints": 3 * checkpoints, "compilation": 40}
    assert time["beside_s"] == pytest.approx(expected)
    updates_s = sum(stage["seconds"] for stage in time["stages"])
    assert time["seconds"] == pytest.approx(updates_s + sum(expected.values()))


SIZES = st.lists(st.integers(1, 300), min_size=1, max_size=30)


@given(SIZES, st.sampled_from(["epochs", "examples", "updates"]), st.integers(1, 40))
def test_updates_that_are_due_are_counted(sizes, unit, value):
    every = Every(value / 100 if unit == "epochs" else value, unit)
    begins = np.cumsum([0, *sizes]).tolist()
    due = [every.due(b, size, k, 1_000) for k, (b, size) in enumerate(zip(begins, sizes))]  # noqa: B905
    assert every.num_due(np.array(sizes), 1_000) == sum(due[:-1]) + 1


def test_published_runs_are_predicted_as_the_page_says():
    errors = published_runs.errors()
    within = [name for name, error in errors.items() if abs(error) <= 0.25]
    # A run that was missed has a reason, and no other.
    reasons = {f"{run.name} {run.devices}" for run in published_runs.RUNS if run.reason}
    assert reasons == errors.keys() - set(within)
    assert 3 * len(within) >= 2 * len(errors)
    page = (ROOT / "docs" / "pods.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .* \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| ([+-]\d+) % \|", page, re.M)
    assert rows == [
        (
            f"{run.devices:,}",
            f"{run.seconds / 60:.3g}",
            f"{(1 + error) * run.seconds / 60:.3g}",
            f"{100 * error:+.0f}",
        )
        for run, error in zip(published_runs.RUNS, errors.values(), strict=True)
    ]


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_a_plans_time_is_the_sum_over_its_microbatches(devices):
    recipe = bigbatch.step_decay(0.1, 64, 0.9, boundaries_epochs=[1, 2], factor=0.2)
    plan = bigbatch.make_plan(
        bigbatch.grow_batch(recipe, max_batch_size=992),
        train_examples=2000,
        epochs=3,
        batch_multiple_examples=32,
    )
    layout = make_layout(
        plan, ghost_batch_examples=32, devices=devices, microbatch_examples_per_device=128
    )
    expected = 0.0
    for size in plan.batch_sizes.tolist():
        for part in layout.microbatches(size):
            expected += 0.003 + part.examples_per_device / 1000
        expected += 0.02 + SPEEDS.allreduce_s(devices, 10**6)
    times = time_model.stage_times(plan, layout, devices, 10**6, SPEEDS)
    assert sum(time.seconds for time in times) == pytest.approx(expected)
    assert [time.stage for time in times] == list(plan.stages)


def test_devices_that_share_a_ghost_batch_compute_a_part_each():
    layout = layout_over(
        [128, 640], ghost_batch_examples=128, devices=8, microbatch_examples_per_device=32
    )
    # Two groups of four devices: a call computes 256 examples, 32 a device.
    found = time_model.update_time(layout, 640, 8, 0, Speeds(1000.0, call_s=1.0, allreduce_gbps=1))
    assert found.compute_s == pytest.approx(3 * (1 + 32 / 1000))


def test_more_devices_help_until_a_doubling_does_not():
    seconds = {1: 100.0, 2: 50.0, 3: 34.0, 4: 30.0, 8: 21.0, 16: 5.0}
    assert time_model.most_worthwhile([Scaling(*row) for row in seconds.items()]) == 4
    assert time_model.most_worthwhile([Scaling(6, 1.0)]) == 6


def plan_json(capsys, *arguments):
    assert cli.main(["plan", f"--config={CIFAR}:increase_lr", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_gives_time_and_cost_of_both_recipes(capsys):
    speeds = ("--examples-per-s=1000", "--allreduce-gbps=100", "--cost-per-device-hour=2")
    time = plan_json(capsys, "--devices=4", *speeds)["time"]
    assert time["seconds"] == pytest.approx(sum(stage["seconds"] for stage in time["stages"]))
    assert time["cost"] == pytest.approx(2 * 4 * time["seconds"] / 3600)
    # 640 examples are 5 ghost batches of 128: two on the fullest of four devices.
    ring_s = 2 * 3 / 4 * 4 * 2_748_890 * 8 / 100e9
    assert time["stages"][0]["compute_s"] == pytest.approx(0.256)
    assert time["stages"][0]["allreduce_s"] == pytest.approx(ring_s)
    growing = {row["devices"]: row for row in time["growing"]["by_devices"]}
    assert growing[4]["seconds"] == pytest.approx(time["seconds"])
    # Largest batch: 40 ghost batches; 64 devices hold one each at most.
    assert list(growing) == [1, 2, 4, 8, 16, 32, 64]
    # The original has one ghost batch an update: no second device helps.
    assert time["original"]["most_worthwhile_devices"] == 1
    one = load_config(f"{CIFAR}:increase_lr", []).source_plan.num_updates * 128 / 1000
    assert time["original"]["by_devices"][0]["seconds"] == pytest.approx(one)


def test_the_table_holds_the_same_numbers(capsys):
    speeds = ["--devices=4", "--examples-per-s=1000", "--allreduce-gbps=100"]
    time = plan_json(capsys, *speeds)["time"]
    assert cli.main(["plan", f"--config={CIFAR}:increase_lr", *speeds]) == 0
    out = capsys.readouterr().out
    assert f"{time['seconds'] / 3600:,.4g} hours" in out
    for row in time["growing"]["by_devices"]:
        assert f"{row['seconds'] / 3600:.4g}" in out
    assert f"growing: more than {time['growing']['most_worthwhile_devices']} devices" in out
    assert "original: more than 1 device stop" in out


def test_measured_speeds_are_read_and_what_is_typed_counts_more(capsys, tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"examples_per_s": 500.0, "call_s": 0.1, "update_s": 0.2}))
    time = plan_json(capsys, f"--bench={path}", "--update-s=0.5")["time"]
    assert (time["speeds"]["examples_per_s"], time["speeds"]["update_s"]) == (500.0, 0.5)
    assert time["stages"][0]["compute_s"] == pytest.approx(0.1 + 640 / 500)
    assert time["growing"] is None  # nothing is known of several devices


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--allreduce-gbps=100"], ["1 mistake", "examples_per_s: given 'nothing'"]),
        (["--devices=2", "--examples-per-s=9"], ["1 mistake", "allreduce_gbps: given 'nothing'"]),
        (["--devices=2", "--update-s=-1"], ["3 mistakes", "update_s: given -1.0", "nearest: 0"]),
        (["--examples-per-s=nan"], ["examples_per_s: given nan"]),
        (["--examples-per-s=9", "--hop-s=-1"], ["1 mistake", "hop_s: given -1.0", "nearest: 0"]),
        (["--bench=no.json"], ["bench: given 'no.json'", "bigbatch bench"]),
        ([f"--bench={CIFAR}"], ["bench: given", "bigbatch bench"]),
    ],
    ids=lambda value: " ".join(value)[:50],
)
def test_mistakes_are_told(capsys, arguments, expected):
    assert cli.main(["plan", f"--config={CIFAR}:increase_lr", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    for text in expected:
        assert text in err


def test_times_need_no_jax():
    code = (
        "import sys; from bigbatch import cli; "
        f"cli.main(['plan', '--config={CIFAR}:increase', '--examples-per-s=9', "
        "'--allreduce-gbps=9']); "
        "assert not {'jax', 'flax', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def bench_run():
    return bench.one_device(config(microbatch_examples_per_device=64))


def test_bench_writes_what_plan_reads(bench_run, capsys, tmp_path, monkeypatch):
    """The fit is exact for times that follow the model."""

    def seconds(run, sizes, counts, runs=0):
        return {(s, k): [0.5 + k * (0.25 + s / 64)] for s in sizes for k in counts}

    monkeypatch.setattr(bench, "one_device", lambda _: bench_run)
    monkeypatch.setattr(bench, "update_seconds", seconds)
    out = tmp_path / "bench.json"
    assert cli.main(["bench", f"--config={DIGITS}:decay", f"--out={out}"]) == 0
    found = time_model.read_bench(str(out))
    measured = {"examples_per_s": 64.0, "call_s": 0.25, "update_s": 0.5}
    assert {name: found[name] for name in measured} == pytest.approx(measured)
    assert found["evaluation_examples_per_s"] > 0 < found["compile_s"]
    assert "64 examples/s" in capsys.readouterr().out


def test_bench_times_every_size_and_number_of_microbatches(bench_run):
    assert bench_run.layout.shapes == (64, 32)
    found = bench.update_seconds(bench_run, (64, 32), (1, 3), runs=1)
    assert found.keys() == {(64, 1), (64, 3), (32, 1), (32, 3)}
    assert all(len(taken) == 1 and taken[0] > 0 for taken in found.values())


def test_bench_needs_a_whole_ghost_batch():
    with pytest.raises(UserError, match="at least the 32 examples of a ghost batch"):
        bench.bench(config(microbatch_examples_per_device=16))
