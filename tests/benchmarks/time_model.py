"""How well the time model's terms hold: measured updates beside those that two numbers predict.

    python -m tests.benchmarks.time_model

For each work, the model is fitted as `bigbatch bench` does it, on updates of 1 and 3 microbatches
of two sizes; updates of other numbers of microbatches are predicted by it, and timed. All are timed
by turns; each time is the lowest of `RUNS`, which is what a busy machine leaves the most alone.
"""

import os
import platform

import jax

from bigbatch.commands import bench
from bigbatch.config.file import load_config

RUNS = 25
COUNTS = (1, 2, 3, 6, 12, 24)
WORKS = (("digits, WRN-10-1", "configs/digits.py:decay", []),)


def main() -> None:
    """Prints a Markdown table."""
    print(f"{platform.machine()}, {os.cpu_count()} shared cores, jax {jax.__version__}, ", end="")
    print(f"lowest of {RUNS} by turns\n")
    print("| work | microbatch | microbatches | measured, ms | model, ms | model / measured |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, reference, overrides in WORKS:
        run = bench.one_device(load_config(reference, overrides))
        sizes = run.layout.shapes
        taken = bench.update_seconds(run, sizes, COUNTS, RUNS)
        measured = {key: min(values) for key, values in taken.items()}
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
