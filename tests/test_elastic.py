"""One run on other devices in every process, stopped in between: what one device gives."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import elastic
from tests.storm import positions, records

ROOT = Path(__file__).parents[1]
EXAMPLES = elastic.config("float32", 8).plan.num_examples
END = EXAMPLES + 1
# Devices, share of a microbatch, where the process ends (among the updates of 32, among those of
# 160, and with the run; or with each stage), and how the state lies on them.
SHRINKING = (
    *((8, 8, "until=250_examples", "update"), (4, 40, 1_500, "update")),
    (2, 16, END, "update"),
)
BY_STAGES = (
    *((1, 40, "until=1", "none"), (2, 32, "until=2", "update")),
    *((4, 16, "until=3", "none"), (8, 8, END, "update")),
)


def run_parts(directory: Path, parts) -> list[dict]:
    reports = []
    for devices, share, stop, shard in parts:
        subprocess.run(
            [sys.executable, "-m", "tests.elastic", str(directory), str(share), str(stop), shard],
            cwd=ROOT,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)},
            check=True,
        )
        reports.append(json.loads((directory / f"{devices}.json").read_text()))
        assert reports[-1]["devices"] == devices
    return reports


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    return directory, *run_parts(directory, [(1, 160, END, "none")])


# Each trains in processes of its own for minutes.
pytestmark = pytest.mark.long


@pytest.fixture(scope="module", params=[SHRINKING, BY_STAGES])
def moved(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("moved")
    return directory, run_parts(directory, request.param)


def result(directory: Path, name: str) -> dict:
    return json.loads((directory / name / "result.json").read_text())


@pytest.mark.parametrize("name", elastic.RUNS)
def test_the_same_examples_in_the_same_order_each_once(undisturbed, moved, name):
    """Whatever was made and then dropped is made again alike."""
    directory, parts = moved
    expected = undisturbed[1][name]["examples"]
    assert set(expected) == {str(position) for position in range(EXAMPLES)}
    done = [part[name]["updates"] for part in parts]
    sizes = elastic.config(name, 8).plan.batch_sizes
    assert done == sorted(set(done))
    assert done[-1] == len(sizes)
    if len(parts) == len(SHRINKING):
        # The first change of devices is among the small updates, the second among the large ones.
        assert (sizes[done[0]], sizes[done[1] - 1]) == (32, 160)
    else:
        assert [(sizes[k - 1], sizes[k]) for k in done[:-1]] == [(32, 64), (64, 128), (128, 160)]
    ends = [0, *np.cumsum(sizes)]
    for part, first, last in zip(parts, [0, *done], done, strict=False):
        made = part[name]["examples"]
        assert made.items() <= expected.items()
        # And all that its updates take was made by this process.
        assert made.keys() >= {str(p) for p in range(ends[first], ends[last])}
    spans = positions(directory / name)
    assert spans == positions(undisturbed[0] / name)
    assert spans[0][0] == 0
    assert spans[-1][1] == EXAMPLES
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))


def test_float64_is_equal_to_1e_10(undisturbed, moved):
    found = []
    for directory in (undisturbed[0], moved[0]):
        with np.load(directory / "float64.npz") as file:
            found.append([file[name] for name in file.files])
    assert all(leaf.dtype == np.float64 for leaf in found[0])
    differences = [np.max(np.abs(a - b)) for a, b in zip(*found, strict=True)]
    # Plain sums differ a little: what was compared was computed on other devices.
    assert 0 < max(differences) < 1e-10
    losses = [
        [r["train_loss"] for r in records(d / "float64") if "train_loss" in r]
        for d in (undisturbed[0], moved[0])
    ]
    np.testing.assert_allclose(*losses, rtol=1e-10)


def test_reproducible_float32_is_equal_to_the_bit(undisturbed, moved):
    """The parameters, and every record of the log: losses, evaluations, positions."""
    results = [result(directory, "float32") for directory in (undisturbed[0], moved[0])]
    assert results[0]["params_sha256"] == results[1]["params_sha256"]
    logs = [records(directory / "float32") for directory in (undisturbed[0], moved[0])]
    train = [[r for r in log if "train_loss" in r] for log in logs]
    assert train[0] == train[1]
    assert len(train[0]) == elastic.config("float32", 8).plan.num_updates
    with np.load(moved[0] / "float32.npz") as file:
        assert all(file[name].dtype == np.float32 for name in file.files)
