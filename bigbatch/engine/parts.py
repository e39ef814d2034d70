"""Arrays in parts over the devices, for models whose state is too large to be on each.

With `shard` "update" the parameters and the optimizer's state lie in parts (Rajbhandari et al.
2020, "ZeRO"). Every array keeps its shape and is cut along one of its axes, the largest of those
that the number of devices divides. Where there is none, each prime factor of that number cuts the
axis of which most is left, if it divides one; arrays without any are whole on each device. So an
array is the same to whoever looks at its shape, on any number of devices.

An update gives each device its part of the summed gradients (a reduce-scatter an array), computes
the optimizer on arrays in parts, and makes the copy of the parameters whole that the microbatches
of the next update read (an all-gather an array). The optimizer knows nothing of that. Its update is
one program on whole arrays, which XLA cuts (Xu et al. 2021, "GSPMD"): what is done to each element
stays where the element is, a norm is one number from each device, and matrices are sent where they
are multiplied. So every Optax transformation gives what it gives undivided.
"""

import dataclasses
import functools
from typing import Any, Final

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bigbatch.engine.task import PyTree

NONE: Final = "none"
UPDATE: Final = "update"
REPLICATED = PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Parts:
    """How the arrays that an update works on are spread over the devices.

    Attributes:
      devices: the mesh of them, of one axis.
      shard: "update" for arrays in parts; "none" for all of them on every device.
    """

    devices: Mesh
    shard: str = NONE

    @property
    def cut(self) -> bool:
        """Whether there are parts."""
        return self.shard != NONE and self.devices.size > 1

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The same devices, for arrays in parts with an axis for each prime factor."""
        if not self.cut:
            return self.devices
        factors = _prime_factors(self.devices.size)
        names = tuple(f"part{number}" for number in range(len(factors)))
        kinds = (jax.sharding.AxisType.Auto,) * len(factors)
        return Mesh(self.devices.devices.reshape(factors), names, axis_types=kinds)

    @property
    def each(self) -> PartitionSpec:
        """Of arrays [devices, ...]: to each device its own."""
        return PartitionSpec(self.mesh.axis_names)

    def spec(self, shape: tuple[int, ...]) -> PartitionSpec:
        """How an array of this shape is cut."""
        if not self.cut:
            return REPLICATED
        cuts: list[tuple[str, ...]] = [() for _ in shape]
        left = list(shape)

        def cut_by(factor: int, *names: str) -> bool:
            fit = [axis for axis, size in enumerate(left) if size and size % factor == 0]
            if fit:
                axis = max(fit, key=left.__getitem__)
                cuts[axis] += names
                left[axis] //= factor
            return bool(fit)

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

    def reduced(self, array: jax.Array, lead: int = 0) -> jax.Array:
        """On a device: its part of an array's sum over all devices.

        Args:
          array: the device's own.
          lead: axes of it before those of the array that is cut.
        """
        names: Any = self.mesh.axis_names
        for axis, cut in enumerate(self.spec(array.shape[lead:]), start=lead):
            if cut:
                array = jax.lax.psum_scatter(array, cut, scatter_dimension=axis, tiled=True)
                names = tuple(name for name in names if name not in cut)
        return jax.lax.psum(array, names) if names else array


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
