"""A data set that lives on the devices: they look its images up, and flip and crop them.

The host sends twelve bytes an example, its number and its random words, in place of its pixels.
Order, cuts and masks are made where they are made for every data set, in `stream` and
`microbatches`, so nothing can differ from the host's way but the moving of pixels; and that is
exact.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from bigbatch import distributed
from bigbatch.data import augment as augment_lib
from bigbatch.data import stream
from bigbatch.data.augment import Augment
from bigbatch.data.dataset import Arrays

# The entries of a microbatch that the device turns into image and label.
_INDEX, _PLACE, _COIN = "index", "place", "coin"


def index_source(
    train_examples: int, seed: int, augment: Augment
) -> Callable[[int, int], dict[str, np.ndarray]]:
    """The example stream, but for the images: which ones they are, and what is done to them.

    Args:
      train_examples: N, in the training part.
      seed: of the run.
      augment: what to change at random in the images.

    Returns:
      (position of the first, number of examples) -> `index`, int32[number], and, where anything is
      changed, `place` and `coin`, uint32[number].
    """

    def source(first_example: int, num_examples: int) -> dict[str, np.ndarray]:
        span = train_examples, seed, first_example, num_examples
        made = {_INDEX: stream.indices(*span).astype(np.int32)}
        if augment:
            made[_PLACE], made[_COIN] = stream.augmentation_bits(*span)
        return made

    return source


def maker(
    make: Callable[[Any], tuple[int, Mapping[str, jax.Array]]],
    data: Arrays,
    augment: Augment,
    sharding: NamedSharding,
    microbatch_examples: Iterable[int],
) -> Callable[[Any], tuple[int, dict[str, jax.Array]]]:
    """Puts a data set on the devices, all of it on each, and makes microbatches there.

    Args:
      make: makes microbatches of `index_source`: request -> (examples computed, arrays).
      data: the training part.
      augment: what to change at random in the images.
      sharding: of a microbatch's examples over the devices.
      microbatch_examples: how many a microbatch may compute; one program is compiled for each.

    Returns:
      A function like `make` whose microbatches hold `image` and `label`, with zeros where `weight`
      is 0. It has no collective: each device makes its own examples.
    """
    mesh, spec = sharding.mesh, sharding.spec
    held = distributed.put((data.images, data.labels), NamedSharding(mesh, PartitionSpec()))

    def look_up(held: tuple[jax.Array, jax.Array], given: dict[str, jax.Array]) -> Any:
        images, labels = (array.at[given[_INDEX]].get(mode="clip") for array in held)
        if augment:
            images = augment_lib.apply_on_device(augment, images, (given[_PLACE], given[_COIN]))
        present = given["weight"] > 0
        images = jnp.where(present.reshape(-1, 1, 1, 1), images, 0)
        return {"image": images, "label": jnp.where(present, labels, 0)}

    dtypes = {_INDEX: jnp.int32, "weight": jnp.float32}
    if augment:
        dtypes |= {_PLACE: jnp.uint32, _COIN: jnp.uint32}
    program = jax.jit(
        jax.shard_map(look_up, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=spec),
        out_shardings=sharding,
    )
    programs = {}
    for size in microbatch_examples:
        given = {n: jax.ShapeDtypeStruct((size,), t, sharding=sharding) for n, t in dtypes.items()}
        programs[size] = program.lower(held, given).compile()

    def expanded(request: Any) -> tuple[int, dict[str, jax.Array]]:
        size, placed = make(request)
        made = programs[size](held, {name: placed[name] for name in dtypes})
        others = {n: a for n, a in placed.items() if n not in (_INDEX, _PLACE, _COIN)}
        return size, others | made

    return expanded
