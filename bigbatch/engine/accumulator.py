"""The sums of an update over microbatches and devices, and what floating point leaves of them.

A sum of n float32 numbers of one sign may be off by n 2^-24 of itself. So what each addition rounds
away is found exactly and carried along: a sum is two floats (Dekker 1971, "A Floating-Point
Technique for Extending the Available Precision"). The scalar sums always, the arrays where there
are many addends.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigbatch.engine.exact_sums import two_sum
from bigbatch.engine.task import PyTree, Sums

RESTS = "rests"
"""The name under which an update's sums have, by name, what one float does not hold of them."""
# Large parts of sums are multiples of it: in float32 exact up to 2^36, over any devices.
_LARGE = 2.0**12


class Accumulator(NamedTuple):
    """Sums over the microbatches of one update so far; leaves are [devices, ...].

    Where sums are reproducible it lies in `exact_sums.FixedPoint`, its leaves [devices, 2, ...].

    Attributes:
      gradients: of the summed loss, like the parameters, in float32 at least.
      sums: what the loss returns, `examples`, how many there were that are not masked, and what
        `noise.sums.small_batch_sums` adds to it.
      ghost_statistics: summed over the ghost batches, like the running statistics.
      ghost_batches: how many there were, as a float, so that one all-reduce carries everything.
      rests: by the name of an attribute, what rounding has left of those sums so far.
    """

    gradients: PyTree
    sums: Sums
    ghost_statistics: PyTree
    ghost_batches: jax.Array
    rests: PyTree = ()


def add(total: Accumulator, addend: Accumulator) -> Accumulator:
    """The sums with an addend; and of those whose rests are kept, what rounding leaves."""
    added: dict[str, PyTree] = {}
    rests = dict(total.rests)
    for name in ("gradients", "sums", "ghost_statistics", "ghost_batches"):
        sums, structure = jax.tree.flatten(getattr(total, name))
        addends = jax.tree.leaves(getattr(addend, name))
        pairs = [two_sum(a, b.astype(a.dtype)) for a, b in zip(sums, addends, strict=True)]
        if name in rests:
            lefts = jax.tree.leaves(rests[name])
            # The rest stays below the sum's last digit, or it would round too.
            pairs = [two_sum(a, b + left) for (a, b), left in zip(pairs, lefts, strict=True)]
            rests[name] = jax.tree.unflatten(structure, [rest for _, rest in pairs])
        added[name] = jax.tree.unflatten(structure, [value for value, _ in pairs])
    return Accumulator(**added, rests=rests)


def in_parts(own: Accumulator) -> Accumulator:
    """A device's sums as they travel, the scalar ones [2]: whole numbers stay exact."""
    rests = dict(own.rests)
    scalars = rests.pop("sums")

    def parts(total: jax.Array, rest: jax.Array) -> jax.Array:
        large = jnp.round(total / _LARGE) * _LARGE
        return jnp.stack([large, jnp.where(jnp.isfinite(total), (total - large) + rest, 0)])

    whole = {name: jax.tree.map(jnp.add, getattr(own, name), rest) for name, rest in rests.items()}
    return own._replace(**whole, sums=jax.tree.map(parts, own.sums, scalars), rests=())


def on_host(sums: Mapping[str, Any]) -> dict[str, Any]:
    """An update's sums as float64, in which whole numbers up to 2^36 are exact.

    Args:
      sums: from `apply_update`, and what else there is of numbers beside them.
    """
    found = jax.tree.map(np.float64, dict(sums))
    rests = found.pop(RESTS)
    return {name: value + rests.get(name, 0) for name, value in found.items()}
