"""Evaluation: every test example exactly once, with the running statistics."""

from collections.abc import Mapping

import jax
import numpy as np

from bigbatch import distributed
from bigbatch.config.assemble import Source
from bigbatch.engine.functions import State
from bigbatch.layout import memory
from bigbatch.training import microbatches
from bigbatch.training.preemption import StopRequest
from bigbatch.training.reestimate import reestimate
from bigbatch.training.run import Run, Updates


def evaluate(run: Run, state: State, stop: StopRequest | None = None) -> dict[str, float]:
    """The loss and accuracy on the test set.

    Args:
      run: the prepared run.
      state: its parameters, or their average, and its running statistics are used; the latter are
        estimated anew first where the config asks for it.
      stop: is asked before every microbatch.

    Returns:
      `test_loss` (nats) and `test_accuracy` (a share), means over all test examples.

    Raises:
      StopNoticeError: `stop` says so.
    """
    if run.config.reestimate_examples is not None:
        state = reestimate(run, state)
    totals = source_sums(run, state, run.test_source, run.data.test_examples, stop)
    count = totals["count"]
    return {
        "test_loss": totals["loss"] / count,
        "test_accuracy": totals["correct"] / count,
    }


def sums(
    run: Updates,
    state: State,
    arrays: Mapping[str, np.ndarray],
    stop: StopRequest | None = None,
) -> dict[str, float]:
    """What the task's loss returns, summed over all the examples of some arrays.

    Args:
      run: from `run.prepare` or `own_task.prepare_task`.
      state: its parameters, or their average, and its running statistics are used.
      arrays: [examples, ...] by name, shaped as in training.
      stop: is asked before every microbatch.

    Returns:
      The sums by name, over the examples with their weights.
    """

    def source(first: int, number: int) -> dict[str, np.ndarray]:
        return {name: array[first : first + number] for name, array in arrays.items()}

    return source_sums(run, state, source, len(next(iter(arrays.values()))), stop)


def source_sums(
    run: Updates,
    state: State,
    source: Source,
    num_examples: int,
    stop: StopRequest | None = None,
) -> dict[str, float]:
    """What the task's loss returns, summed over the first examples of a source.

    Every process evaluates the examples of its own devices; together they count each once.

    Args:
      run: from `run.prepare` or `own_task.prepare_task`.
      state: its parameters, or their average, and its running statistics are used.
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
            part = run.programs.evaluate(
                state, microbatches.place(source, first, present, size, None, run.mesh)
            )
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
