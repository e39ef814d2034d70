"""Ghost batch norm: batch norm whose statistics come from a fixed number of examples.

Hoffer et al. 2017, "Train longer, generalize better". The ghost batch is a property of the
recipe. It never depends on the batch size, the microbatch or the devices, so neither do the
gradients: a device's share holds whole ghost batches, or neighbouring devices share one.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from bigbatch.engine.ghost_batches import (
    GHOST_STATISTICS,
    RUNNING_STATISTICS,
    devices_per_ghost_batch,
)


class GhostNorm(nn.Module):
    """Normalises every run of `ghost_batch_examples` consecutive examples by itself.

    In training the mean and the (biased) variance of each ghost batch are left in the collection
    `ghost_statistics` as float32[ghost batches, channels]; the running statistics are neither read
    nor written. They advance once per update, in `functions.apply_update`. In evaluation the
    running statistics of the collection `running_statistics` are used.

    Inside `jax.shard_map` a device may see only a part of a ghost batch: then the neighbouring
    devices of the mesh axis `axis_name` that hold the rest exchange moments, and each leaves the
    statistics of the common ghost batch.

    Attributes:
      ghost_batch_examples: examples that share statistics; None for all the examples of a call,
        over all devices (synchronised batch norm).
      axis_name: the mesh axis along which a ghost batch may lie; None if it never does.
      epsilon: added to the variance.
      use_scale: whether there is a learned scale beside the learned bias.
      scale_init: initialiser of the scale; zeros for the last one of a residual branch.
    """

    ghost_batch_examples: int | None
    axis_name: str | None = None
    epsilon: float = 1e-5
    use_scale: bool = True
    scale_init: nn.initializers.Initializer = nn.initializers.ones_init()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Normalises x.

        Args:
          x: [examples, ..., channels]; in training whole ghost batches, or one device's equal share
            of one.
          train: whether to normalise by the ghost batch (True) or the running statistics.

        Returns:
          The same shape and dtype as x.

        Raises:
          UserError: the examples do not form ghost batches.
        """
        channels = x.shape[-1]
        # Statistics of bfloat16 activations are taken in float32; float64 stays float64.
        wide = jnp.promote_types(x.dtype, jnp.float32)
        scale = jnp.ones((), wide)
        if self.use_scale:
            scale = self.param("scale", self.scale_init, (channels,), wide)
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,), wide)
        mean = self.variable(RUNNING_STATISTICS, "mean", jnp.zeros, (channels,), wide)
        variance = self.variable(RUNNING_STATISTICS, "variance", jnp.ones, (channels,), wide)
        if not train:
            factor = scale * jax.lax.rsqrt(variance.value + self.epsilon)
            return ((x.astype(wide) - mean.value) * factor + bias).astype(x.dtype)

        local, sharing = self._split(len(x))
        ghosts = x.astype(wide).reshape(-1, local, *x.shape[1:])
        shifted, offset, ghost_mean, ghost_variance = self._moments(ghosts, sharing)
        if not self.is_initializing():
            for name, value in (("mean", ghost_mean), ("variance", ghost_variance)):
                self.put_variable(GHOST_STATISTICS, name, value.reshape(-1, channels))
        factor = scale * jax.lax.rsqrt(ghost_variance + self.epsilon)
        normalised = shifted * factor + (bias - offset * factor)
        return normalised.reshape(x.shape).astype(x.dtype)

    def _split(self, examples: int) -> tuple[int, int]:
        """Examples of a ghost batch on one device, and how many devices share it."""
        devices = _axis_size(self.axis_name)
        if self.ghost_batch_examples is None:
            return examples, devices
        if examples % self.ghost_batch_examples == 0:
            return self.ghost_batch_examples, 1
        sharing = devices_per_ghost_batch(self.ghost_batch_examples, examples, devices)
        return examples, sharing

    def _moments(
        self, ghosts: jax.Array, sharing: int
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Mean and biased variance of each ghost batch, in one pass over the examples.

        var(x) = mean((x - c)^2) - mean(x - c)^2, where c is one of the values, so that the digits
        of a large mean m do not cancel: of n values with variance v most have (c - m)^2 of about v,
        and none more than (n - 1) v (Samuelson 1968). A value is the same to the bit wherever a
        compiler makes it anew; a mean would not be. Nothing depends on c, so it needs no gradient.
        The parts of a ghost batch on several devices are merged as in Chan, Golub and LeVeque 1983,
        with their means taken from the first one's c, which leaves them small.

        Args:
          ghosts: [ghost batches, examples, ..., channels].
          sharing: devices that hold an equal part of each.

        Returns:
          x - c, m - c, m and the variance; all but the first with axes of 1 kept.
        """
        mean = functools.partial(jnp.mean, axis=tuple(range(1, ghosts.ndim - 1)), keepdims=True)
        middle = (slice(size // 2, size // 2 + 1) for size in ghosts.shape[1:-1])
        centre = jax.lax.stop_gradient(ghosts[:, *middle])
        shifted = ghosts - centre
        offset = mean(shifted)
        variance = jnp.maximum(mean(jnp.square(shifted)) - jnp.square(offset), 0)
        if sharing == 1:
            return shifted, offset, centre + offset, variance
        # Gathered and then summed in the order of the devices: `psum` knows no groups in
        # `shard_map`, and all of a group must get the same bits.
        first = range(0, _axis_size(self.axis_name), sharing)
        groups = [list(range(start, start + sharing)) for start in first]
        centres, offsets, variances = jax.lax.all_gather(
            jnp.stack([centre, offset, variance]), self.axis_name, axis=1, axis_index_groups=groups
        )
        offsets += centres - centres[0]
        offset = jnp.mean(offsets, axis=0)
        variance = jnp.mean(variances + jnp.square(offsets - offset), axis=0)
        return shifted, offset + (centres[0] - centre), centres[0] + offset, variance


def _axis_size(axis_name: str | None) -> int:
    """The devices along a mesh axis; 1 outside of `jax.shard_map`, where there is one share."""
    try:
        return 1 if axis_name is None else jax.lax.axis_size(axis_name)
    except NameError:
        return 1
