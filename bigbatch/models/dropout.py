"""Dropout whose mask is a function of the example, not of where the example is computed."""

import jax
import jax.numpy as jnp
import numpy as np

from bigbatch.data.random import threefry2x32
from bigbatch.errors import Problem, UserError


def dropout(x: jax.Array, keys: jax.Array | None, *, rate: float, layer: int) -> jax.Array:
    """Zeroes each element with probability `rate`, and divides the others by 1 - rate.

    Srivastava et al. 2014. The bits are Threefry's of the example's key at (layer, element), so
    no device, microbatch or order of calls changes them.

    Args:
      x: [examples, ...].
      keys: uint32[examples, 2], of each example at its position in the run.
      rate: from 0 to below 1, known when traced; 0 leaves x alone and needs no keys.
      layer: number of the layer, different for each one of a network.

    Returns:
      The same shape and dtype as x.

    Raises:
      UserError: there are no keys.
    """
    if rate == 0:
        return x
    if keys is None:
        allowed = "keys for a model with dropout: uint32[examples, 2]"
        raise UserError(Problem("keys", None, allowed))
    shape = (len(x), *[1] * (x.ndim - 1))
    key = keys[:, 0].reshape(shape), keys[:, 1].reshape(shape)
    element = jnp.arange(np.prod(x.shape[1:]), dtype=jnp.uint32).reshape(1, *x.shape[1:])
    bits, _ = threefry2x32(jnp, key, (jnp.uint32(layer), element))
    kept = bits >= jnp.uint32(round(rate * 2**32))
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)
