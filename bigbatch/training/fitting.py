"""The microbatch that fits: found by compiling, kept in the working directory, halved at need.

It is a hardware quantity, so all of this may choose it freely: it changes no statistics of a run,
only the order of sums. What is chosen is kept, so that a resume on the same devices cuts its
updates as before, and ends with the same bits.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from jax.sharding import Mesh

from bigbatch import distributed
from bigbatch.data.source import TrainingData
from bigbatch.engine.parts import NONE, Shard
from bigbatch.errors import UserError
from bigbatch.layout import memory
from bigbatch.training.microbatches import MICROBATCHES_IN_FLIGHT
from bigbatch.workdir.files import read_json, write_json

_CHOSEN = "chosen_examples_per_device"
# Of a device's memory, for what lies there all the time, where `shard` is "auto".
_HELD_SHARE = 0.5
# Of the entries that every example has beside its own: weight, key and mask.
_BYTES_BESIDE = 16


def shard_that_fits(
    held_bytes: Callable[[Shard], int],
    others: Iterable[Shard],
    mesh: Mesh,
    device_memory_bytes: int | None,
) -> Shard:
    """How the state is to lie: whole on each device, if that leaves half of the memory to compute.

    Args:
      held_bytes: how it lies -> what a device then holds all the time.
      others: how it may lie otherwise, in the order of what they cost.
      mesh: the devices.
      device_memory_bytes: of each; None for what they report.

    Returns:
      The first that fits; where none does the one that holds least, and "none" where nothing is
      known of the memory.
    """
    try:
        limit_bytes = memory.limit_bytes(mesh, device_memory_bytes)
    except UserError:
        return NONE
    held: dict[Shard, int] = {}
    for shard in (NONE, *others):
        held[shard] = held_bytes(shard)
        if held[shard] <= limit_bytes * _HELD_SHARE:
            return shard
    return min(held, key=held.__getitem__)


class Fitting:
    """Chooses a device's share of a microbatch.

    Args:
      path: a file for the choice; None to keep nothing.
      asked: examples, or "auto".
      device_memory_bytes: of each device, for "auto"; None for what the devices report.
      mesh: the devices.
    """

    def __init__(
        self,
        path: Path | None,
        asked: int | Literal["auto"],
        device_memory_bytes: int | None,
        mesh: Mesh,
    ):
        self._path, self._asked, self._mesh = path, asked, mesh
        self._device_memory_bytes = device_memory_bytes
        self._key = {
            "asked": asked,
            "device_memory_bytes": device_memory_bytes,
            "device_kind": mesh.devices.flat[0].device_kind,
            "devices": mesh.size,
        }

    def examples_per_device(
        self,
        device_bytes: Callable[[int], Mapping[str, int]],
        data: TrainingData,
        *,
        unit: int,
        most: int,
        reproducible: bool,
    ) -> int:
        """What was asked for, or kept, or is now found; all processes must call.

        Args:
          device_bytes: examples per device -> `Programs.device_bytes`; compiles.
          data: which travels to the devices.
          unit: examples of which "auto" gives a multiple.
          most: the most that are of use.
          reproducible: then one unit is.

        Raises:
          UserError: not even one unit fits, or the devices' memory is not known.
        """
        kept = self._kept()
        if kept is not None:
            return kept
        if self._asked != "auto":
            return self._asked
        shapes = data.example_shapes.values()
        one = sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in shapes)
        in_flight = (1 + MICROBATCHES_IN_FLIGHT) * (one + _BYTES_BESIDE)

        held_bytes = data.on_device.nbytes if data.on_device else 0

        def needed_bytes(examples: int) -> int:
            needs = device_bytes(examples)
            # Room for what a checkpoint and an evaluation need beside the updates.
            programs = max(needs["accumulate"], needs["apply_update"]) + needs["state"]
            return programs + in_flight * examples + held_bytes

        limit_bytes = memory.limit_bytes(self._mesh, self._device_memory_bytes)
        most = unit if reproducible else most
        chosen = memory.largest_that_fits(
            needed_bytes, unit=unit, most=most, limit_bytes=limit_bytes
        )
        self.keep(chosen)
        return chosen

    def keep(self, examples_per_device: int) -> None:
        """Keeps a choice for the next start of the run; process 0 writes, all must call."""
        if self._path is not None:
            path, kept = self._path, {**self._key, _CHOSEN: examples_per_device}
            distributed.on_first(lambda: write_json(path, kept))

    def _kept(self) -> int | None:
        """The choice that was kept for the same wish and devices; process 0 reads."""
        path = self._path
        if path is None:
            return None

        def read() -> int | None:
            found = read_json(path) if path.exists() else {}
            chosen: int | None = found.pop(_CHOSEN, None)
            return chosen if found == self._key else None

        own = distributed.together(lambda: read() if distributed.is_first() else None)
        found: int | None = json.loads(distributed.gather(json.dumps(own).encode())[0])
        return found
