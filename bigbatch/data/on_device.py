"""Training examples that live on the devices: they look them up there, and flip and crop images.

The host sends four bytes an example, its number, and its random words where images are changed, in
place of its arrays. Order, cuts and masks are made where they are made for all data, in `stream`
and in training, so nothing can differ from the host's way but the moving of values; and that is
exact.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from bigbatch.data import augment as augment_lib
from bigbatch.data import stream
from bigbatch.data.augment import Augment

if TYPE_CHECKING:
    import jax
    from jax.sharding import NamedSharding

# The entries of a microbatch that the device turns into examples.
_INDEX, _PLACE, _COIN = "index", "place", "coin"
_WEIGHT = "weight"


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """What the devices are to hold.

    Attributes:
      arrays: the training part, [examples, ...] by name.
      augment: what to change at random in the entry `image`.
    """

    arrays: Mapping[str, np.ndarray]
    augment: Augment = stream.NO_AUGMENT

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    @property
    def nbytes(self) -> int:
        """What each device gives for it."""
        return sum(array.nbytes for array in self.arrays.values())

    def training(self, seed: int, first_example: int, num_examples: int) -> dict[str, np.ndarray]:
        """The example stream, but for the arrays: which examples, and what is done to them.

        Args:
          seed: of the run.
          first_example: position of the first.
          num_examples: how many.

        Returns:
          `index`, int32[num_examples], and, where anything is changed, `place` and `coin`,
          uint32[num_examples].
        """
        span = len(self), seed, first_example, num_examples
        stream.check_range(*span)
        made = {_INDEX: stream.indices(*span).astype(np.int32)}
        if self.augment:
            made[_PLACE], made[_COIN] = stream.augmentation_bits(*span)
        return made


def maker(
    make: Callable[[Any], tuple[int, Mapping[str, "jax.Array"]]],
    held: Held,
    sharding: "NamedSharding",
    microbatch_examples: Iterable[int],
) -> Callable[[Any], tuple[int, dict[str, "jax.Array"]]]:
    """Puts training examples on the devices, all of them on each, and makes microbatches there.

    Args:
      make: makes microbatches of `held.training`: request -> (examples computed, arrays).
      held: the examples.
      sharding: of a microbatch's examples over the devices.
      microbatch_examples: how many a microbatch may compute; one program is compiled for each.

    Returns:
      A function like `make` whose microbatches hold the examples, with zeros where `weight` was 0.
      It has no collective: each device makes its own examples.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from bigbatch import distributed

    mesh, spec = sharding.mesh, sharding.spec
    arrays = distributed.put(dict(held.arrays), NamedSharding(mesh, PartitionSpec()))

    def look_up(arrays: dict[str, jax.Array], given: dict[str, jax.Array]) -> Any:
        made = {name: array.at[given[_INDEX]].get(mode="clip") for name, array in arrays.items()}
        if held.augment:
            words = given[_PLACE], given[_COIN]
            made["image"] = augment_lib.apply_on_device(held.augment, made["image"], words)

        def masked(array: jax.Array) -> jax.Array:
            present = (given[_WEIGHT] > 0).reshape(-1, *[1] * (array.ndim - 1))
            return jnp.where(present, array, jnp.zeros_like(array))

        return jax.tree.map(masked, made)

    dtypes = {_INDEX: jnp.int32, _WEIGHT: jnp.float32}
    if held.augment:
        dtypes |= {_PLACE: jnp.uint32, _COIN: jnp.uint32}
    program = jax.jit(
        jax.shard_map(look_up, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=spec),
        out_shardings=sharding,
    )
    programs = {}
    for size in microbatch_examples:
        given = {n: jax.ShapeDtypeStruct((size,), t, sharding=sharding) for n, t in dtypes.items()}
        programs[size] = program.lower(arrays, given).compile()

    def expanded(request: Any) -> tuple[int, dict[str, jax.Array]]:
        size, placed = make(request)
        made = programs[size](arrays, {name: placed[name] for name in dtypes})
        others = {n: a for n, a in placed.items() if n not in (_INDEX, _PLACE, _COIN)}
        return size, others | made

    return expanded
