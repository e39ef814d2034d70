"""The networks, by name. Flax is imported only where a network is built."""

import abc
import dataclasses
import typing
from typing import Any

from bigbatch.checks import Checks

if typing.TYPE_CHECKING:
    from flax import linen as nn

DType = typing.Literal["float32", "bfloat16", "float64"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(abc.ABC):
    """What all networks share.

    Attributes:
      dtype: of the activations. Parameters and statistics are float32, or float64 if this is.
    """

    dtype: DType = "float32"

    def module(
        self,
        *,
        num_classes: int,
        ghost_batch_examples: int | None,
        axis_name: str | None = None,
    ) -> "nn.Module":
        """The Flax module.

        Args:
          num_classes: size of its output.
          ghost_batch_examples: examples that share batch-norm statistics; None for all of a call.
          axis_name: the mesh axis along which a ghost batch may lie.

        Returns:
          A module from images [examples, height, width, channels] to logits [examples, classes].
          Equal arguments give equal modules.
        """
        import jax.numpy as jnp

        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return self._module_class()(
            **fields | {"dtype": jnp.dtype(self.dtype)},
            num_classes=num_classes,
            ghost_batch_examples=ghost_batch_examples,
            axis_name=axis_name,
        )

    @abc.abstractmethod
    def num_parameters(self, *, image_channels: int, num_classes: int) -> int:
        """How many parameters the network has, without building it (so without JAX)."""

    @abc.abstractmethod
    def _module_class(self) -> Any:
        """The Flax module's class."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WideResNetConfig(ModelConfig):
    """Wide ResNet d-k: see `bigbatch.models.wide_resnet`.

    Attributes:
      depth: d, a multiple of 6 plus 4.
      width: k.
      strides: of the first block of each of the three groups.
      dropout_rate: between the two convolutions of each block.
    """

    depth: int
    width: int
    strides: tuple[int, int, int] = (1, 2, 2)
    dropout_rate: float = 0.0

    def __post_init__(self) -> None:
        checks = Checks()
        nearest = max(10, 6 * round((self.depth - 4) / 6) + 4)
        checks.require(self.depth == nearest, "depth", self.depth, "6n + 4 with n >= 1", nearest)
        checks.whole("width", self.width, "a whole number, at least 1")
        mended = tuple(max(1, stride) for stride in self.strides)
        checks.require(
            self.strides == mended, "strides", self.strides, "whole numbers, at least 1", mended
        )
        _check_dropout_rate(checks, self.dropout_rate)
        checks.done()

    def num_parameters(self, *, image_channels: int, num_classes: int) -> int:
        """See `ModelConfig.num_parameters`."""
        channels, count = 16, 9 * 16 * image_channels
        for group, stride in enumerate(self.strides):
            wide = 16 * self.width * 2**group
            for block in range((self.depth - 4) // 6):
                # Two norms of two vectors, two 3x3 convolutions, and the shortcut's where it is.
                count += 2 * channels + 2 * wide + 9 * (channels + wide) * wide
                if channels != wide or (block == 0 and stride != 1):
                    count += channels * wide
                channels = wide
        return count + 2 * channels + (channels + 1) * num_classes

    def _module_class(self) -> Any:
        from bigbatch.models.wide_resnet import WideResNet

        return WideResNet


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetConfig(ModelConfig):
    """ResNet v1.5 for ImageNet: see `bigbatch.models.resnet`.

    Attributes:
      depth: 18 or 50.
    """

    depth: typing.Literal[18, 50]

    def num_parameters(self, *, image_channels: int, num_classes: int) -> int:
        """See `ModelConfig.num_parameters`."""
        # Without the stem's convolution and the classifier; a test counts them.
        blocks, features = {18: (11_167_104, 512), 50: (23_498_624, 2048)}[self.depth]
        return blocks + 49 * 64 * image_channels + (features + 1) * num_classes

    def _module_class(self) -> Any:
        from bigbatch.models.resnet import ResNet

        return ResNet


@dataclasses.dataclass(frozen=True, kw_only=True)
class InceptionResNetV2Config(ModelConfig):
    """Inception-ResNet-V2: see `bigbatch.models.inception_resnet_v2`.

    Attributes:
      dropout_rate: before the classifier.
    """

    dropout_rate: float = 0.2

    def __post_init__(self) -> None:
        checks = Checks()
        _check_dropout_rate(checks, self.dropout_rate)
        checks.done()

    def num_parameters(self, *, image_channels: int, num_classes: int) -> int:
        """See `ModelConfig.num_parameters`."""
        # Without the first convolution and the classifier; a test counts them.
        return 54_275_328 + 9 * 32 * image_channels + 1537 * num_classes

    def _module_class(self) -> Any:
        from bigbatch.models.inception_resnet_v2 import InceptionResNetV2

        return InceptionResNetV2


def _check_dropout_rate(checks: Checks, rate: float) -> None:
    checks.number("dropout_rate", rate, "a number from 0 to below 1", at_least=0, below=1)


MODELS: dict[str, type[ModelConfig]] = {
    "wide_resnet": WideResNetConfig,
    "resnet": ResNetConfig,
    "inception_resnet_v2": InceptionResNetV2Config,
}
