"""What the measurement of the noise and reproducible sums add to an update.

    python -m tests.benchmarks.noise [runs] > tests/benchmarks/results/noise_cpu.md

One process, one device, updates of 256 examples (digits, WRN-10-1, ghost batches of 32): every
variant's update in turn, over and over, so that a busy machine slows all of them alike. Printed is
the median of each against that of the plain one, and the quartiles of the ratio to the plain update
of the same round. Where a microbatch is the whole update, small batches smaller than it are written
out within the program, up to eight, or a loop; where a microbatch is one small batch, the host's
loop over microbatches does that.
"""

import platform
import sys
import time

import jax
import numpy as np
from jax.sharding import NamedSharding

from bigbatch.config.config import read_config
from bigbatch.engine import functions as step
from bigbatch.training.microbatches import Request
from tests import trained

UPDATE = 256
PLAIN = "plain: one microbatch of 256"
_NOISE, _MICROBATCH = "noise_small_batch_examples", "microbatch_examples_per_device"
VARIANTS = {
    PLAIN: {},
    **{f"small batches of {n}, in one microbatch of 256": {_NOISE: n} for n in (128, 64, 32)},
    **{f"nothing measured, microbatches of {n}": {_MICROBATCH: n} for n in (128, 64, 32)},
    **{
        f"small batches of {n}, microbatches of {n}": {_NOISE: n, _MICROBATCH: n}
        for n in (128, 64, 32)
    },
    "reproducible, ghost batches of 32, one a call": {"reproducible": True},
}


class Variant:
    """One config's programs and the microbatches of one update."""

    def __init__(self, changes):
        policy = {
            "name": "constant",
            "learning_rate": 0.01,
            "batch_size": UPDATE,
            "momentum": 0.9,
        }
        tree = trained.tree(
            policy=policy, transformations=[], microbatch_examples_per_device=UPDATE
        )
        config = read_config(tree | changes)
        self.run = trained.prepared(config)
        self.state, self.accumulator = self.run.init_state(), self.run.programs.empty_accumulator()
        parts = self.run.layout.microbatches(UPDATE)
        self.parts = [self.run.microbatch(Request(part.offset_examples, part)) for part in parts]
        hyper = {name: np.float32(0.01) for name in self.run.optimizer.hyper_names}
        self.hyper = jax.device_put(hyper, NamedSharding(self.run.mesh, step.REPLICATED))

    def update_s(self) -> float:
        """Seconds of one update."""
        programs, start_s = self.run.programs, time.perf_counter()
        for size, examples in self.parts:
            self.accumulator = programs.accumulate[size](
                self.state, self.accumulator, examples, self.run.frozen
            )
        self.state, self.accumulator, _ = programs.apply_update(
            self.state, self.accumulator, self.hyper
        )
        jax.block_until_ready((self.state, self.accumulator))
        return time.perf_counter() - start_s


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 31
    variants = {name: Variant(changes) for name, changes in VARIANTS.items()}
    for variant in variants.values():
        variant.update_s()
    taken = {name: [] for name in variants}
    for _ in range(runs):
        for name, variant in variants.items():
            taken[name].append(variant.update_s())
    plain = np.array(taken[PLAIN])
    print(f"# Cost of an update: noise measurement and reproducible sums\n\n{__doc__.strip()}\n")
    print(
        f"{jax.devices()[0].device_kind}, {platform.machine()}, 2 shared CPU cores, jax "
        f"{jax.__version__}, Python {platform.python_version()}; {runs} rounds.\n"
    )
    print("| update | median, ms | ratio of medians | quartiles of the ratio |")
    print("| --- | ---: | ---: | ---: |")
    for name, seconds in taken.items():
        low, high = np.percentile(np.array(seconds) / plain, (25, 75))
        median = np.median(seconds)
        cells = (
            f"{1e3 * median:.1f}",
            f"{median / np.median(plain):.3f}",
            f"{low:.2f} to {high:.2f}",
        )
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
