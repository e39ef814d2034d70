"""A data set of images as values: what is known of it, and its arrays in memory."""

import dataclasses
import functools
from typing import Any

import numpy as np

from bigbatch.data import fingerprint, stream
from bigbatch.data.augment import Augment
from bigbatch.data.on_device import Held
from bigbatch.data.stream import Arrays
from bigbatch.errors import Problem

# Pixels are counted for so many images at a time: memory stays small beside the images.
_COUNTED_IMAGES = 4_096


@dataclasses.dataclass(frozen=True)
class Info:
    """What is known of a data set without reading its images.

    Attributes:
      name: of the data set.
      num_classes: labels are 0 .. num_classes - 1.
      image_shape: (height, width, channels).
      mean: per channel, of the training part's pixels, in the images' own unit (uint8 values);
        empty where only the images could tell.
      std: standard deviation, likewise. The device computes (image - mean) / std.
      train_examples: in the training part.
      test_examples: in the test part.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_examples: int
    test_examples: int

    @property
    def example_shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and type of one example's entries."""
        return {"image": (self.image_shape, np.dtype(np.uint8)), "label": ((), np.dtype(np.int32))}

    @property
    def network_sizes(self) -> dict[str, int]:
        """What the number of a network's parameters depends on, beside its config."""
        return {"image_channels": self.image_shape[2], "num_classes": self.num_classes}

    @property
    def facts(self) -> dict[str, Any]:
        """The attributes above, as plain values."""
        facts = {field.name: getattr(self, field.name) for field in dataclasses.fields(Info)}
        return {n: list(v) if isinstance(v, tuple) else v for n, v in facts.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class DataSet(Info):
    """A data set in memory: `bigbatch.data.source.TrainingData`. Its mean and std are never empty.

    Attributes:
      train: the training part, `train_examples` of them.
      test: the test part, `test_examples` of them.
      augment: what is changed at random in the training images.
      keep_on_device: whether the training images are held by the devices, which make them.
    """

    train: Arrays
    test: Arrays
    augment: Augment = stream.NO_AUGMENT
    keep_on_device: bool = False

    # No example takes the place of another.
    num_bad_records = None

    def training(self, seed: int, first_example: int, num_examples: int) -> dict[str, np.ndarray]:
        """The training examples of positions; see `stream.examples`, and `Held.training`."""
        if self.on_device is not None:
            return self.on_device.training(seed, first_example, num_examples)
        return stream.examples(self.train, seed, first_example, num_examples, self.augment)

    def evaluation(self, first_example: int, num_examples: int) -> dict[str, np.ndarray]:
        """The test examples with the numbers from the first one on, unchanged."""
        part = slice(first_example, first_example + num_examples)
        return {"image": self.test.images[part], "label": self.test.labels[part]}

    @property
    def is_augmented(self) -> bool:
        """Whether anything is changed at random in the training images."""
        return bool(self.augment)

    @property
    def on_device(self) -> Held | None:
        """What the devices hold; None: nothing."""
        arrays = {"image": self.train.images, "label": self.train.labels}
        return Held(arrays, self.augment) if self.keep_on_device else None

    @property
    def description(self) -> dict[str, Any]:
        """What identifies the data, as plain values."""
        told = self.facts | dataclasses.asdict(self.augment)
        return told | {"fingerprint": self._fingerprint}

    @functools.cached_property
    def _fingerprint(self) -> dict[str, str]:
        def told(part: Arrays) -> str:
            def read(numbers: np.ndarray) -> dict[str, np.ndarray]:
                return {"image": part.images[numbers], "label": part.labels[numbers]}

            return fingerprint.of_examples(len(part), read, whole=True)

        return {"train": told(self.train), "test": told(self.test)}


def data_set(
    facts: Info,
    train: Arrays,
    test: Arrays,
    augment: Augment = stream.NO_AUGMENT,
    keep_on_device: bool = False,
) -> DataSet:
    """The data set with the facts' numbers of examples, its arrays made read-only.

    Where the facts have no mean and std, they are those of the training images that are kept.
    """
    train, test = (
        Arrays(part.images[:count], part.labels[:count])
        for part, count in ((train, facts.train_examples), (test, facts.test_examples))
    )
    for array in (train.images, train.labels, test.images, test.labels):
        array.setflags(write=False)
    if not facts.mean:
        mean, std = pixel_statistics(train.images)
        facts = dataclasses.replace(facts, mean=mean, std=std)
    return DataSet(
        **vars(facts), train=train, test=test, augment=augment, keep_on_device=keep_on_device
    )


def arrays(images: np.ndarray, labels: np.ndarray) -> Arrays:
    """Checked arrays in the types and the layout of the project; never the user's own memory."""
    images = np.array(images, dtype=np.uint8, order="C")
    return Arrays(
        images[..., None] if images.ndim == 3 else images, np.array(labels, dtype=np.int32)
    )


def pixel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel's pixels.

    Args:
      images: uint8[n, H, W, C], n at least 1.

    Returns:
      The means and the standard deviations; 1 for a channel that never changes, which carries
      nothing and must not be divided by 0.
    """
    channels = images.shape[3]
    # Counts of the 256 values are exact whatever the number of pixels.
    counts = np.zeros((channels, 256), np.int64)
    for first in range(0, len(images), _COUNTED_IMAGES):
        part = images[first : first + _COUNTED_IMAGES]
        for channel in range(channels):
            counts[channel] += np.bincount(part[..., channel].ravel(), minlength=256)
    values, shares = np.arange(256.0), counts / counts[0].sum()
    mean = shares @ values
    std = np.sqrt((shares * (values - mean[:, None]) ** 2).sum(axis=1))
    return tuple(mean.tolist()), tuple(np.where(std > 0, std, 1.0).tolist())


def check_count(field: str, given: int | None, available: int) -> list[Problem]:
    """What is wrong with a number of examples to keep."""
    allowed = f"a whole number from 1 to {available:,}, or None for all"
    if given is None:
        return []
    if isinstance(given, bool) or not isinstance(given, int | np.integer):
        return [Problem(field, given, allowed)]
    nearest = min(max(int(given), 1), available)
    return [] if given == nearest else [Problem(field, given, allowed, nearest)]
