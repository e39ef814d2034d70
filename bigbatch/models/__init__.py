"""The networks, by name. Flax is imported only where a network is built."""

import dataclasses
import typing

from bigbatch.errors import Problem, UserError

if typing.TYPE_CHECKING:
    from flax import linen as nn

DType = typing.Literal["float32", "bfloat16", "float64"]


@dataclasses.dataclass(frozen=True)
class WideResNetConfig:
    """Wide ResNet d-k: see `bigbatch.models.wide_resnet`.

    Attributes:
      depth: d, a multiple of 6 plus 4.
      width: k.
      strides: of the first block of each of the three groups.
      dtype: of the activations.
    """

    depth: int
    width: int
    strides: tuple[int, int, int] = (1, 2, 2)
    dtype: DType = "float32"

    def __post_init__(self) -> None:
        problems = []
        if self.depth < 10 or (self.depth - 4) % 6:
            nearest = max(10, 6 * round((self.depth - 4) / 6) + 4)
            problems.append(Problem("depth", self.depth, "6n + 4 with n >= 1", nearest))
        if self.width < 1:
            problems.append(Problem("width", self.width, "a whole number >= 1", 1))
        if min(self.strides) < 1:
            problems.append(
                Problem("strides", self.strides, "whole numbers >= 1", tuple(max(1, s) for s in self.strides))
            )
        if problems:
            raise UserError(problems)

    def module(self, *, num_classes: int, ghost_batch_examples: int) -> "nn.Module":
        """The Flax module for images [examples, height, width, channels] -> [examples, classes]."""
        from bigbatch.models.wide_resnet import WideResNet

        return WideResNet(
            depth=self.depth,
            width=self.width,
            num_classes=num_classes,
            ghost_batch_examples=ghost_batch_examples,
            strides=self.strides,
            dtype=self.dtype,
        )


MODELS = {"wide_resnet": WideResNetConfig}
