"""From the command to its answer, or to the first update that is in the log.

    python -m tests.benchmarks.startup [RUNS] > tests/benchmarks/results/startup.md

Each run is a process of its own. *Cold* has an empty compilation cache, *warm* the one that the
cold run before it has filled. The first update is in the log once the second has been sent.
"""

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

CONFIG = "--config=configs/digits.py:increase"


def command_s(arguments: Sequence[str]) -> float:
    """Seconds of a command from its start to its end."""
    start_s = time.perf_counter()
    command = [sys.executable, "-m", "bigbatch", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start_s


def first_update_s(cache: str) -> float:
    """Seconds from the start of `bigbatch train` to the first line of its log."""
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "run" / "metrics.jsonl"
        command = [sys.executable, "-m", "bigbatch", "train", CONFIG, f"--workdir={log.parent}"]
        start_s = time.perf_counter()
        with subprocess.Popen(
            [*command, f"--compilation-cache={cache}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            while not (log.exists() and log.stat().st_size):
                if process.poll() is not None:
                    raise SystemExit("bigbatch train has ended early")
                time.sleep(0.01)
            seconds = time.perf_counter() - start_s
            process.kill()
    return seconds


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    taken: dict[str, list[float]] = {}
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as cache:
            for name, seconds in (
                ("`bigbatch --help`", lambda: command_s(["--help"])),
                ("`bigbatch plan`", lambda: command_s(["plan", CONFIG])),
                ("first update, cold", lambda: first_update_s(cache)),
                ("first update, warm", lambda: first_update_s(cache)),
            ):
                taken.setdefault(name, []).append(seconds())
    print(f"# Start-up, digits\n\n{__doc__.strip()}\n")
    print(
        f"{platform.machine()}, {os.cpu_count()} CPU cores, jax {jax.__version__}, Python "
        f"{platform.python_version()}; {runs} runs by turns, medians and quartiles.\n"
    )
    limits = dict(zip(taken, (0.5, 1.5, 12, 5), strict=True))
    print("| start | seconds | quartiles | limit |\n| --- | ---: | ---: | ---: |")
    for name, seconds in taken.items():
        low, middle, high = np.percentile(seconds, (25, 50, 75))
        print(f"| {name} | {middle:.2f} | {low:.2f} to {high:.2f} | {limits[name]:g} |")


if __name__ == "__main__":
    main()
