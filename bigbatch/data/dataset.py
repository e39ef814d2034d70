"""A data set of images as values: what is known of it, and its arrays in memory."""

import dataclasses

import numpy as np

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


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """The examples of one part of a data set, in memory.

    Attributes:
      images: uint8[n, H, W, C].
      labels: int32[n].
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


@dataclasses.dataclass(frozen=True, eq=False)
class DataSet(Info):
    """A data set in memory. Its mean and std are never empty.

    Attributes:
      train: the training part, `train_examples` of them.
      test: the test part, `test_examples` of them.
    """

    train: Arrays
    test: Arrays


def data_set(facts: Info, train: Arrays, test: Arrays) -> DataSet:
    """The data set with the facts' number of training examples, its arrays made read-only.

    Where the facts have no mean and std, they are those of the training images that are kept.
    """
    kept = Arrays(train.images[: facts.train_examples], train.labels[: facts.train_examples])
    for array in (kept.images, kept.labels, test.images, test.labels):
        array.setflags(write=False)
    if not facts.mean:
        mean, std = pixel_statistics(kept.images)
        facts = dataclasses.replace(facts, mean=mean, std=std)
    fields = {field.name: getattr(facts, field.name) for field in dataclasses.fields(Info)}
    return DataSet(**fields, train=kept, test=test)


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


def check_train_examples(given: int | None, available: int) -> Problem | None:
    """What is wrong with a number of training examples to keep."""
    if given is None:
        return None
    allowed = f"a whole number from 1 to {available:,}, or None for all"
    if isinstance(given, bool) or not isinstance(given, int | np.integer):
        return Problem("train_examples", given, allowed)
    if not 1 <= given <= available:
        return Problem("train_examples", given, allowed, min(max(int(given), 1), available))
    return None
