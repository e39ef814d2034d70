"""What a gradient adds to the sums from which the noise of an update is estimated.

Pure functions of JAX, for any loop: the engine calls them, and so can a loop of one's own. What the
sums mean and what is made of them is in `bigbatch.schedule.adaptive.gradient_noise`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from bigbatch.schedule.adaptive.gradient_noise import SMALL_BATCHES, SMALL_SQUARES


def square(tree: Any) -> jax.Array:
    """The sum of the squares of all elements, in their precision, float32 at least."""
    leaves = [
        leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in jax.tree.leaves(tree)
    ]
    return sum((jnp.sum(leaf * leaf) for leaf in leaves), start=jnp.zeros((), leaves[0].dtype))


def small_batch_sums(gradients: Any, examples: jax.Array) -> dict[str, jax.Array]:
    """What one small batch adds to the measurement of the noise; nothing if all is masked.

    Args:
      gradients: of its summed loss.
      examples: how many of it are not masked, a float scalar.
    """
    held = examples > 0
    squares = square(gradients)
    return {
        SMALL_SQUARES: jnp.where(held, squares / jnp.where(held, examples, 1), 0),
        SMALL_BATCHES: held.astype(squares.dtype),
    }
