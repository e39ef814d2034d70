"""Several processes on loopback train the same run as one."""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 300


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(arguments: list[str], devices: int, **options) -> subprocess.Popen:
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-W", "error", "-m", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, **options
    )


def ended(processes: list[subprocess.Popen], timeout_s: float = TIMEOUT_S) -> list[tuple[int, str]]:
    """Their exit statuses and what they said on standard error; none is left behind."""
    try:
        texts = [process.communicate(timeout=timeout_s)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return [(process.returncode, text) for process, text in zip(processes, texts, strict=True)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Gives what `tests.process` wrote, in each of some processes with so many devices."""
    directory = tmp_path_factory.mktemp("processes")

    @functools.cache
    def run(processes, devices):
        out = directory / f"{processes}x{devices}"
        flags = [f"127.0.0.1:{free_port()}", str(processes)] if processes > 1 else []
        commands = [
            ["tests.process", str(out), *flags, *([str(process)] if flags else [])]
            for process in range(processes)
        ]
        found = []
        for process, (status, text) in enumerate(
            ended([start(c, devices) for c in commands], 4 * TIMEOUT_S)
        ):
            assert status == 0, text
            report = json.loads(Path(f"{out}.{process}.json").read_text())
            with np.load(f"{out}.{process}.npz") as file:
                report["state"] = [file[name] for name in file.files]
            found.append(report)
        return found

    return run


@pytest.fixture(scope="module")
def results(run):
    """By processes, devices of each, and the process that wrote."""
    over = ((1, 1), (1, 4), (2, 2))
    return {(*key, process): one for key in over for process, one in enumerate(run(*key))}


@pytest.mark.parametrize("devices", [2, pytest.param(4, marks=pytest.mark.long)])
def test_two_processes_with_a_state_in_parts_train_what_one_does(run, devices):
    (expected,) = run(1, 1)
    assert expected["devices"] == 1
    assert expected["sums"]["count"] == 360
    for report in (*run(1, 4), *run(2, devices)):
        differences = [
            np.max(np.abs(a - b)) for a, b in zip(report["state"], expected["state"], strict=True)
        ]
        assert max(differences) < 1e-10
        # Whole numbers of examples: each counted once, by exactly one process.
        for name in ("count", "correct"):
            assert report["sums"][name] == expected["sums"][name]
        np.testing.assert_allclose(report["sums"]["loss"], expected["sums"]["loss"], rtol=1e-10)
        assert report["reproducible_sha256"] == expected["reproducible_sha256"]
    assert [(one["devices"], one["processes"]) for one in run(2, devices)] == [(2 * devices, 2)] * 2


def test_processes_agree_to_the_bit(results):
    first, second = results[2, 2, 0], results[2, 2, 1]
    assert first["sha256"] == second["sha256"]
    assert first["sums"] == second["sums"]


def test_reproducible_sums_are_the_same_bits_over_processes_and_parts(results):
    assert len({report["reproducible_sha256"] for report in results.values()}) == 1
    # One sum, and one maximum for the bounds.
    assert results[1, 4, 0]["reproducible_apply_update"] == {"all-reduce": 2}


def test_over_processes_only_apply_update_exchanges_anything(results):
    for key in ((1, 4, 0), (2, 2, 0), (2, 2, 1)):
        report = results[key]
        assert report["accumulate"] == [{}] * len(report["accumulate"])
        expected = {"all-reduce"} | ({"reduce-scatter", "all-gather"} if key[0] > 1 else set())
        assert set(report["apply_update"]) == expected
        assert report["evaluate"] == {}
    assert results[1, 4, 0]["apply_update"] == {"all-reduce": 1}
