"""How long a report of large logs takes, and how much memory.

    python -m tests.benchmarks.report

20 runs of 100,000 log lines each, with every field that a log can have, in a process of its own.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

RUNS, LINES, TRAIN_EXAMPLES = 20, 100_000, 50_000


def write(root: Path) -> list[Path]:
    """Writes the runs: four experiments of five seeds, an evaluation every 500 updates."""
    made = []
    for number in range(RUNS):
        experiment, seed = f"experiment_{number // 5}", number % 5
        path = root / experiment / f"seed_{seed}"
        path.mkdir(parents=True)
        fields = {"experiment": experiment, "seed": seed, "data": {"name": "synthetic"}}
        (path / "config.json").write_text(json.dumps(fields))
        rng = np.random.default_rng(number)
        noise = np.exp(0.1 * rng.standard_normal(LINES))
        batch_size = 64 * (1 + number // 5)
        with (path / "metrics.jsonl").open("w") as file:
            for line in range(LINES):
                examples = (line + 1) * batch_size
                epoch = examples / TRAIN_EXAMPLES
                record = {
                    "update": line + 1,
                    "examples": examples,
                    "epoch": epoch,
                    "batch_size": batch_size,
                    "learning_rate": 0.1 / (1 + epoch),
                    "momentum": 0.9,
                    "noise_scale": 78.1 / (1 + epoch),
                }
                if line % 500 == 499:
                    record |= {"test_loss": 0.3, "test_accuracy": 0.9}
                else:
                    record |= {
                        "train_loss": float(noise[line] / (1 + epoch)),
                        "examples_per_s": float(1000 * noise[line]),
                        "input_wait_s": 0.0001,
                        "gradient_noise_scale": float(500 * noise[line]),
                        "gradient_noise_scale_error": 20.0,
                        "gradient_square": 0.01,
                        "gradient_variance": 5.0,
                    }
                file.write(json.dumps(record) + "\n")
        made.append(path)
    return made


def main() -> None:
    """Prints one row of a Markdown table."""
    with tempfile.TemporaryDirectory() as root:
        runs = write(Path(root))
        size = sum((path / "metrics.jsonl").stat().st_size for path in runs)
        command = [sys.executable, "-m", "bigbatch", "report", *map(str, runs)]
        start_s = time.perf_counter()
        subprocess.run([*command, f"--out={root}/report"], check=True, capture_output=True)
        took_s = time.perf_counter() - start_s
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        page = (Path(root) / "report" / "report.html").stat().st_size
    print(f"Python {platform.python_version()}, {os.cpu_count()} shared cores\n")
    print("| runs | lines | MB of logs | seconds | CPU seconds | peak MB | page, kB |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    print(
        f"| {RUNS} | {RUNS * LINES:,} | {size / 1e6:.0f} | {took_s:.1f} | "
        f"{used.ru_utime + used.ru_stime:.1f} | {used.ru_maxrss / 1e3:.0f} | {page / 1e3:.0f} |"
    )


if __name__ == "__main__":
    main()
