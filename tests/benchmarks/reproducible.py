"""How near reproducible sums are to the true sums.

    python -m tests.benchmarks.reproducible > tests/benchmarks/results/reproducible_rounding.md

The float32 gradients of 64 ghost batches of 32 examples (digits, WRN-10-1 at its start), summed in
float32 one after the other, and as integers, against their sum in float64. Of each tensor the root
mean square of the errors is divided by that of its sums, and the largest error by the largest sum;
printed are the median tensor and the worst.
"""

import platform

import jax
import numpy as np

from bigbatch.data import stream
from bigbatch.engine import exact_sums
from bigbatch.models.classification import image_classification
from tests import trained

GHOST, GHOSTS = 32, 64


def gradients() -> list[list[np.ndarray]]:
    """Of each ghost batch, leaf by leaf."""
    prepared = trained.prepared(trained.config())
    data = prepared.data
    module = prepared.config.model.module(num_classes=10, ghost_batch_examples=GHOST)
    task = image_classification(module, data.image_shape, data.mean, data.std)
    state = prepared.init_state()

    @jax.jit
    def gradient(examples):
        def loss(params):
            outputs, _ = task.apply(params, state.running_statistics, examples, True)
            return task.loss(outputs, examples)["loss"]

        return jax.grad(loss)(state.params)

    found = []
    for ghost in range(GHOSTS):
        examples = dict(stream.examples(data.train, 0, ghost * GHOST, GHOST))
        examples["weight"] = np.ones(GHOST, np.float32)
        found.append([np.asarray(leaf) for leaf in jax.tree.leaves(gradient(examples))])
    return found


def rounding() -> list[str]:
    """The table of the errors."""
    addends = gradients()
    true = [np.sum(leaves, axis=0, dtype=np.float64) for leaves in zip(*addends, strict=True)]
    plain = [np.zeros_like(leaf) for leaf in addends[0]]
    exact = exact_sums.zeros(addends[0])
    largest = [max(np.abs(leaf).max() for leaf in leaves) for leaves in zip(*addends, strict=True)]
    # A bound as it is after an update: so much room above the largest.
    exponents, _ = exact_sums.next_bounds(
        np.array(largest, np.float32), exact_sums.first_exponents(true)
    )
    add = jax.jit(exact_sums.add)
    for addend in addends:
        plain = [a + b for a, b in zip(plain, addend, strict=True)]
        exact = add(exact, addend, exponents)
    total, _ = exact_sums.total(exact_sums.parts(exact.words), exact.largest, exponents)
    ours = [np.asarray(leaf) for leaf in total]
    lines = [
        "| sums | rms error, median | rms error, worst | largest error, worst |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, sums in (("float32, one after the other", plain), ("reproducible", ours)):
        errors = [np.abs(a - b) for a, b in zip(sums, true, strict=True)]
        pairs = list(zip(errors, true, strict=True))
        rms = [np.sqrt(np.mean(e**2) / np.mean(t**2)) for e, t in pairs]
        most = [e.max() / np.abs(t).max() for e, t in pairs]
        lines.append(f"| {name} | {np.median(rms):.1e} | {max(rms):.1e} | {max(most):.1e} |")
    return lines


def main() -> None:
    print(f"# Reproducible sums: rounding\n\n{__doc__.strip()}\n")
    print(
        f"{jax.devices()[0].device_kind}, {platform.machine()}, jax {jax.__version__}, Python "
        f"{platform.python_version()}.\n"
    )
    print("\n".join(rounding()))


if __name__ == "__main__":
    main()
