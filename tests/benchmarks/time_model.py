"""How well the time model's terms hold: measured updates beside those that two numbers predict.

    python -m tests.benchmarks.time_model

For each work, the model is fitted as `bigbatch bench` does it, on updates of 1 and 3 microbatches
of two sizes; then updates of other sizes and numbers of microbatches are timed and predicted. All
are timed by turns, so that a busy machine slows them alike; each time is a median of `RUNS`.
"""

import os
import platform

import jax

from bigbatch import bench
from bigbatch.config_file import load_config

RUNS = 15
COUNTS = (1, 2, 3, 6, 12, 24)
WORKS = (
    ("digits, WRN-10-1", "configs/digits.py:decay", []),
    (
        "32x32x3, WRN-10-1",
        "configs/cifar10.py:decay",
        [
            ("model.depth", "10"),
            ("model.width", "1"),
            ("microbatch_examples_per_device", "128"),
            ("ghost_batch_examples", "32"),
        ],
    ),
)


def main() -> None:
    """Prints a Markdown table."""
    print(f"{platform.machine()}, {os.cpu_count()} shared cores, jax {jax.__version__}, ", end="")
    print(f"medians of {RUNS} by turns\n")
    print("| work | microbatch | microbatches | measured, ms | model, ms | model / measured |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, reference, overrides in WORKS:
        run = bench.prepared(load_config(reference, overrides))
        sizes = run.layout.shapes
        measured = bench.update_seconds(run, sizes, COUNTS, RUNS)
        fit = bench.fitted(measured, sizes)
        for size in sorted(sizes):
            for count in COUNTS:
                model = fit.update_s + count * (fit.call_s + size / fit.examples_per_s)
                took = measured[size, count]
                print(
                    f"| {name} | {size} | {count} | {1e3 * took:.2f} | {1e3 * model:.2f} | "
                    f"{model / took:.3f} |"
                )


if __name__ == "__main__":
    main()
