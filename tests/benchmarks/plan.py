"""How long a plan of one to two million updates takes to make, and how much memory.

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


def recipes() -> dict[str, tuple[bigbatch.Policy, dict[str, float]]]:
    """Policies and lengths."""
    step = bigbatch.step_decay(0.1, 128, 0.9, boundaries_epochs=[30, 60, 80], factor=0.1)
    cosine = bigbatch.cosine(0.1, 128, 0.9, epochs=100)
    small = bigbatch.cosine(0.1, 64, 0.9, epochs=100)
    images = {"train_examples": 1_281_167, "epochs": 100}
    # 15 trillion tokens in sequences of 8,192: the batch from 3 to 12 million tokens over the first
    # trillion, the learning rate a cosine.
    tokens, facts = 15 * 10**12, {"train_examples": 2 * 10**9, "tokens_per_example": 8_192}
    large = bigbatch.adam(bigbatch.cosine(3e-4, 1_536, until_token=tokens, **facts))
    ramp = bigbatch.batch_ramp(
        large, initial_batch_size=384, increment_examples=128, ramp_tokens=10**12, **facts
    )
    return {
        "step decay": (step, images),
        "cosine": (cosine, images),
        "cosine, growing to 8,192 in ones": (
            bigbatch.grow_batch(small, max_batch_size=8192),
            images,
        ),
        "15 trillion tokens, a ramp": (ramp, facts | {"tokens": tokens}),
    }


def main() -> None:
    """Prints a Markdown table."""
    print(f"Python {platform.python_version()}, NumPy {np.__version__}, {os.cpu_count()} cores\n")
    print("| recipe | updates | batch sizes | seconds (min .. max) | peak MB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, (policy, length) in recipes().items():

        def make(policy=policy, length=length) -> bigbatch.Plan:
            plan = bigbatch.make_plan(policy, **length)
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
