"""Checkpoints, at update boundaries only, by Orbax.

A checkpoint holds the state (parameters, running statistics, optimizer) and a small JSON record:
how many updates and examples are done, the plan's fingerprint, the seed, the partial sums of the
log, and versions. A planned run needs no more than that to continue exactly.
"""

import hashlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from bigbatch.step import State

_PACKAGES = ("bigbatch", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


class Checkpoints:
    """The checkpoints of one run, the newest two of them kept.

    Args:
      directory: where they are; it is made if it does not exist.
    """

    def __init__(self, directory: Path):
        self._checkpointer = ocp.training.Checkpointer(
            directory.absolute(),
            preservation_policy=ocp.training.preservation_policies.LatestN(2),
            cleanup_tmp_directories=True,
        )

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """The number of updates done at the newest checkpoint and its record; None without one."""
        newest = self._checkpointer.latest
        if newest is None:
            return None
        return newest.step, self._checkpointer.metadata(newest).custom_metadata

    def restore(self, update: int, target: State) -> State:
        """Reads the state at a checkpoint.

        Args:
          update: which one, from `latest`.
          target: shapes, dtypes and shardings to restore to; any number of devices will do.

        Returns:
          The state, on the devices of the target.
        """
        return State(**self._checkpointer.load(update, target._asdict()))

    def save(self, update: int, state: State, record: Mapping[str, Any]) -> None:
        """Starts writing a checkpoint; returns once the state may change again.

        Args:
          update: the number of updates done.
          state: the state after them.
          record: JSON values to keep beside it.
        """
        versions = {package: metadata.version(package) for package in _PACKAGES}
        # The next update donates the buffers of this state while Orbax still writes.
        state = _copy(state)
        self._checkpointer.save_async(
            update, state._asdict(), force=True, custom_metadata={**record, "versions": versions}
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        # Waits until everything is written.
        self._checkpointer.close()


@jax.jit
def _copy(state: State) -> State:
    """The same values in buffers of their own."""
    return jax.tree.map(jnp.copy, state)


def params_sha256(params: Any) -> str:
    """A hash of the parameters' names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
