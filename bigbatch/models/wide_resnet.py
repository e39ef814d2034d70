"""Wide ResNet (Zagoruyko and Komodakis 2016), with ghost batch norm.

WRN-d-k has three groups of (d - 4) / 6 pre-activation blocks with 16k, 32k and 64k channels; the
paper trains WRN-16-4 on CIFAR-10. Padding is symmetric, as in the authors' code: with a stride of 2
"SAME" would put it at the end.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from bigbatch.models.dropout import dropout
from bigbatch.models.ghost_norm import GhostNorm
from bigbatch.models.pool import mean_over_positions

# He et al. 2015, by the fan out, as the network's authors have it.
_he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class WideResNet(nn.Module):
    """A Wide ResNet for small images.

    Attributes:
      depth: number of layers d, 6n + 4.
      width: factor k on the channels of every group.
      num_classes: size of the output.
      ghost_batch_examples: examples that share batch-norm statistics; None for all of a call.
      axis_name: the mesh axis along which a ghost batch may lie.
      strides: of the first block of each group. The network's authors have (1, 2, 2) for 32x32
        images; 8x8 images would shrink to 2x2.
      dropout_rate: between the two convolutions of each block; 0 in the paper.
      dtype: of the activations. Parameters and statistics are float32, or float64 if this is.
    """

    depth: int
    width: int
    num_classes: int
    ghost_batch_examples: int | None
    axis_name: str | None = None
    strides: tuple[int, int, int] = (1, 2, 2)
    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, keys: jax.Array | None = None) -> jax.Array:
        """Computes the logits.

        Args:
          x: images [examples, height, width, channels].
          train: whether to normalise by ghost batches, and to drop.
          keys: uint32[examples, 2], for the dropout in training.

        Returns:
          [examples, classes].
        """
        param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        conv = functools.partial(
            nn.Conv,
            use_bias=False,
            kernel_init=_he_normal,
            dtype=self.dtype,
            param_dtype=param_dtype,
        )
        norm = functools.partial(GhostNorm, self.ghost_batch_examples, self.axis_name)
        drops = train and not self.is_initializing()
        layer = 0

        x = conv(16, (3, 3), name="stem")(x.astype(self.dtype))
        for group, first_stride in enumerate(self.strides):
            channels = 16 * self.width * 2**group
            for block in range((self.depth - 4) // 6):
                name = f"group{group}_block{block}"
                stride = first_stride if block == 0 else 1
                y = nn.relu(norm(name=f"{name}_norm1")(x, train=train))
                if x.shape[-1] != channels or stride != 1:
                    # Where the shape changes, the shortcut starts from the activated input.
                    x = conv(channels, (1, 1), strides=stride, name=f"{name}_shortcut")(y)
                y = conv(channels, (3, 3), strides=stride, padding=1, name=f"{name}_conv1")(y)
                y = nn.relu(norm(name=f"{name}_norm2")(y, train=train))
                if drops:
                    y = dropout(y, keys, rate=self.dropout_rate, layer=layer)
                    layer += 1
                x = x + conv(channels, (3, 3), name=f"{name}_conv2")(y)
        x = nn.relu(norm(name="norm")(x, train=train))
        x = mean_over_positions(x, param_dtype)
        return nn.Dense(
            self.num_classes, dtype=param_dtype, param_dtype=param_dtype, name="logits"
        )(x)
