"""Inception-ResNet-V2 (Szegedy et al. 2017), with ghost batch norm and without auxiliary head.

The network that the paper trains on ImageNet, at 299x299. Its authors published the architecture
in figures 3 to 19 and, with other widths, as code; this is the latter, with the residual branches
scaled by 0.17, 0.1 and 0.2, a learned bias but no learned scale in its norm layers, and Glorot's
uniform initialisation.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from bigbatch.errors import Problem, UserError
from bigbatch.models.dropout import dropout
from bigbatch.models.ghost_norm import GhostNorm
from bigbatch.models.pool import mean_over_positions

SMALLEST_IMAGE_PIXELS = 75

# One convolution of a branch: channels, kernel height and width.
_Conv = tuple[int, int, int]


class InceptionResNetV2(nn.Module):
    """Inception-ResNet-V2.

    Attributes:
      num_classes: size of the output.
      ghost_batch_examples: examples that share batch-norm statistics; None for all of a call.
      axis_name: the mesh axis along which a ghost batch may lie.
      dropout_rate: before the classifier; the authors keep 80 %.
      dtype: of the activations. Parameters and statistics are float32, or float64 if this is.
    """

    num_classes: int
    ghost_batch_examples: int | None
    axis_name: str | None = None
    dropout_rate: float = 0.2
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, keys: jax.Array | None = None) -> jax.Array:
        """Computes the logits.

        Args:
          x: images [examples, height, width, channels], at least 75 pixels high and wide.
          train: whether to normalise by ghost batches, and to drop.
          keys: uint32[examples, 2], for the dropout in training.

        Returns:
          [examples, classes].

        Raises:
          UserError: the images are too small.
        """
        if min(x.shape[1:3]) < SMALLEST_IMAGE_PIXELS:
            allowed = "images of at least 75x75 pixels"
            nearest = tuple(max(side, SMALLEST_IMAGE_PIXELS) for side in x.shape[1:3])
            raise UserError(Problem("image", x.shape[1:3], allowed, nearest))
        param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        conv = functools.partial(self._conv, train=train)
        x = conv(x.astype(self.dtype), "stem_conv1", (32, 3, 3), stride=2, padding="VALID")
        x = conv(x, "stem_conv2", (32, 3, 3), padding="VALID")
        x = conv(x, "stem_conv3", (64, 3, 3))
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = conv(x, "stem_conv4", (80, 1, 1), padding="VALID")
        x = conv(x, "stem_conv5", (192, 3, 3), padding="VALID")
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = self._mixed_5b(x, train)
        for i in range(10):
            branches = [
                [(32, 1, 1)],
                [(32, 1, 1), (32, 3, 3)],
                [(32, 1, 1), (48, 3, 3), (64, 3, 3)],
            ]
            x = self._residual(x, f"block35_{i}", branches, 0.17, train)
        x = self._reduction(
            x, "mixed_6a", [[(384, 3, 3)], [(256, 1, 1), (256, 3, 3), (384, 3, 3)]], train
        )
        for i in range(20):
            branches = [[(192, 1, 1)], [(128, 1, 1), (160, 1, 7), (192, 7, 1)]]
            x = self._residual(x, f"block17_{i}", branches, 0.1, train)
        x = self._reduction(
            x,
            "mixed_7a",
            [
                [(256, 1, 1), (384, 3, 3)],
                [(256, 1, 1), (288, 3, 3)],
                [(256, 1, 1), (288, 3, 3), (320, 3, 3)],
            ],
            train,
        )
        for i in range(10):
            branches = [[(192, 1, 1)], [(192, 1, 1), (224, 1, 3), (256, 3, 1)]]
            scale, is_last = (1.0, True) if i == 9 else (0.2, False)
            x = self._residual(x, f"block8_{i}", branches, scale, train, is_last=is_last)
        x = conv(x, "conv_7b", (1536, 1, 1))
        x = mean_over_positions(x, param_dtype)
        if train and not self.is_initializing():
            x = dropout(x, keys, rate=self.dropout_rate, layer=0)
        return nn.Dense(
            self.num_classes,
            kernel_init=nn.initializers.glorot_uniform(),
            dtype=param_dtype,
            param_dtype=param_dtype,
            name="logits",
        )(x)

    def _mixed_5b(self, x: jax.Array, train: bool) -> jax.Array:
        branches = [
            [(96, 1, 1)],
            [(48, 1, 1), (64, 5, 5)],
            [(64, 1, 1), (96, 3, 3), (96, 3, 3)],
        ]
        outputs = [
            self._branch(x, f"mixed_5b_branch{i}", branch, train)
            for i, branch in enumerate(branches)
        ]
        pooled = nn.avg_pool(x, (3, 3), (1, 1), padding="SAME", count_include_pad=False)
        outputs.append(self._conv(pooled, "mixed_5b_pool", (64, 1, 1), train=train))
        return jnp.concatenate(outputs, axis=-1)

    def _residual(
        self,
        x: jax.Array,
        name: str,
        branches: Sequence[Sequence[_Conv]],
        scale: float,
        train: bool,
        *,
        is_last: bool = False,
    ) -> jax.Array:
        """X + scale * (the branches, mixed back to the channels of x)."""
        outputs = [
            self._branch(x, f"{name}_branch{i}", branch, train) for i, branch in enumerate(branches)
        ]
        mixed = jnp.concatenate(outputs, axis=-1)
        x = x + scale * self._plain_conv(mixed, f"{name}_up", (x.shape[-1], 1, 1), use_bias=True)
        return x if is_last else nn.relu(x)

    def _reduction(
        self, x: jax.Array, name: str, branches: Sequence[Sequence[_Conv]], train: bool
    ) -> jax.Array:
        """Half the image size: each branch's last convolution has stride 2; a max pool beside."""
        outputs = [
            self._branch(x, f"{name}_branch{i}", branch, train, shrinks=True)
            for i, branch in enumerate(branches)
        ]
        return jnp.concatenate([*outputs, nn.max_pool(x, (3, 3), (2, 2))], axis=-1)

    def _branch(
        self,
        x: jax.Array,
        name: str,
        convs: Sequence[_Conv],
        train: bool,
        *,
        shrinks: bool = False,
    ) -> jax.Array:
        for i, shape in enumerate(convs, 1):
            stride, padding = (2, "VALID") if shrinks and i == len(convs) else (1, "SAME")
            x = self._conv(x, f"{name}_conv{i}", shape, stride=stride, padding=padding, train=train)
        return x

    def _conv(
        self,
        x: jax.Array,
        name: str,
        shape: _Conv,
        *,
        train: bool,
        stride: int = 1,
        padding: str = "SAME",
    ) -> jax.Array:
        """Convolution, norm, activation."""
        x = self._plain_conv(x, name, shape, stride=stride, padding=padding)
        norm = GhostNorm(
            self.ghost_batch_examples,
            self.axis_name,
            epsilon=1e-3,
            use_scale=False,
            name=f"{name}_norm",
        )
        return nn.relu(norm(x, train=train))

    def _plain_conv(
        self,
        x: jax.Array,
        name: str,
        shape: _Conv,
        *,
        stride: int = 1,
        padding: str = "SAME",
        use_bias: bool = False,
    ) -> jax.Array:
        channels, height, width = shape
        return nn.Conv(
            channels,
            (height, width),
            strides=stride,
            padding=padding,
            use_bias=use_bias,
            kernel_init=nn.initializers.glorot_uniform(),
            dtype=self.dtype,
            param_dtype=jnp.promote_types(self.dtype, jnp.float32),
            name=name,
        )(x)
