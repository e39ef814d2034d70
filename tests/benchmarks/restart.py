"""From the start of a process to the first new update of a run that was killed.

    python -m tests.benchmarks.restart [TREE ...] > tests/benchmarks/results/restart.md

TREE are checkouts, by default this one. Each begins a run of its own, with a compilation cache of
its own, which is killed past a checkpoint. Then, by turns, its directory is copied and started
anew, and killed when the log has an update past the checkpoint. The log has an update once the next
one was sent. Processor seconds are those of the process and of what it waited for.
"""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

RUNS = 7
_SMALL = (("ghost_batch_examples", 8), ("microbatch_examples_per_device", 8))
# Name -> config, overrides. The batches of the wide network are small, so that its first update
# says less of the machine's speed than of the start.
WORKS = {
    "digits, WRN-10-1": ("digits.py:increase", (("checkpoint_every_updates", 20),)),
    "CIFAR's shapes, WRN-16-4": (
        "cifar10.py:increase",
        (
            *(("data.name", "arrays"), ("data.path", "{data}"), *_SMALL),
            *(("policy.batch_size", 8), ("evaluation_batch_examples", 8)),
            *(("evaluate_every_epochs", 100), ("checkpoint_every_updates", 2)),
            ("log_every_updates", 1),
        ),
    ),
}


def started(tree: Path, work: str, directory: Path, place: Path) -> subprocess.Popen:
    """`bigbatch train` of a checkout."""
    config, changes = WORKS[work]
    command = [sys.executable, "-m", "bigbatch", "train", f"--config=configs/{config}"]
    command += [f"--config.{k}={str(v).format(data=place / 'data.npz')}" for k, v in changes]
    command += [f"--workdir={directory}", f"--compilation-cache={place / 'programs'}"]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    with (place / "said").open("w") as said:
        return subprocess.Popen(command, cwd=tree, env=environment, stdout=said, stderr=said)


def updates(directory: Path) -> int:
    """The last one in the log."""
    log = directory / "metrics.jsonl"
    lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    return max((json.loads(line)["update"] for line in lines), default=0)


def saved(directory: Path) -> int:
    """Updates done at the newest checkpoint; 0 without one."""
    names = [path.name for path in (directory / "checkpoints").glob("*") if path.name.isdigit()]
    return max(map(int, names), default=0)


def killed_when(process: subprocess.Popen, place: Path, reached) -> tuple[float, float]:
    """Seconds until something is so, and the processor's; the process is then gone."""
    start_s = time.perf_counter()
    while not reached():
        if process.poll() is not None:
            raise SystemExit((place / "said").read_text())
        time.sleep(0.005)
    seconds = time.perf_counter() - start_s
    process.send_signal(signal.SIGKILL)
    _, _, used = os.wait4(process.pid, 0)
    return seconds, used.ru_utime + used.ru_stime


def restart(tree: Path, work: str, place: Path) -> tuple[float, float]:
    """Seconds from the start to the first new update, and the processor's."""
    directory = place / "again"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(place / "run", directory)
    before = saved(directory)
    process = started(tree, work, directory, place)
    # The records after the checkpoint are there until the start drops them.
    dropped: list[bool] = []

    def reached() -> bool:
        dropped[:] = dropped or [True] * (updates(directory) <= before)
        return bool(dropped) and updates(directory) > before

    return killed_when(process, place, reached)


def begin(tree: Path, work: str, place: Path) -> None:
    """A run that was killed past its second checkpoint."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (256, 32, 32, 3), np.uint8)
    labels = np.arange(256) % 10
    parts = {
        f"{p}_{k}": v
        for p in ("train", "test")
        for k, v in (("images", images), ("labels", labels))
    }
    np.savez(place / "data.npz", **parts)
    directory = place / "run"
    process = started(tree, work, directory, place)
    killed_when(process, place, lambda: 0 < saved(directory) < updates(directory))


def main(*trees: str) -> None:
    found = [Path(tree).resolve() for tree in trees or [Path(__file__).parents[2]]]
    print(f"# Restart\n\n{__doc__.strip()}\n")
    print(
        f"{platform.machine()}, {os.cpu_count()} CPU cores, jax {jax.__version__}, Python "
        f"{platform.python_version()}; {RUNS} restarts by turns, medians (quartiles).\n"
    )
    print("| work | commit | wall, s | processor, s |\n| --- | --- | ---: | ---: |")
    for work in WORKS:
        with tempfile.TemporaryDirectory() as base:
            places = {tree: Path(base) / str(number) for number, tree in enumerate(found)}
            for tree, place in places.items():
                place.mkdir()
                begin(tree, work, place)
                restart(tree, work, place)
            taken = {tree: [] for tree in found}
            for _ in range(RUNS):
                for tree, place in places.items():
                    taken[tree].append(restart(tree, work, place))
            for tree, seconds in taken.items():
                command = ["git", "-C", str(tree), "describe", "--always", "--dirty"]
                commit = subprocess.check_output(command, text=True).strip()
                cells = [
                    "{1:.2f} ({0:.2f} to {2:.2f})".format(*np.percentile(column, (25, 50, 75)))
                    for column in zip(*seconds, strict=True)
                ]
                print(f"| {work} | {commit} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
