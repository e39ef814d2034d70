"""Training with batch sizes that grow.

The arithmetic, which needs no device, is here; training is in `bigbatch.training.loop`.

>>> import bigbatch
>>> recipe = bigbatch.step_decay(0.1, 128, 0.9, boundaries_epochs=[60, 120, 160], factor=0.2)
>>> growing = bigbatch.grow_batch(recipe, max_batch_size=5120)
>>> plan = bigbatch.make_plan(growing, train_examples=50_000, epochs=200)
>>> plan.num_updates
29142
"""

from bigbatch.layout.layout import Layout, make_layout
from bigbatch.schedule.plan import Plan, make_plan
from bigbatch.schedule.policy import (
    POLICIES,
    Policy,
    batch_ramp,
    batch_stages,
    constant,
    cosine,
    exponential,
    from_optax,
    polynomial,
    stages,
    step_decay,
    warmup,
    warmup_stable_decay,
)
from bigbatch.schedule.transform import (
    TRANSFORMATIONS,
    adam,
    doubling_only,
    grow_batch,
    raise_momentum,
    scale,
    with_rule,
)

__all__ = [
    "POLICIES",
    "TRANSFORMATIONS",
    "Layout",
    "Plan",
    "Policy",
    "adam",
    "batch_ramp",
    "batch_stages",
    "constant",
    "cosine",
    "doubling_only",
    "exponential",
    "from_optax",
    "grow_batch",
    "make_layout",
    "make_plan",
    "polynomial",
    "raise_momentum",
    "scale",
    "stages",
    "step_decay",
    "warmup",
    "warmup_stable_decay",
    "with_rule",
]
