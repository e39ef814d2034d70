"""Evaluation: every test example exactly once, with the running statistics."""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from bigbatch import distributed
from bigbatch.engine.functions import State
from bigbatch.layout import memory
from bigbatch.training import microbatches
from bigbatch.training.microbatches import Source
from bigbatch.training.preemption import StopRequest
from bigbatch.training.restore import newest
from bigbatch.training.run import Run


def evaluate(
    run: Run, state: State | str | Path, stop: StopRequest | None = None
) -> dict[str, float]:
    """The loss and the task's metrics on the test examples.

    Args:
      run: the prepared run.
      state: its running statistics are used, and its parameters, or what its optimizer evaluates
        with; or the run's directory, for its newest state.
      stop: is asked before every microbatch.

    Returns:
      `test_loss`, and `test_NAME` for each of the task's metrics: sums over all test examples,
      divided by their count; nothing where there are no test examples.

    Raises:
      StopNoticeError: `stop` says so.
    """
    if not run.data.test_examples:
        return {}
    if not isinstance(state, State):
        state, _ = newest(run, state)
    totals = source_sums(run, state, run.data.evaluation, run.data.test_examples, stop)
    return {f"test_{name}": value for name, value in run.task.quotients(totals).items()}


def sums(
    run: Run,
    state: State,
    arrays: Mapping[str, np.ndarray],
    stop: StopRequest | None = None,
) -> dict[str, float]:
    """What the task's loss returns, summed over all the examples of some arrays.

    Args:
      run: the prepared run.
      state: as in `evaluate`.
      arrays: [examples, ...] by name, shaped as in training.
      stop: is asked before every microbatch.

    Returns:
      The sums by name, over the examples with their weights.
    """

    def source(first: int, number: int) -> dict[str, np.ndarray]:
        return {name: array[first : first + number] for name, array in arrays.items()}

    return source_sums(run, state, source, len(next(iter(arrays.values()))), stop)


def source_sums(
    run: Run,
    state: State,
    source: Source,
    num_examples: int,
    stop: StopRequest | None = None,
) -> dict[str, float]:
    """What the task's loss returns, summed over the first examples of a source.

    Every process evaluates the examples of its own devices; together they count each once.

    Args:
      run: the prepared run.
      state: as in `evaluate`.
      source: gives the examples, shaped as in training.
      num_examples: how many there are.
      stop: is asked before every microbatch.

    Returns:
      The sums by name, over the examples with their weights; the same on every process.
    """
    totals: dict[str, np.ndarray] = {}
    size = run.mesh.size * run.evaluation_examples_per_device
    for first in range(0, num_examples, size):
        if stop is not None:
            stop.check()
        present = min(size, num_examples - first)
        try:
            examples = microbatches.place(source, first, present, size, None, run.mesh)
            part = run.programs.evaluate(state, examples, run.frozen)
            # Summed on the host in float64, by device: the number of processes changes nothing.
            for name, per_device in part.items():
                total = totals.setdefault(name, np.zeros(run.mesh.size))
                for shard in per_device.addressable_shards:
                    total[shard.index] += np.asarray(shard.data, np.float64)
        except jax.errors.JaxRuntimeError as error:
            advice = "set evaluation_batch_examples lower"
            raise memory.exhausted(error, "the evaluation", advice) from error
    names = sorted(totals)
    own = np.stack([totals[name] for name in names])
    everyone = [np.frombuffer(text) for text in distributed.gather(own.tobytes())]
    return dict(zip(names, np.sum(everyone, axis=0).reshape(own.shape).sum(axis=1), strict=True))
