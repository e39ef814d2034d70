"""Arrays in parts over the devices, for models whose state is too large to be on each.

With `shard` "update" the parameters and the optimizer's state lie in parts (Rajbhandari et al.
2020, "ZeRO"). Every array keeps its shape and is cut along one of its axes, the largest of those
that the number of devices divides. Where there is none, each prime factor of that number cuts the
axis of which most is left, if it divides one; arrays without any, and of too few elements, are
whole on each device. So an array is the same to whoever looks at its shape, on any number of
devices.

An update gives each device its part of the summed gradients (a reduce-scatter an array), computes
the optimizer on arrays in parts, and makes the copy of the parameters whole that the microbatches
of the next update read (an all-gather an array). The optimizer knows nothing of that. Its update is
one program on whole arrays, which XLA cuts (Xu et al. 2021, "GSPMD"): what is done to each element
stays where the element is, a norm is one number from each device, and matrices are sent where they
are multiplied. So every Optax transformation gives what it gives undivided.

With {"layer": F}, groups of F neighbours hold one copy in parts, and the sums of gradients lie so
too. Nobody has the whole: the network gathers each layer while it computes it, see
`bigbatch.engine.layers`. An array is cut along the largest axis that F divides, or is whole on each
device. With {"layer": F, "model": M}, M neighbours of each group compute a layer together, each a
part of it.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bigbatch.engine.task import PyTree

AUTO: Final = "auto"
NONE: Final = "none"
UPDATE: Final = "update"
LAYER: Final = "layer"
MODEL: Final = "model"
DATA_AXIS = "data"
LAYER_AXIS = "fsdp"
MODEL_AXIS = "model"
REPLICATED = PartitionSpec()


class Layers(NamedTuple):
    """Parts while layers compute too.

    Attributes:
      devices: that hold one copy.
      model: of them, those that compute a layer together; they divide it.
    """

    devices: int
    model: int = 1

    @property
    def axes(self) -> dict[str, int]:
        """The axes of a mesh over those that hold one copy; those that compute together are last.

        Such as are neighbours: they wait for each other more often.
        """
        model = {MODEL_AXIS: self.model} if self.model > 1 else {}
        return {LAYER_AXIS: self.devices // self.model} | model


Shard = str | Layers


@dataclasses.dataclass(frozen=True)
class Parts:
    """How the arrays that an update works on are spread over the devices.

    Attributes:
      devices: the mesh of them, of one axis.
      shard: "update" for arrays in parts; "none" for all of them on every device; or `Layers`.
    """

    devices: Any
    shard: Shard = NONE

    @property
    def cut(self) -> bool:
        """Whether there are parts."""
        return self.shard != NONE and self.devices.size > 1

    @property
    def by_layer(self) -> bool:
        """Whether no device has the whole."""
        return self.cut and isinstance(self.shard, Layers)

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The same devices.

        For "update" with an axis for each prime factor, for layers with one over the groups and one
        over the devices of each, or two.
        """
        if not self.cut:
            return self.devices
        sizes: tuple[int, ...] = _prime_factors(self.devices.size)
        names: tuple[str, ...] = tuple(f"part{number}" for number in range(len(sizes)))
        if isinstance(self.shard, Layers):
            within = self.shard.axes
            sizes, names = (-1, *within.values()), (DATA_AXIS, *within)
        kinds = (jax.sharding.AxisType.Auto,) * len(names)
        return Mesh(self.devices.devices.reshape(sizes), names, axis_types=kinds)

    @property
    def of_calls(self) -> "Parts":
        """How arrays lie for a microbatch: in parts, or as the copy of what lies in parts."""
        return self if self.by_layer else Parts(self.devices)

    @property
    def each(self) -> PartitionSpec:
        """Of arrays [devices, ...]: to each device its own."""
        return PartitionSpec(self.mesh.axis_names)

    def of_sums(self, shape: tuple[int, ...], lead: int = 0) -> PartitionSpec:
        """How sums of arrays of this shape lie, before they are reduced.

        Args:
          shape: of the array.
          lead: axes of a device's own sums before those of the array.

        Returns:
          For [devices, ..., *shape]; for [groups, ..., *shape] where groups hold sums in parts.
        """
        spec = self.spec(shape)
        if self.by_layer and any(spec):
            return PartitionSpec(DATA_AXIS, *[None] * lead, *spec)
        return self.each

    def spec(self, shape: tuple[int, ...]) -> PartitionSpec:
        """How an array of this shape is cut."""
        if not self.cut:
            return REPLICATED
        if isinstance(self.shard, Layers):
            axis = cut_axis(shape, self.shard.devices)
            # So that the pieces of a layer's part lie side by side.
            names = tuple(reversed(self.shard.axes))
            return PartitionSpec(*(names if n == axis else None for n in range(len(shape))))
        cuts: list[tuple[str, ...]] = [() for _ in shape]
        left = list(shape)

        def cut_by(factor: int, *names: str) -> bool:
            axis = cut_axis(left, factor)
            if axis is not None:
                cuts[axis] += names
                left[axis] //= factor
            return axis is not None

        if not cut_by(self.mesh.size, *self.mesh.axis_names):
            for name, factor in self.mesh.shape.items():
                cut_by(factor, name)
        return PartitionSpec(*(names or None for names in cuts))

    def specs(self, tree: PyTree) -> PyTree:
        """How each array of a tree is cut."""
        return jax.tree.map(lambda leaf: self.spec(np.shape(leaf)), tree)

    def sharding(self, tree: PyTree) -> PyTree:
        """Likewise, with the devices."""
        return jax.tree.map(lambda leaf: NamedSharding(self.mesh, self.spec(np.shape(leaf))), tree)

    def reduced(self, array: jax.Array, shape: tuple[int, ...], lead: int = 0) -> jax.Array:
        """On a device: its part of an array's sum over all devices.

        Args:
          array: the device's own, as `of_sums` has it.
          shape: of the array that is cut.
          lead: axes of `array` before its.
        """
        names: Any = self.mesh.axis_names
        for axis, cut in enumerate(self.spec(shape), start=lead):
            if cut and not self.by_layer:
                array = jax.lax.psum_scatter(array, cut, scatter_dimension=axis, tiled=True)
            if cut:
                names = tuple(name for name in names if name not in cut)
        return jax.lax.psum(array, names) if names else array


def named(shard: Shard) -> Any:
    """As a config has it."""
    if not isinstance(shard, Layers):
        return shard
    return {LAYER: shard.devices} | ({MODEL: shard.model} if shard.model > 1 else {})


def cut_axis(shape: Sequence[int], factor: int) -> int | None:
    """The axis along which an array is cut: the largest that the factor divides, if one does.

    No part is a single number: XLA computes with that otherwise than with longer arrays, and
    rounds otherwise.

    >>> cut_axis((6, 8, 8), 4), cut_axis((8,), 8)
    (1, None)
    """
    fit = [axis for axis, size in enumerate(shape) if size % factor == 0]
    return max(fit, key=shape.__getitem__) if fit and math.prod(shape) > factor else None


def _prime_factors(number: int) -> tuple[int, ...]:
    """The prime factors, in rising order.

    >>> _prime_factors(12)
    (2, 2, 3)
    """
    found, factor = [], 2
    while number > 1:
        while number % factor == 0:
            found.append(factor)
            number //= factor
        factor += 1
    return tuple(found)
