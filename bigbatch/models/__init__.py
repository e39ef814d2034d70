"""The networks, by name. Flax is imported only where a network is built."""

import abc
import dataclasses
import typing
from typing import Any

from bigbatch.checks import HARDWARE, Checks
from bigbatch.errors import Problem

if typing.TYPE_CHECKING:
    from flax import linen as nn

    from bigbatch.engine.task import Task

DType = typing.Literal["float32", "bfloat16", "float64"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(abc.ABC):
    """What all networks for images share.

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

    def task(
        self, data: Any, *, ghost_batch_examples: int, axis_name: str, label_smoothing: float
    ) -> "Task":
        """What is trained on a data set: the classification of its images."""
        from bigbatch.models.classification import image_classification

        module = self.module(
            num_classes=data.num_classes,
            ghost_batch_examples=ghost_batch_examples,
            axis_name=axis_name,
        )
        facts = data.image_shape, data.mean, data.std
        return image_classification(module, *facts, label_smoothing)

    def problems(self, data: Any) -> list[Problem]:
        """What keeps it from being trained on some data."""
        if hasattr(data, "image_shape"):
            return []
        allowed = "a bundled or prepared data set of images, as data.name; or a task"
        return [Problem("", type(self).__name__, allowed)]

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A decoder-only transformer: see `bigbatch.models.transformer`.

    Attributes:
      layers: blocks of attention and perceptron.
      width: of the hidden states.
      heads: of the attention; the width is an even multiple of them.
      vocabulary: tokens are 0 .. vocabulary - 1.
      activation: of the perceptron. That of `gelu` is 4 widths wide, that of `swiglu`, with a third
        matrix, two thirds of that, up to the next multiple of 8.
      tied: whether the embeddings are the output matrix too.
      qk_norm: whether queries and keys are normalised.
      remat: compute the blocks' insides again for the gradient, in place of keeping them.
      dtype: of the hidden states. Parameters are float32, or float64 if this is.
    """

    layers: int
    width: int
    heads: int
    vocabulary: int
    activation: typing.Literal["swiglu", "gelu"] = "swiglu"
    tied: bool = True
    qk_norm: bool = True
    remat: bool = dataclasses.field(default=False, metadata=HARDWARE)
    dtype: DType = "float32"

    def __post_init__(self) -> None:
        checks = Checks()
        for name in ("layers", "width", "heads", "vocabulary"):
            checks.whole(name, getattr(self, name), "a whole number, at least 1")
        checks.done()
        unit, allowed = 2 * self.heads, "an even multiple of heads: each has planes to turn in"
        nearest = unit * max(1, round(self.width / unit))
        checks.require(self.width == nearest, "width", self.width, allowed, nearest)
        checks.done()

    @property
    def inner_width(self) -> int:
        """Of the perceptron."""
        return 4 * self.width if self.activation == "gelu" else -(-self.width // 3) * 8

    def task(self, data: Any, **_: Any) -> "Task":
        """What is trained on token data."""
        from bigbatch.models.language import language_model

        return language_model(self)

    def problems(self, data: Any) -> list[Problem]:
        """See `ModelConfig.problems`."""
        given, allowed = f"{type(self).__name__}", "data of tokens, [sequence + 1] an example"
        if len(data.example_shapes.get("tokens", [[]])[0]) != 1:
            return [Problem("", given, allowed)]
        held = getattr(data, "vocabulary", None) or 0
        allowed = f"at least {held:,}, the vocabulary of the data: these are another tokenizer's"
        fits = self.vocabulary >= held
        return [] if fits else [Problem("vocabulary", self.vocabulary, allowed, held)]

    def num_parameters(self, **_: Any) -> int:
        """See `ModelConfig.num_parameters`."""
        matrices = 4 * self.width + (2 if self.activation == "gelu" else 3) * self.inner_width
        norms = 2 * self.width + 2 * (self.width // self.heads) * self.qk_norm
        ends = (1 + (not self.tied)) * self.vocabulary * self.width + self.width
        return self.layers * (matrices * self.width + norms) + ends


def _check_dropout_rate(checks: Checks, rate: float) -> None:
    checks.number("dropout_rate", rate, "a number from 0 to below 1", at_least=0, below=1)


MODELS: dict[str, Any] = {
    "wide_resnet": WideResNetConfig,
    "resnet": ResNetConfig,
    "inception_resnet_v2": InceptionResNetV2Config,
    "transformer": TransformerConfig,
}
