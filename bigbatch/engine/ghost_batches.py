"""Ghost batches, the examples that share batch-norm statistics, on the devices."""

from bigbatch.errors import Problem, UserError

GHOST_STATISTICS = "ghost_statistics"
RUNNING_STATISTICS = "running_statistics"
"""The collections of Flax layers that form ghost batches by themselves, such as `GhostNorm`."""


def devices_per_ghost_batch(
    ghost_batch_examples: int, examples_per_device: int, devices: int
) -> int:
    """How many neighbouring devices share one ghost batch: 1 where each holds whole ones.

    Args:
      ghost_batch_examples: examples that share statistics.
      examples_per_device: each device's share of a microbatch.
      devices: how many there are.

    Raises:
      UserError: the share is neither a multiple of the ghost batch nor an equal part of it that
        the devices can make up.

    >>> devices_per_ghost_batch(128, 32, devices=8)
    4
    """
    if examples_per_device > 0 and examples_per_device % ghost_batch_examples == 0:
        return 1
    parts = [n for n in range(1, devices + 1) if devices % n == 0 and ghost_batch_examples % n == 0]
    shares = [ghost_batch_examples // n for n in parts]
    if examples_per_device not in shares:
        multiple = ghost_batch_examples * max(1, round(examples_per_device / ghost_batch_examples))
        one_of = f"one of {', '.join(map(str, shares))}" if devices > 1 else str(shares[0])
        allowed = (
            f"a multiple of ghost_batch_examples = {ghost_batch_examples}, or with {devices} "
            f"device{'s' * (devices > 1)} {one_of}"
        )
        nearest = min([*shares, multiple], key=lambda share: abs(share - examples_per_device))
        raise UserError(
            Problem("microbatch_examples_per_device", examples_per_device, allowed, nearest)
        )
    return ghost_batch_examples // examples_per_device
