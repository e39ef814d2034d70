"""The unit of work of a device: its whole share of a microbatch, or parts of it one by one."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from bigbatch.engine.task import Examples, PyTree

# More would take too long to compile.
_WRITTEN_OUT, _WRITTEN_OUT_ON_CPU = 4, 8


def add_units(
    function: Callable[[Examples], PyTree],
    add: Callable[[PyTree, PyTree], PyTree],
    total: PyTree,
    examples: Examples,
    unit_examples: int | None,
    *,
    platform: str,
    together: bool = False,
) -> PyTree:
    """Adds what `function` makes of each unit of a device's share to a total, one after another.

    A few units are written out: XLA's CPU client takes twice as long for a loop's convolutions.
    More are a loop, whose masked ones, at the end of a share, are not computed.

    Args:
      function: the examples of one unit -> an addend.
      add: (total, addend) -> total.
      total: the sums so far.
      examples: a device's share, [examples, ...] by name, and `ghost_mask`, [ghost batches].
      unit_examples: examples of a unit; None: the whole share is one.
      platform: of the device.
      together: whether devices wait for one another, so that all must compute as many units.

    Returns:
      The total with all units added.
    """
    share = len(examples["weight"])
    if unit_examples is None:
        return add(total, function(examples))
    count = share // unit_examples
    units = {
        name: array.reshape(count, len(array) // count, *array.shape[1:])
        for name, array in examples.items()
    }
    if count <= (_WRITTEN_OUT_ON_CPU if platform == "cpu" else _WRITTEN_OUT):
        for index in range(count):
            unit = {name: array[index] for name, array in units.items()}
            total = add(total, function(unit))
        return total
    present = jnp.sum(jnp.max(units["ghost_mask"], axis=1) > 0, dtype=jnp.int32)
    if together:
        present = jnp.asarray(count, jnp.int32)

    def body(index: jax.Array, total: PyTree) -> PyTree:
        unit = {
            name: jax.lax.dynamic_index_in_dim(array, index, keepdims=False)
            for name, array in units.items()
        }
        return add(total, function(unit))

    return jax.lax.fori_loop(jnp.zeros_like(present), present, body, total)
