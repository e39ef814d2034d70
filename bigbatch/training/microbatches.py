"""From the example stream to microbatches on the devices.

Every process makes the examples of its own devices only, which are neighbours in the mesh: one
range of each microbatch.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from bigbatch import distributed
from bigbatch.data import on_device, stream
from bigbatch.data.source import TrainingData
from bigbatch.engine import functions
from bigbatch.engine.task import Examples
from bigbatch.layout.layout import Layout, Microbatch
from bigbatch.schedule.plan import Plan

# Microbatches made ahead of the device: enough to hide their making, few enough for host memory.
MICROBATCHES_IN_FLIGHT = 4
# A call brings so much to a single device itself, faster than a put of its own would.
_SMALL_BYTES = 2**16


# Gives a range of examples: (position of the first, how many) -> arrays by name.
Source = Callable[[int, int], Mapping[str, np.ndarray]]


class Request(NamedTuple):
    """One microbatch of one update.

    Attributes:
      first_example: position in the stream of its first example.
      part: its place in the update, and its shape.
    """

    first_example: int
    part: Microbatch


def requests(plan: Plan, layout: Layout, first_update: int, end_update: int) -> Iterator[Request]:
    """All microbatches from an update on, in order, up to those before `end_update`."""
    for update in range(first_update, end_update):
        row = plan.row(update)
        for part in layout.microbatches(row.batch_size):
            yield Request(row.first_example + part.offset_examples, part)


def place(
    source: Source,
    first_example: int,
    present: int,
    size: int,
    ghost_batch_examples: int | None,
    mesh: Mesh,
) -> dict[str, Any]:
    """Makes one microbatch on the devices, filled up with masked examples.

    Args:
      source: asked for the examples of this process's devices, in one call.
      first_example: position of the microbatch's first.
      present: how many examples it holds, at least 1.
      size: how many it computes, `present` or more; a multiple of the devices.
      ghost_batch_examples: adds `ghost_mask` if given.
      mesh: the devices.

    Returns:
      The arrays, [size, ...], zeros after the first `present`, sharded over the mesh (small ones
      for a single device still on the host); with
      `weight`, float32[size], 1 if the source gives none, and `ghost_mask`, float32[size //
      ghost_batch_examples], 1 or 0 for masked. Devices that share a ghost batch have an entry each,
      1 for the first of them only, so that it counts once.
    """
    sharding = NamedSharding(mesh, functions.SHARDED)
    begin, end = _own_range(mesh, size)
    held = min(max(present - begin, 0), end - begin)
    # A share that is masked as a whole still needs an example, for its shape.
    examples = source(first_example + (begin if held else 0), held or 1)
    own = {name: _filled(array[:held], end - begin) for name, array in examples.items()}
    placed: dict[str, Any]
    if mesh.size == 1 and sum(array.nbytes for array in own.values()) <= _SMALL_BYTES:
        placed = dict(own)
    elif jax.process_count() == 1:
        placed = jax.device_put(own, sharding)
    else:
        placed = {
            name: jax.make_array_from_process_local_data(sharding, array, (size, *array.shape[1:]))
            for name, array in own.items()
        }
    if "weight" not in placed:
        placed["weight"] = _mask(present, size, sharding)
    if ghost_batch_examples is not None:
        ghosts = (present // ghost_batch_examples, size // ghost_batch_examples)
        entries = max(1, mesh.size // ghosts[1])
        placed["ghost_mask"] = _mask(*ghosts, sharding, entries)
    return placed


def of(
    data: TrainingData,
    layout: Layout,
    mesh: Mesh,
    seed: int,
    ghost_batch_examples: int,
    *,
    takes_keys: bool,
) -> Callable[[Request], tuple[int, Examples]]:
    """A function that makes the requested microbatches of a run.

    Args:
      data: the training examples.
      layout: how updates are cut.
      mesh: the devices.
      seed: of the order of the examples.
      ghost_batch_examples: examples that share statistics.
      takes_keys: whether to give the task's random keys too, as `key`, uint32[examples, 2].

    Returns:
      request -> (the number of examples that the microbatch computes, its arrays from `place`,
      small ones for a single device NumPy's).
    """

    def source(first_example: int, num_examples: int) -> Mapping[str, np.ndarray]:
        span = seed, first_example, num_examples
        made = data.training(*span)
        if not takes_keys:
            return made
        return {**made, "key": stream.example_keys(data.train_examples, *span)}

    def make(request: Request) -> tuple[int, Examples]:
        size = layout.devices * request.part.examples_per_device
        span = request.first_example, request.part.num_examples
        return size, place(source, *span, size, ghost_batch_examples, mesh)

    sizes = [layout.devices * shape for shape in layout.shapes]
    sharding = NamedSharding(mesh, functions.SHARDED)
    return (
        make if data.on_device is None else on_device.maker(make, data.on_device, sharding, sizes)
    )


def _own_range(mesh: Mesh, size: int) -> tuple[int, int]:
    """Which examples of a microbatch are on this process's devices."""
    own = [device.process_index == jax.process_index() for device in mesh.devices.flat]
    share = size // mesh.size
    begin = own.index(True)
    return begin * share, (begin + sum(own)) * share


def _filled(array: np.ndarray, length: int) -> np.ndarray:
    """The array with zeros after it, up to a length."""
    missing = length - len(array)
    if not missing:
        return array
    return np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)])


@functools.lru_cache(maxsize=256)
def _mask(present: int, size: int, sharding: NamedSharding, entries: int = 1) -> jax.Array:
    """float32[size * entries] on the devices: the first of its entries is 1 for each one present.

    Few differ in a run, so they are kept.
    """
    mask = np.zeros((size, entries), np.float32)
    mask[:present, 0] = 1
    return distributed.put(mask.ravel(), sharding)
