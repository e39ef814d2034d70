"""The memory that runs of one's own cost: `python -m tests.test_own_memory NAME ...` for each."""

import ctypes
import gc
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import bigbatch as bb
from tests.own import frozen_backbone, mapped_tokens
from tests.own.regression import squared_error

MIB = 2**20


def status(field: str) -> int:
    """Bytes of memory of this process: `VmRSS` now, `VmHWM` at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise ValueError(field)


def measured(*arguments: str) -> list[float]:
    """What `main` prints."""
    command = [sys.executable, "-m", "tests.test_own_memory", *arguments]
    root = Path(__file__).parents[1]
    text = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout
    return [float(number) for number in text.split()]


@pytest.mark.long
def test_a_hundred_runs_leave_nothing_behind():
    second, last = measured("runs", "100")
    assert last < 1.05 * second


@pytest.mark.long
def test_a_frozen_backbone_costs_its_bytes_once(tmp_path):
    (without,), (with_it,) = (
        measured("frozen", str(tmp_path / name), name) for name in ("8", "819200")
    )
    assert 0.5 * 200 * MIB < with_it - without < 1.15 * 200 * MIB
    for name in ("8", "819200"):
        saved = (tmp_path / name / "checkpoints").rglob("*")
        assert sum(path.stat().st_size for path in saved if path.is_file()) < MIB


@pytest.mark.long
def test_a_mapped_file_of_2_gb_costs_less_than_100_mb(tmp_path):
    found = []
    for num_bytes in (16 * MIB, 2048 * MIB):
        path = tmp_path / str(num_bytes)
        with path.open("wb") as file:
            for first in range(0, num_bytes // 2, 8 * MIB):
                np.arange(first, first + min(8 * MIB, num_bytes // 2), dtype=np.uint32).astype(
                    np.uint16
                ).tofile(file)
        found += measured("mapped", str(path))
    assert found[1] - found[0] < 100 * MIB


def runs(count: str) -> None:
    """Memory after the second run and after the last, each with arrays of 4 MB of its own."""
    plan = bb.make_plan(bb.constant(0.01, 16, 0.9), train_examples=40_000, epochs=0.002)
    for number in range(int(count)):
        x = np.random.default_rng(number).normal(size=(40_000, 25)).astype(np.float32)
        task = bb.Task(
            init=lambda key: ({"w": jnp.zeros(25)}, {}),
            # The task holds the array too.
            apply=lambda p, s, examples, train, x=x: (examples["x"] @ p["w"] + float(x[0, 0]), {}),
            loss=squared_error,
        )
        data = bb.Data({"x": x, "y": x[:, 0]})
        bb.fit(bb.prepare(task, data, plan, bb.Momentum(), microbatch_examples_per_device=16))
        if number in (1, int(count) - 1):
            gc.collect()
            # What the C library keeps of freed memory is in no one's use.
            ctypes.CDLL(None).malloc_trim(0)
            print(status("VmRSS"))


def frozen(directory: str, rows: str) -> None:
    run = frozen_backbone.prepare(backbone=lambda: jnp.ones((int(rows), 64)))
    bb.train(run, directory)
    print(status("VmHWM"))


def mapped(path: str) -> None:
    """The most memory of 1,000 updates of 64 sequences from all over the file."""
    sequences = os.path.getsize(path) / (2 * mapped_tokens.LENGTH)
    bb.fit(mapped_tokens.prepare(path, epochs=64_000 / sequences))
    print(status("VmHWM"))


if __name__ == "__main__":
    {"runs": runs, "frozen": frozen, "mapped": mapped}[sys.argv[1]](*sys.argv[2:])
