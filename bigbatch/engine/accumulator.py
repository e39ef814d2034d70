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
from jax.sharding import NamedSharding

from bigbatch.engine import exact_sums
from bigbatch.engine.exact_sums import FixedPoint, two_sum
from bigbatch.engine.parts import Parts
from bigbatch.engine.task import COUNT, Examples, PyTree, Sums, Task, wide
from bigbatch.noise.sums import small_batch_sums
from bigbatch.schedule.adaptive.gradient_noise import EXAMPLES

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


def shapes_of(
    task: Task,
    params: PyTree,
    running_statistics: PyTree,
    examples: Examples,
    parts: Parts,
    *,
    measures_noise: bool = False,
    reproducible: bool = False,
    compensated: bool = False,
) -> Any:
    """Shapes of the accumulator for microbatches that look like `examples`, and where they lie.

    What rounding leaves of the scalar sums is always kept. `compensated` keeps that of all: sums of
    any number of addends are then as good as one of two, for another array like each parameter.

    Args:
      task: what is trained.
      params: shapes of its parameters.
      running_statistics: and of its running statistics.
      examples: shapes of a microbatch's, [examples, ...].
      parts: how arrays lie for a microbatch.
      measures_noise: whether squares of gradients are summed too.
      reproducible: whether sums are exact.
      compensated: see above.

    Returns:
      `Accumulator` or `FixedPoint`, of shapes with their shardings.
    """
    addends = addend_shapes(task, params, running_statistics, examples, measures_noise)
    accumulator: Any
    if reproducible:
        accumulator = jax.eval_shape(exact_sums.zeros, addends)
    else:
        kept = ("gradients", "sums", "ghost_statistics") if compensated else ("sums",)
        accumulator = addends._replace(rests={name: getattr(addends, name) for name in kept})

    def lying(leaf: jax.ShapeDtypeStruct, spec: Any) -> jax.ShapeDtypeStruct:
        first = parts.mesh.shape[spec[0]] if isinstance(spec[0], str) else parts.mesh.size
        at = NamedSharding(parts.mesh, spec)
        return jax.ShapeDtypeStruct((first, *leaf.shape), leaf.dtype, sharding=at)

    return jax.tree.map(lying, accumulator, specs_of(accumulator, params, parts))


def specs_of(accumulator: Any, params: PyTree, parts: Parts) -> Any:
    """How the arrays of an accumulator lie: a tree like it.

    Args:
      accumulator: `Accumulator` or `FixedPoint`; shapes are enough.
      params: the parameters, whole shapes.
      parts: how arrays lie for a microbatch, or over the axes of an update.
    """
    lead = 1 if isinstance(accumulator, FixedPoint) else 0
    of_params = jax.tree.map(lambda leaf: parts.of_sums(leaf.shape, lead), params)
    whole = jax.tree.map(lambda leaf: parts.each, accumulator)
    if isinstance(whole, FixedPoint):
        return whole._replace(words=whole.words._replace(gradients=of_params))
    rests = {**whole.rests}
    if "gradients" in rests:
        rests["gradients"] = of_params
    return whole._replace(gradients=of_params, rests=rests)


def zeros(shapes: PyTree) -> PyTree:
    """Arrays of zeros on the devices; a program for them would take longer to compile."""

    def made(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        # Never all of it on one host: on a pod that would be a thousand times the parameters.
        part = leaf.sharding.shard_shape(leaf.shape)
        parts = [
            jax.device_put(np.zeros(part, leaf.dtype), device)
            for device in leaf.sharding.addressable_devices
        ]
        return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)

    return jax.tree.map(made, shapes)


def addend_shapes(
    task: Task,
    params: PyTree,
    running_statistics: PyTree,
    examples: Examples,
    measures_noise: bool,
) -> Accumulator:
    """Shapes of what a unit adds, on one device that has the whole."""

    def like(params: PyTree, running: PyTree, examples: Examples) -> Accumulator:
        outputs, _ = task.apply_to(params, running, examples, True, task.frozen)
        sums = sums_of(task, outputs, examples)
        if measures_noise:
            sums |= small_batch_sums(params, sums[EXAMPLES])
        return jax.tree.map(wide, Accumulator(params, sums, running, sums[COUNT]))

    return jax.eval_shape(like, params, running_statistics, examples)


def sums_of(task: Task, outputs: PyTree, examples: Examples) -> Sums:
    """What the loss returns, and the number of examples that are not masked."""
    sums = task.loss(outputs, examples)
    # Of one type with the others, so that one all-reduce carries them.
    present = jnp.sum(examples["weight"] > 0, dtype=wide(sums[COUNT]).dtype)
    return {**sums, EXAMPLES: present}


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
