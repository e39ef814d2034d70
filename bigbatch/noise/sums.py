"""What a gradient adds to the sums from which the noise of an update is estimated.

Pure functions of JAX, for any loop: the engine calls them, and so can a loop of one's own. What the
sums mean and what is made of them is in `bigbatch.schedule.adaptive.gradient_noise`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bigbatch.schedule.adaptive.gradient_noise import SMALL_BATCHES, SMALL_SQUARES


def wide(array: jax.Array) -> jax.Array:
    """The array in a precision in which sums are taken: float32 at least."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def square(tree: Any) -> jax.Array:
    """The sum of the squares of all elements, in their precision, float32 at least."""
    leaves = [wide(leaf) for leaf in jax.tree.leaves(tree)]
    return sum((jnp.sum(leaf * leaf) for leaf in leaves), start=jnp.zeros((), leaves[0].dtype))


def small_batch_sums(
    gradients: Any, examples: jax.Array, moments: Callable[[Any], Any] = square
) -> dict[str, Any]:
    """What one small batch adds to the measurement of the noise; nothing if all is masked.

    Args:
      gradients: of its summed loss.
      examples: how many of it are not masked, a scalar.
      moments: what is measured of a gradient: quadratic in it, an array or a tree of them.
    """
    held = examples > 0
    found = moments(gradients)
    return {
        SMALL_SQUARES: jax.tree.map(
            lambda moment: jnp.where(held, moment / jnp.where(held, examples, 1), 0), found
        ),
        SMALL_BATCHES: held.astype(jax.tree.leaves(found)[0].dtype),
    }
