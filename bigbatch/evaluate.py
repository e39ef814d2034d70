"""Evaluation: every test example exactly once, with the running statistics."""

from collections.abc import Mapping

import numpy as np

from bigbatch import microbatches
from bigbatch.reestimate import reestimate
from bigbatch.run import Run, Updates
from bigbatch.sources import Source
from bigbatch.step import State


def evaluate(run: Run, state: State) -> dict[str, float]:
    """The loss and accuracy on the test set.

    Args:
      run: the prepared run.
      state: its parameters, or their average, and its running statistics are used; the latter are
        estimated anew first where the config asks for it.

    Returns:
      `test_loss` (nats) and `test_accuracy` (a share), means over all test examples.
    """
    if run.config.reestimate_examples is not None:
        state = reestimate(run, state)
    totals = source_sums(run, state, run.test_source, run.data.test_examples)
    count = totals["count"]
    return {
        "test_loss": totals["loss"] / count,
        "test_accuracy": totals["correct"] / count,
    }


def sums(run: Updates, state: State, arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What the task's loss returns, summed over all the examples of some arrays.

    Args:
      run: from `run.prepare` or `own_task.prepare_task`.
      state: its parameters, or their average, and its running statistics are used.
      arrays: [examples, ...] by name, shaped as in training.

    Returns:
      The sums by name, over the examples with their weights.
    """

    def source(first_example: int, num_examples: int) -> dict[str, np.ndarray]:
        part = slice(first_example, first_example + num_examples)
        return {name: array[part] for name, array in arrays.items()}

    return source_sums(run, state, source, len(next(iter(arrays.values()))))


def source_sums(run: Updates, state: State, source: Source, num_examples: int) -> dict[str, float]:
    """What the task's loss returns, summed over the first examples of a source.

    Args:
      run: from `run.prepare` or `own_task.prepare_task`.
      state: its parameters, or their average, and its running statistics are used.
      source: gives the examples, shaped as in training.
      num_examples: how many there are.

    Returns:
      The sums by name, over the examples with their weights.
    """
    totals: dict[str, float] = {}
    size = run.mesh.size * run.evaluation_examples_per_device
    for first in range(0, num_examples, size):
        examples = source(first, min(size, num_examples - first))
        part = run.programs.evaluate(state, microbatches.place(examples, size, None, run.mesh))
        # Summed on the host in float64: no number of devices changes more than the last bits.
        for name, per_device in part.items():
            totals[name] = totals.get(name, 0.0) + float(np.asarray(per_device, np.float64).sum())
    return totals
