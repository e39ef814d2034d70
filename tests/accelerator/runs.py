"""Runs on noise that lies on the device: their bare compiled functions, and how fast those are."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bigbatch.commands import bench
from bigbatch.config import assemble
from bigbatch.config.file import load_config
from bigbatch.engine.functions import data_mesh
from bigbatch.training.microbatches import Request
from bigbatch.training.run import Run

# Of the stretches that a rate is the median of.
_STRETCHES = 9
# So many examples differ.
_MOST_EXAMPLES = 1_024


def run_of(reference: str, changes: Mapping[str, Any], sizes: Sequence[int], **options: Any) -> Run:
    """A config's run on one device, whose updates are of the given sizes.

    Args:
      reference: of the config.
      changes: of its fields; a microbatch is by default the largest update.
      sizes: examples of each update.
      **options: of `prepare`.
    """
    own = {"microbatch_examples_per_device": max(sizes), "evaluation_batch_examples": min(sizes)}
    config = load_config(reference, [(name, str(value)) for name, value in (own | changes).items()])
    rows = {name: column[:1].repeat(len(sizes)) for name, column in config.plan.hypers.items()}
    plan = dataclasses.replace(config.plan, batch_sizes=np.array(sizes), hypers=rows)
    noise = bench.stand_ins(config, min(_MOST_EXAMPLES, max(sizes)))
    return assemble.prepared(config, plan, mesh=data_mesh(jax.devices()[:1]), **noise, **options)


def bare(run: Run) -> Callable[[int], None]:
    """Makes the first update of a run so many times, and waits."""
    row = run.plan.row(0)
    parts = [
        run.microbatch(Request(part.offset_examples, part))
        for part in run.layout.microbatches(row.batch_size)
    ]
    parts = [(size, jax.device_put(dict(examples))) for size, examples in parts]
    hyper = {name: np.float32(row.hyper[name]) for name in run.optimizer.hyper_names}
    hyper, programs = jax.device_put(hyper), run.programs
    own: list[Any] = [run.first_state(), programs.empty_accumulator()]

    def update(count: int) -> None:
        state, accumulator = own
        for _ in range(count):
            for size, examples in parts:
                accumulator = programs.accumulate[size](state, accumulator, examples, run.frozen)
            state, accumulator, _ = programs.apply_update(state, accumulator, hyper)
        own[:] = jax.block_until_ready((state, accumulator))

    return update


def seconds_of(update: Callable[[int], None], budget_s: float) -> np.ndarray:
    """Quartiles of the seconds of an update, over stretches, after some of warming up.

    Args:
      update: makes so many.
      budget_s: that all stretches should take; 0 for one update.
    """
    update(1)
    start_s = time.perf_counter()
    update(3 if budget_s else 1)
    taken_s = (time.perf_counter() - start_s) / 3
    count = max(1, round(budget_s / _STRETCHES / taken_s))
    found = []
    for _ in range(_STRETCHES if budget_s else 1):
        start_s = time.perf_counter()
        update(count)
        found.append((time.perf_counter() - start_s) / count)
    return np.percentile(found, (25, 50, 75))
