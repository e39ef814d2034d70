"""Evaluation: every test example exactly once, with the running statistics."""

import numpy as np

from bigbatch import microbatches
from bigbatch.reestimate import reestimate
from bigbatch.run import Run
from bigbatch.step import State


def evaluate(run: Run, state: State) -> dict[str, float]:
    """The loss and accuracy on the test set.

    Args:
      run: the prepared run.
      state: its parameters and running statistics are used.

    Returns:
      `test_loss` (nats) and `test_accuracy` (a share), means over all test examples.
    """
    if run.config.reestimate_examples is not None:
        state = reestimate(run, state)
    totals: dict[str, float] = {}
    size = run.mesh.size * run.evaluation_examples_per_device
    for first in range(0, len(run.data.test), size):
        last = min(first + size, len(run.data.test))
        examples = {
            "image": run.data.test.images[first:last],
            "label": run.data.test.labels[first:last],
        }
        sums = run.programs.evaluate(state, microbatches.place(examples, size, None, run.mesh))
        # Summed on the host in float64: no number of devices changes more than the last bits.
        for name, per_device in sums.items():
            totals[name] = totals.get(name, 0.0) + float(np.asarray(per_device, np.float64).sum())
    count = totals["count"]
    return {
        "test_loss": totals["loss"] / count,
        "test_accuracy": totals["correct"] / count,
    }
