"""How long a plan of a million updates takes to make, and how much memory.

    python -m tests.benchmarks.plan

Each row is made `RUNS` times; time is the median, with minimum and maximum. Memory is the peak that
tracemalloc sees in a run of its own, since tracing slows everything down.
"""

import os
import platform
import statistics
import time
import tracemalloc

import numpy as np

import bigbatch

RUNS = 7
TRAIN_EXAMPLES = 1_281_167


def recipes() -> dict[str, tuple[bigbatch.Policy, float]]:
    """Policies and lengths whose plans have about a million updates."""
    step = bigbatch.step_decay(0.1, 128, 0.9, boundaries_epochs=[30, 60, 80], factor=0.1)
    cosine = bigbatch.cosine(0.1, 128, 0.9, epochs=100)
    small = bigbatch.cosine(0.1, 64, 0.9, epochs=100)
    return {
        "step decay": (step, 100),
        "cosine": (cosine, 100),
        "cosine, growing to 8,192 in ones": (bigbatch.grow_batch(small, max_batch_size=8192), 100),
    }


def main() -> None:
    """Prints a Markdown table."""
    print(f"Python {platform.python_version()}, NumPy {np.__version__}, {os.cpu_count()} cores\n")
    print("| recipe | updates | batch sizes | seconds (min .. max) | peak MB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, (policy, epochs) in recipes().items():

        def make(policy=policy, epochs=epochs) -> bigbatch.Plan:
            plan = bigbatch.make_plan(policy, train_examples=TRAIN_EXAMPLES, epochs=epochs)
            # What a run reads of it.
            _ = plan.first_examples, plan.noise_scales, plan.fingerprint
            return plan

        seconds = []
        for _ in range(RUNS):
            start = time.perf_counter()
            plan = make()
            seconds.append(time.perf_counter() - start)
        sizes = len(np.unique(plan.batch_sizes))
        del plan
        tracemalloc.start()
        plan = make()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        print(
            f"| {name} | {plan.num_updates:,} | {sizes:,} | {statistics.median(seconds):.2f} "
            f"({min(seconds):.2f} .. {max(seconds):.2f}) | {peak / 1e6:.0f} |"
        )


if __name__ == "__main__":
    main()
