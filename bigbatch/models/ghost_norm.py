"""Ghost batch norm: batch norm whose statistics come from a fixed number of examples.

Hoffer et al. 2017, "Train longer, generalize better". The ghost batch is a property of the
recipe. It never depends on the batch size, the microbatch or the devices, so neither do the
gradients.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

GHOST_STATISTICS = "ghost_statistics"
RUNNING_STATISTICS = "running_statistics"


class GhostNorm(nn.Module):
    """Normalises every run of `ghost_batch_examples` consecutive examples by itself.

    In training the mean and the (biased) variance of each ghost batch are left in the collection
    `ghost_statistics` as float32[ghost batches, channels]; the running statistics are neither read
    nor written. They advance once per update, in `step.apply_update`. In evaluation the running
    statistics of the collection `running_statistics` are used.

    Attributes:
      ghost_batch_examples: examples that share statistics.
      epsilon: added to the variance.
      scale_init: initialiser of the scale; zeros for the last one of a residual branch.
    """

    ghost_batch_examples: int
    epsilon: float = 1e-5
    scale_init: nn.initializers.Initializer = nn.initializers.ones_init()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Normalises x.

        Args:
          x: [examples, ..., channels]; in training the number of examples is a multiple of
            `ghost_batch_examples`.
          train: whether to normalise by the ghost batch (True) or the running statistics.

        Returns:
          The same shape and dtype as x.
        """
        channels = x.shape[-1]
        # Statistics of bfloat16 activations are taken in float32; float64 stays float64.
        wide = jnp.promote_types(x.dtype, jnp.float32)
        scale = self.param("scale", self.scale_init, (channels,), wide)
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,), wide)
        mean = self.variable(RUNNING_STATISTICS, "mean", jnp.zeros, (channels,), wide)
        variance = self.variable(RUNNING_STATISTICS, "variance", jnp.ones, (channels,), wide)
        if not train:
            factor = scale * jax.lax.rsqrt(variance.value + self.epsilon)
            return ((x.astype(wide) - mean.value) * factor + bias).astype(x.dtype)

        ghosts = x.astype(wide).reshape(-1, self.ghost_batch_examples, *x.shape[1:])
        inner = tuple(range(1, ghosts.ndim - 1))
        ghost_mean = jnp.mean(ghosts, axis=inner, keepdims=True)
        centred = ghosts - ghost_mean
        ghost_variance = jnp.mean(jnp.square(centred), axis=inner, keepdims=True)
        if not self.is_initializing():
            for name, value in (("mean", ghost_mean), ("variance", ghost_variance)):
                self.put_variable(GHOST_STATISTICS, name, value.reshape(-1, channels))
        normalised = centred * (scale * jax.lax.rsqrt(ghost_variance + self.epsilon)) + bias
        return normalised.reshape(x.shape).astype(x.dtype)
