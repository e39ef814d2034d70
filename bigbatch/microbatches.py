"""From the example stream to microbatches on the devices."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from bigbatch import step
from bigbatch.layout import Layout, Microbatch
from bigbatch.plan import Plan


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
    examples: Mapping[str, np.ndarray], size: int, ghost_batch_examples: int | None, mesh: Mesh
) -> dict[str, jax.Array]:
    """Puts examples on the devices, filled up with masked ones.

    Args:
      examples: arrays [n, ...] of one length; `weight`, float32[n], among them or not.
      size: examples in the microbatch, n or more; a multiple of the devices.
      ghost_batch_examples: adds `ghost_mask` if given.
      mesh: the devices.

    Returns:
      The arrays, [size, ...], zeros after the first n, sharded over the mesh; with `weight`,
      float32[size], 1 if not given, and `ghost_mask`, float32[size // ghost_batch_examples], 1 or
      0 for masked. Devices that share a ghost batch have an entry each, 1 for the first of them
      only, so that it counts once.
    """
    present = len(next(iter(examples.values())))
    padded = {
        name: array
        if present == size
        else np.concatenate([array, np.zeros((size - present, *array.shape[1:]), array.dtype)])
        for name, array in examples.items()
    }
    sharding = NamedSharding(mesh, step.SHARDED)
    placed = jax.device_put(padded, sharding)
    if "weight" not in placed:
        placed["weight"] = _mask(present, size, sharding)
    if ghost_batch_examples is not None:
        ghosts = (present // ghost_batch_examples, size // ghost_batch_examples)
        entries = max(1, mesh.size // ghosts[1])
        placed["ghost_mask"] = _mask(*ghosts, sharding, entries)
    return placed


def maker(
    source: Callable[[int, int], Mapping[str, np.ndarray]],
    layout: Layout,
    mesh: Mesh,
    ghost_batch_examples: int | None,
) -> Callable[[Request], tuple[int, dict[str, jax.Array]]]:
    """A function that makes requested microbatches.

    Args:
      source: (position of the first, number of examples) -> their arrays, [number, ...].
      layout: how updates are cut.
      mesh: the devices.
      ghost_batch_examples: examples that share batch-norm statistics; None: all of a microbatch.

    Returns:
      request -> (the number of examples that the microbatch computes, its arrays from `place`).
    """

    def make(request: Request) -> tuple[int, dict[str, jax.Array]]:
        size = layout.devices * request.part.examples_per_device
        examples = source(request.first_example, request.part.num_examples)
        return size, place(examples, size, ghost_batch_examples or size, mesh)

    return make


@functools.lru_cache(maxsize=256)
def _mask(present: int, size: int, sharding: NamedSharding, entries: int = 1) -> jax.Array:
    """float32[size * entries] on the devices: the first of its entries is 1 for each one present.

    Few differ in a run, so they are kept.
    """
    mask = np.zeros((size, entries), np.float32)
    mask[:present, 0] = 1
    return jax.device_put(mask.ravel(), sharding)
