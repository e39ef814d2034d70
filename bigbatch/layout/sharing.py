"""Ghost batches that are larger than a device's share.

A layout deals in whole ghost batches. Where a device is too small for one, neighbouring devices
share it: for the layout, such a group is a single device.

>>> layout = layout_over([128, 640], ghost_batch_examples=128, devices=8,
...                      microbatch_examples_per_device=32)
>>> layout.devices, layout.shapes
(2, (128,))
"""

from typing import Any

import numpy as np

from bigbatch.engine.ghost_batches import devices_per_ghost_batch
from bigbatch.errors import Problem, UserError
from bigbatch.layout.layout import Layout, make_layout


def layout_over(
    plan_or_batch_sizes: Any,
    *,
    ghost_batch_examples: int,
    devices: int,
    microbatch_examples_per_device: int,
    noise_small_batch_examples: int | None = None,
    reproducible: bool = False,
) -> Layout:
    """The layout of a run over its devices or, where they share ghost batches, over groups of them.

    Args:
      plan_or_batch_sizes: a plan, or the batch size in examples of each update.
      ghost_batch_examples: examples that share batch-norm statistics.
      devices: how many share the work.
      microbatch_examples_per_device: the most that a device can compute in one call. Less than a
        ghost batch lets neighbours share one.
      noise_small_batch_examples: whole small batches of so many must lie on one device; then no
        ghost batch is shared.
      reproducible: whether every call computes one ghost batch (or small batch) a device: one
        program, whatever the layout, and no ghost batch is shared.

    Returns:
      A layout whose `devices` are groups of `devices / layout.devices` neighbours.

    Raises:
      UserError: the layout cannot be formed.
    """
    small = noise_small_batch_examples
    largest = int(np.max(getattr(plan_or_batch_sizes, "batch_sizes", plan_or_batch_sizes)))
    if small is not None and small >= largest:
        allowed = f"less than {largest}, the largest batch size: the noise is told from two or more"
        half = largest // 2 // ghost_batch_examples * ghost_batch_examples
        raise UserError(Problem("noise_small_batch_examples", small, allowed, half or None))
    if reproducible:
        small = small or ghost_batch_examples
        microbatch_examples_per_device = min(microbatch_examples_per_device, small)
    if small is not None:
        return make_layout(
            plan_or_batch_sizes,
            ghost_batch_examples=ghost_batch_examples,
            devices=devices,
            microbatch_examples_per_device=microbatch_examples_per_device,
            small_batch_examples=small,
        )
    sharing = 1
    if microbatch_examples_per_device < ghost_batch_examples:
        sharing = devices_per_ghost_batch(
            ghost_batch_examples, microbatch_examples_per_device, devices
        )
    return make_layout(
        plan_or_batch_sizes,
        ghost_batch_examples=ghost_batch_examples,
        devices=devices // sharing,
        microbatch_examples_per_device=microbatch_examples_per_device * sharing,
    )
