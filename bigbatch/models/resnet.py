"""ResNet-18 and ResNet-50 for ImageNet, with ghost batch norm.

He et al. 2016, "Deep residual learning for image recognition", in the form called v1.5: a
bottleneck block that shrinks the image does so in its 3x3 convolution and not in the first 1x1.
Goyal et al. 2017 let the scale of each branch's last norm start at 0, so that every block starts
as the identity. Padding is symmetric, as in the Torch code that Goyal et al. start from and in
PyTorch's networks ("SAME" would put an odd pixel at the end).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from bigbatch.models.ghost_norm import GhostNorm
from bigbatch.models.pool import mean_over_positions

# He et al. 2015, by the fan out; the classifier's is that of Goyal et al. 2017, section 5.1.
_he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_classifier_normal = nn.initializers.normal(0.01)

# Blocks of the four groups, and whether a block is a bottleneck.
DEPTHS = {18: ((2, 2, 2, 2), False), 50: ((3, 4, 6, 3), True)}


class ResNet(nn.Module):
    """A ResNet v1.5.

    Attributes:
      depth: a key of `DEPTHS`.
      num_classes: size of the output.
      ghost_batch_examples: examples that share batch-norm statistics; None for all of a call.
      axis_name: the mesh axis along which a ghost batch may lie.
      dtype: of the activations. Parameters and statistics are float32, or float64 if this is.
    """

    depth: int
    num_classes: int
    ghost_batch_examples: int | None
    axis_name: str | None = None
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """The logits [examples, classes] of images x [examples, height, width, channels]."""
        param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        blocks, is_bottleneck = DEPTHS[self.depth]
        x = x.astype(self.dtype)
        x = self._conv(x, 64, 7, stride=2, name="stem")
        x = nn.relu(self._norm(x, train, "stem_norm"))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for group, count in enumerate(blocks):
            for block in range(count):
                stride = 2 if group > 0 and block == 0 else 1
                name = f"group{group}_block{block}"
                x = self._block(x, 64 * 2**group, stride, is_bottleneck, train, name)
        x = mean_over_positions(x, param_dtype)
        return nn.Dense(
            self.num_classes,
            kernel_init=_classifier_normal,
            dtype=param_dtype,
            param_dtype=param_dtype,
            name="logits",
        )(x)

    def _block(
        self, x: jax.Array, channels: int, stride: int, is_bottleneck: bool, train: bool, name: str
    ) -> jax.Array:
        if is_bottleneck:
            layers, channels_out = [(channels, 1), (channels, 3), (4 * channels, 1)], 4 * channels
        else:
            layers, channels_out = [(channels, 3), (channels, 3)], channels
        shrinking = 1 if is_bottleneck else 0
        y = x
        for i, (width, size) in enumerate(layers):
            is_last = i + 1 == len(layers)
            y = self._conv(
                y, width, size, stride=stride if i == shrinking else 1, name=f"{name}_conv{i + 1}"
            )
            y = self._norm(y, train, f"{name}_norm{i + 1}", starts_at_zero=is_last)
            y = y if is_last else nn.relu(y)
        if x.shape[-1] != channels_out or stride != 1:
            x = self._conv(x, channels_out, 1, stride=stride, name=f"{name}_shortcut")
            x = self._norm(x, train, f"{name}_shortcut_norm")
        return nn.relu(x + y)

    def _conv(self, x: jax.Array, channels: int, size: int, *, stride: int, name: str) -> jax.Array:
        return nn.Conv(
            channels,
            (size, size),
            strides=stride,
            padding=size // 2,
            use_bias=False,
            kernel_init=_he_normal,
            dtype=self.dtype,
            param_dtype=jnp.promote_types(self.dtype, jnp.float32),
            name=name,
        )(x)

    def _norm(
        self, x: jax.Array, train: bool, name: str, *, starts_at_zero: bool = False
    ) -> jax.Array:
        init = nn.initializers.zeros_init() if starts_at_zero else nn.initializers.ones_init()
        norm = GhostNorm(self.ghost_batch_examples, self.axis_name, scale_init=init, name=name)
        return norm(x, train=train)
