"""What growth buys: Fashion-MNIST by Wide ResNet 16-4, the paper's schedules in fewer epochs.

    python -m tests.accelerator.growth

writes the 60,000 images that this trains on, 32 x 32 pixels, beside this file, from those that
`bigbatch data prepare fashion_mnist` has prepared. Each schedule is the command's own run; one that
does not end in its time is told to stop, and what it came to is its row.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("fashion_mnist.npz")
# Epochs -> the schedules, and seconds for each.
_SCHEDULES = {
    "30": (("decay", "increase", "increase_lr"), 90),
    "200": (("increase", "decay"), 270),
}


def rows(toy: bool, epochs: str) -> Iterator[dict[str, Any]]:
    """A row for each schedule: how far it came, and its last accuracy."""
    experiments, limit_s = _SCHEDULES[epochs]
    fields: dict[str, Any] = {"epochs": epochs, "data.name": "arrays", "data.path": FILE}
    fields |= {"policy.boundaries_epochs": tuple(int(epochs) * k // 10 for k in (3, 6, 8))}
    fields |= {"model.dtype": "bfloat16", "data.on_device": True}
    fields |= {"microbatch_examples_per_device": 5120, "evaluate_every_epochs": 5}
    with tempfile.TemporaryDirectory() as directory:
        if toy:
            experiments, limit_s = experiments[:1], 900
            fields |= {"data.path": _written(Path(directory) / "toy.npz", "digits", 2, 320)}
            fields |= {"model.depth": 10, "model.width": 1, "model.dtype": "float32"}
            fields |= {"ghost_batch_examples": 32, "policy.batch_size": 32, "epochs": 0.5}
            fields |= {"policy.boundaries_epochs": (0.2, 0.3, 0.4)}
            fields |= {"evaluation_batch_examples": 64, "microbatch_examples_per_device": 32}
        for experiment in experiments:
            yield {"schedule": experiment, "of epochs": fields["epochs"]} | _trained(
                Path(directory) / experiment, experiment, fields, limit_s
            )


def _trained(
    workdir: Path, experiment: str, fields: dict[str, Any], limit_s: float
) -> dict[str, Any]:
    command = [sys.executable, "-m", "bigbatch", "train", f"--workdir={workdir}"]
    command += [f"--config=configs/fashion_mnist_wrn16_4.py:{experiment}"]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            # It saves its state and ends.
            process.terminate()
            status = process.wait()
    # Before its first update nothing is there to save.
    if status not in (0, 128 + signal.SIGTERM, -signal.SIGTERM):
        raise RuntimeError(f"a run ended with status {status}")
    log = workdir / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    records = [json.loads(line) for line in lines]
    result = workdir / "result.json"
    ended = json.loads(result.read_text()) if result.exists() else {}
    found: dict[str, Any] = {}
    for record in records:
        found |= record
    rates = [record["examples_per_s"] for record in records if "examples_per_s" in record]
    return {
        "epoch": found.get("epoch"),
        "updates": found.get("update"),
        "accuracy": found.get("test_accuracy"),
        "s of training": ended.get("seconds"),
        "examples/s": float(np.median(rates)) if rates else None,
        "ended": "at its end" if ended else f"after {limit_s} s",
    }


def _written(file: Path, name: str, pad: int, train_examples: int | None = None) -> Path:
    """A data set's images with a border, as `data.path` takes them."""
    from bigbatch.data import sets

    data = sets.load(name, train_examples=train_examples)
    border = (0, 0), (pad, pad), (pad, pad), (0, 0)
    parts = {"train": data.train, "test": data.test}
    arrays = {f"{part}_images": np.pad(held.images, border) for part, held in parts.items()}
    arrays |= {f"{part}_labels": held.labels for part, held in parts.items()}
    np.savez_compressed(file, **arrays)
    return file


if __name__ == "__main__":
    print(f"{_written(FILE, 'fashion_mnist', 2)}: {os.path.getsize(FILE):,} bytes")
