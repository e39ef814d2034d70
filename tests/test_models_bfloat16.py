"""Training on the digits with bfloat16 activations, against float32."""

import jax
import numpy as np
import pytest

from bigbatch import train
from bigbatch.config import read_config
from bigbatch.evaluate import evaluate
from tests import trained

POLICY = {
    "name": "step_decay",
    "learning_rate": 0.1,
    "batch_size": 32,
    "momentum": 0.9,
    "boundaries_epochs": [3, 5],
    "factor": 0.2,
}


def accuracies(dtype, seeds, **changes):
    """Test accuracy of each seed, and the dtypes that the parameters end with."""
    model = {"name": "wide_resnet", "depth": 10, "width": 1, "strides": [2, 1, 1], "dtype": dtype}
    found, dtypes = [], set()
    for seed in seeds:
        tree = trained.tree() | {"model": model, "seed": seed, "policy": POLICY} | changes
        run = trained.prepared(read_config(tree))
        *_, (_, state, _) = train.updates(run, run.init_state(), 0)
        found.append(evaluate(run, state)["test_accuracy"])
        dtypes |= {str(leaf.dtype) for leaf in jax.tree.leaves(state)}
    assert dtypes <= {"float32", "int32"}
    return np.array(found)


@pytest.mark.xfail(
    tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 12),
    reason="jax 0.12.0 on CPU: the compiled evaluation in bfloat16 gives NaN, at every size tried",
    strict=True,
)
def test_a_short_run_in_bfloat16_learns_what_one_in_float32_does():
    """One seed: two runs that differ in nothing but rounding, on 360 test images.

    Where each misses 3 %, the difference has a standard deviation of at most
    sqrt(2 * 0.03 / 360) = 1.3 points.
    """
    changes = {"epochs": 6, "microbatch_examples_per_device": 160}
    float32, bfloat16 = (accuracies(dtype, [0], **changes) for dtype in ("float32", "bfloat16"))
    assert float32 > 0.95
    assert abs(float32 - bfloat16) < 0.026


@pytest.mark.long
def test_bfloat16_reaches_the_accuracy_of_float32_within_half_a_point():
    changes = {
        "epochs": 30,
        "policy": POLICY | {"boundaries_epochs": [9, 18, 24]},
        "transformations": [{"name": "grow_batch", "max_batch_size": 320}],
        "microbatch_examples_per_device": 320,
    }
    float32, bfloat16 = (
        accuracies(dtype, range(5), **changes) for dtype in ("float32", "bfloat16")
    )
    print(f"float32 {float32.mean():.4f} {float32}, bfloat16 {bfloat16.mean():.4f} {bfloat16}")
    assert float32.mean() > 0.98
    assert abs(float32.mean() - bfloat16.mean()) <= 0.005
