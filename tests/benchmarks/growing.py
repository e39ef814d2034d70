"""A schedule through four batch sizes, end to end, against the ways that others know.

    python -m tests.benchmarks.growing run RUNS.jsonl ROUNDS [NAME ...]
        [--torch=PYTHON] [--devices=N]
    python -m tests.benchmarks.growing table RUNS.jsonl > tests/benchmarks/results/growing.md

Handwritten digits, WRN-10-1, 30 epochs; the learning rate's three decays by 2 become batch sizes of
32, 64, 128 and 256. Every run is a process of its own without a compilation cache, one of each by
turns; the seconds are those of the process from its start to its end, Python's and the imports
included. All JAX peers have the same network with ghost batches of 32 and evaluate after each
epoch; PyTorch, given an interpreter that has it, accumulates gradients of microbatches of 32, which
is its ghost batch. `bigbatch train` alone also writes a log of every update, event files and
checkpoints. What each peer does is in `growing_peers.py` and `growing_torch.py`.

On several (virtual) devices the batches are of 64 to 512 examples, the ghost batches are a device's
part of 64, and all are data parallel over a mesh: the peers' arrays sharded, the rest XLA's. There
every program with a collective is waited for, as XLA's CPU client needs it; ours has one an update.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TORCH = "PyTorch, gradient accumulation"
NAMES = (
    "bigbatch train",
    "bigbatch as a library",
    "jit per batch size",
    "optax.MultiSteps",
    "optax.microbatching",
    "Flax example's loop",
)


def tree(epochs: float = 30.0, devices: int = 1) -> dict:
    """The config: `configs/digits.py:increase` with decays by 2."""
    boundaries = [0.3 * epochs, 0.6 * epochs, 0.8 * epochs]
    base = 32 if devices == 1 else 64
    return {
        "seed": 0,
        "epochs": epochs,
        "ghost_batch_examples": base // devices,
        "data": {"name": "digits"},
        "model": {"name": "wide_resnet", "depth": 10, "width": 1, "strides": [1, 2, 1]},
        "optimizer": {"name": "momentum", "weight_decay": 5e-4},
        "policy": {
            "name": "step_decay",
            "learning_rate": 0.1,
            "batch_size": base,
            "momentum": 0.9,
            "boundaries_epochs": boundaries,
            "factor": 0.5,
        },
        "transformations": [{"name": "grow_batch", "max_batch_size": 8 * base}],
        "microbatch_examples_per_device": base // devices,
        "evaluation_batch_examples": 360,
        "log_every_updates": 1,
        "evaluate_every_epochs": 1,
        "checkpoint_every_epochs": 10,
    }


def write_setting(directory: Path, epochs: float, devices: int) -> None:
    """What all peers read."""
    from bigbatch.config.config import read_config
    from bigbatch.data import sets

    settings = tree(epochs, devices)
    plan = read_config(settings).plan
    data = sets.load("digits")
    (directory / "config.json").write_text(json.dumps(settings))
    rows = {
        "batch_sizes": plan.batch_sizes.tolist(),
        "rates": plan.hypers["learning_rate"].tolist(),
        "devices": devices,
    }
    (directory / "plan.json").write_text(json.dumps(rows))
    np.savez(
        directory / "data.npz",
        train_images=data.train.images,
        train_labels=data.train.labels,
        test_images=data.test.images,
        test_labels=data.test.labels,
        mean=np.asarray(data.mean),
        std=np.asarray(data.std),
    )


def run(
    path: Path, rounds: int, torch: str | None, names: list[str], epochs: float, devices: int
) -> None:
    """Runs each peer so often, by turns, and appends what they found to a file."""
    names = names or [*NAMES, *([TORCH] if torch else [])]
    with tempfile.TemporaryDirectory() as directory:
        write_setting(Path(directory), epochs, devices)
        for _ in range(rounds):
            for name in names:
                module = f"tests.benchmarks.growing_{'torch' if name == TORCH else 'peers'}"
                python = torch if name == TORCH else sys.executable
                start_s = time.perf_counter()
                done = subprocess.run(
                    [str(python), "-m", module, name, directory],
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                seconds = time.perf_counter() - start_s
                found = json.loads(done.stdout.splitlines()[-1])
                with path.open("a") as file:
                    record = {"name": name, "wall_s": seconds, "devices": devices, **found}
                    file.write(json.dumps(record) + "\n")


def table(path: Path) -> str:
    """The runs of a file as a page."""
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    by_name: dict[str, list[dict]] = {}
    for one in runs:
        by_name.setdefault(one["name"], []).append(one)
    ours = np.median([one["wall_s"] for one in by_name[NAMES[0]]])
    lines = [
        f"# A growing schedule end to end\n\n{__doc__.strip()}\n",
        f"{platform.machine()}, {os.cpu_count()} CPU cores, {runs[0]['devices']} device"
        f"{'s' * (runs[0]['devices'] > 1)}, Python {platform.python_version()}; "
        f"{', '.join(sorted({one['version'] for one in runs}))}. Medians, and quartiles; the ratio "
        "is of medians.\n",
        "| trained by | runs | seconds | quartiles | over `bigbatch train` | compilations | "
        "seconds of them | peak MiB | test accuracy |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, found in by_name.items():
        column = {
            key: np.array([one[key] for one in found]) for key in found[0] if key != "version"
        }
        wall = column["wall_s"]
        low, high = np.percentile(wall, (25, 75))
        cells = (
            name,
            str(len(found)),
            f"{np.median(wall):.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{np.median(wall) / ours:.2f}",
            f"{np.median(column['compilations']):.0f}",
            f"{np.median(column['compilation_s']):.2f}",
            f"{np.median(column['peak_mib']):.0f}",
            f"{100 * np.median(column['accuracy']):.1f} %",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    arguments = [a for a in sys.argv[1:] if not a.startswith("--")]
    options = dict(a[2:].split("=", 1) for a in sys.argv[1:] if a.startswith("--"))
    verb, path, *rest = arguments
    if verb == "table":
        print(table(Path(path)))
    else:
        epochs = float(options.get("epochs", 30))
        devices = int(options.get("devices", 1))
        run(Path(path), int(rest[0]), options.get("torch"), rest[1:], epochs, devices)


if __name__ == "__main__":
    main()
