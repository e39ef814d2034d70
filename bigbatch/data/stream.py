"""The example stream: any range of a run's training examples, as a pure function of the seed.

Position p of a run is example p mod N of epoch p // N, N the number of training examples. Which
image it shows is the epoch's permutation of that; how the image is changed is random bits keyed by
(seed, epoch, offset). So a range can be made directly, in any order, by any number of workers, and
where it is cut changes nothing.
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from bigbatch.data import augment as augment_lib
from bigbatch.data.augment import Augment
from bigbatch.data.random import Purpose, epoch_key, permute, random_bits
from bigbatch.errors import Problem, UserError

# Orders and random bits are computed for aligned runs of so many offsets and kept for a while,
# because NumPy takes about as long for a few as for a thousand. A run of offsets takes 128 kB.
_CHUNK_EXAMPLES = 2**14
_KEPT_CHUNKS = 64
_MAX_WORD = 2**32 - 1
NO_AUGMENT = Augment()


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """The examples of one part of a data set of images, in memory.

    Attributes:
      images: uint8[n, H, W, C].
      labels: int32[n].
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


def examples(
    data: Arrays,
    seed: int,
    first_example: int,
    num_examples: int,
    augment: Augment = NO_AUGMENT,
) -> dict[str, np.ndarray]:
    """The training examples of positions [first_example, first_example + num_examples).

    Args:
      data: the training part, N examples.
      seed: of the run, from 0 to 2^32 - 1.
      first_example: position of the first, from 0 on; past 2^31 too.
      num_examples: how many, from 0 on; the range may cross epochs and be larger than N.
      augment: what to change at random in the images.

    Returns:
      `image`: uint8[num_examples, H, W, C]; `label`: int32[num_examples]. New arrays.

    Raises:
      UserError: seed, position or number out of range, or a change that the images do not allow.
    """
    check_range(len(data), seed, first_example, num_examples)
    augment.check(data.images.shape[1:])
    index = indices(len(data), seed, first_example, num_examples)
    images = data.images.take(index, axis=0)
    if augment:
        bits = augmentation_bits(len(data), seed, first_example, num_examples)
        images = augment_lib.apply(augment, images, bits)
    return {"image": images, "label": data.labels.take(index)}


def indices(train_examples: int, seed: int, first_example: int, num_examples: int) -> np.ndarray:
    """Which training examples the positions [first_example, first_example + num_examples) show.

    Args:
      train_examples: N, in the training part.
      seed: of the run, from 0 to 2^32 - 1.
      first_example: position of the first.
      num_examples: how many positions.

    Returns:
      int64[num_examples] in [0, N). In each epoch [e * N, (e + 1) * N) every one comes once.
    """
    chunks = [
        _order(train_examples, seed, epoch, chunk)[part]
        for epoch, chunk, part in _spans(train_examples, first_example, num_examples)
    ]
    return np.concatenate(chunks) if chunks else np.zeros(0, np.int64)


def augmentation_bits(
    train_examples: int, seed: int, first_example: int, num_examples: int
) -> tuple[np.ndarray, np.ndarray]:
    """The random words that change the images of [first_example, first_example + num_examples).

    Args:
      train_examples: N, in the training part.
      seed: of the run, from 0 to 2^32 - 1.
      first_example: position of the first.
      num_examples: how many positions.

    Returns:
      Two uint32[num_examples].
    """
    chunks = [
        _bits(train_examples, seed, epoch, chunk)[:, part]
        for epoch, chunk, part in _spans(train_examples, first_example, num_examples)
    ]
    first, second = np.concatenate(chunks, axis=1) if chunks else np.zeros((2, 0), np.uint32)
    return first, second


def example_keys(
    train_examples: int, seed: int, first_example: int, num_examples: int
) -> np.ndarray:
    """A model's random keys: those of the examples, wherever and with whom they are computed.

    Args:
      train_examples: N, in the training part.
      seed: of the run, from 0 to 2^32 - 1.
      first_example: position of the first; past 2^31 too.
      num_examples: how many positions.

    Returns:
      uint32[num_examples, 2], for instance for `bigbatch.models.dropout`.
    """
    epoch, offset = np.divmod(first_example + np.arange(num_examples), train_examples)
    words = random_bits(np, seed, Purpose.MODEL, epoch.astype(np.uint32), offset.astype(np.uint32))
    return np.stack(words, axis=-1)


def _spans(
    train_examples: int, first_example: int, num_examples: int
) -> Iterator[tuple[int, int, slice]]:
    """Cut a range of positions at the edges of epochs and chunks: (epoch, chunk, its offsets)."""
    position, end = first_example, first_example + num_examples
    while position < end:
        epoch, offset = divmod(position, train_examples)
        chunk, start = divmod(offset, _CHUNK_EXAMPLES)
        chunk_end = min((chunk + 1) * _CHUNK_EXAMPLES, train_examples)
        count = min(end - position, chunk_end - offset)
        yield epoch, chunk, slice(start, start + count)
        position += count


def _offsets(train_examples: int, chunk: int) -> np.ndarray:
    start = chunk * _CHUNK_EXAMPLES
    return np.arange(start, min(start + _CHUNK_EXAMPLES, train_examples), dtype=np.uint32)


@functools.lru_cache(maxsize=_KEPT_CHUNKS)
def _order(train_examples: int, seed: int, epoch: int, chunk: int) -> np.ndarray:
    """int64[offsets of the chunk]: the epoch's permutation of them."""
    key = epoch_key(np, seed, epoch)
    return permute(np, _offsets(train_examples, chunk), train_examples, key).astype(np.int64)


@functools.lru_cache(maxsize=_KEPT_CHUNKS)
def _bits(train_examples: int, seed: int, epoch: int, chunk: int) -> np.ndarray:
    """uint32[2, offsets of the chunk]: the random words that change the images."""
    offsets = _offsets(train_examples, chunk)
    return np.stack(random_bits(np, seed, Purpose.AUGMENTATION, epoch, offsets))


def check_range(train_examples: int, seed: int, first_example: int, num_examples: int) -> None:
    """Raise a UserError where a seed or a range of positions has no examples."""
    problems = []
    end = (_MAX_WORD + 1) * train_examples
    for field, given, most in (
        ("seed", seed, _MAX_WORD),
        ("first_example", first_example, end),
        ("num_examples", num_examples, end),
    ):
        if isinstance(given, bool) or not isinstance(given, int | np.integer):
            problems.append(Problem(field, given, "a whole number"))
        elif not 0 <= given <= most:
            allowed = f"a whole number from 0 to {most:,}"
            problems.append(Problem(field, given, allowed, min(max(int(given), 0), most)))
    if not problems and first_example + num_examples > end:
        allowed = f"a range that ends before epoch 2^32: at most {end - first_example:,} examples"
        problems.append(Problem("num_examples", num_examples, allowed, end - first_example))
    if problems:
        raise UserError(problems)
