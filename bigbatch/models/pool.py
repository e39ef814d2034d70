"""The mean over an image's positions, before a network's classifier."""

import jax
import jax.numpy as jnp


def mean_over_positions(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The mean of each channel over height and width.

    The barrier keeps the compiler from drawing what made x into the sum. XLA's CPU client does so
    from jax 0.11 on, and where two `relu` of bfloat16 get into one such fusion it reads memory that
    was never written: `jit(lambda x: jnp.mean(relu(relu(x) - 1), (1, 2), dtype="float32"))` holds
    NaN for a bfloat16 x (jax 0.12.0; another fault of that fusion is jax-ml/jax issue 39257). The
    evaluation of a network ends like that. Elsewhere the barrier costs one pass over x.

    Args:
      x: [examples, height, width, channels].
      dtype: of the sum and the result.

    Returns:
      [examples, channels].
    """
    return jnp.mean(jax.lax.optimization_barrier(x), axis=(1, 2), dtype=dtype)
