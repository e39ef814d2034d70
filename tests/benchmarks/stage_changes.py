"""The speed of the 10 updates after each change of the batch size, beside that of their stage.

    python -m tests.benchmarks.stage_changes [runs] > tests/benchmarks/results/stage_changes_cpu.md

A growing schedule on the digits (WRN-10-1, ghost batches of 32, microbatches of up to 160), one
device, trained by `bigbatch.train`, without evaluations or checkpoints on the way. The examples a
second of each update are those of metrics.jsonl. Printed are, over all runs, the median and the
quartiles of the first 10 updates of a stage and of the rest of it, and the ratio of the time that
the rest's median speed would have taken for the first 10 to what they took, as the median and the
range of the runs. The first stage begins with the run: what the first call costs falls into it.
"""

import json
import platform
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from bigbatch.config.config import read_config
from bigbatch.config.file import load_config
from tests import trained

FIRST = 10


def config():
    """Some 180 updates of 32 examples, 45 of 160 and 49 of 320."""
    tree = load_config("configs/digits.py:increase").tree
    policy = tree["policy"] | {"boundaries_epochs": [4, 9]}
    changes = {"epochs": 20, "evaluate_every_epochs": 20, "checkpoint_every_epochs": 20}
    return read_config(tree | changes | {"policy": policy})


def rates(run) -> dict[int, np.ndarray]:
    """Examples a second of every update of one training, by batch size, in order."""
    with tempfile.TemporaryDirectory() as directory:
        trained.train(run, Path(directory))
        lines = (Path(directory) / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "train_loss" in record]
    found: dict[int, list[float]] = {}
    for record in records[:-1]:
        found.setdefault(record["batch_size"], []).append(record["examples_per_s"])
    return {size: np.array(values) for size, values in found.items()}


def cell(values: np.ndarray) -> str:
    low, middle, high = np.percentile(values, (25, 50, 75))
    return f"{middle:,.0f} ({low:,.0f} to {high:,.0f})"


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    run = trained.prepared(config())
    found = [rates(run) for _ in range(runs)]
    print(f"# Speed after a change of the batch size\n\n{__doc__.strip()}\n")
    print(
        f"{jax.devices()[0].device_kind}, {platform.machine()}, 2 shared CPU cores, jax "
        f"{jax.__version__}, Python {platform.python_version()}; {runs} runs.\n"
    )
    print(f"| batch size | updates | first {FIRST}, examples/s | the rest | ratio |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for size in found[0]:
        firsts = [one[size][:FIRST] for one in found]
        rests = [one[size][FIRST:] for one in found]
        # All updates are of one size: times are as the inverse rates.
        ratios = [
            FIRST / np.median(rest) / np.sum(1 / first)
            for first, rest in zip(firsts, rests, strict=True)
        ]
        ratio = f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        cells = (cell(np.concatenate(firsts)), cell(np.concatenate(rests)), ratio)
        print(f"| {size} | {len(found[0][size])} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
