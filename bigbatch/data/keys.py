"""A model's random keys: those of the examples, wherever and with whom they are computed."""

import numpy as np

from bigbatch.data.random import Purpose, random_bits


def example_keys(
    train_examples: int, seed: int, first_example: int, num_examples: int
) -> np.ndarray:
    """The keys of the positions [first_example, first_example + num_examples).

    Args:
      train_examples: N, in the training part.
      seed: of the run, from 0 to 2^32 - 1.
      first_example: position of the first; past 2^31 too.
      num_examples: how many.

    Returns:
      uint32[num_examples, 2], for `bigbatch.models.dropout`.
    """
    epoch, offset = np.divmod(first_example + np.arange(num_examples), train_examples)
    words = random_bits(np, seed, Purpose.MODEL, epoch.astype(np.uint32), offset.astype(np.uint32))
    return np.stack(words, axis=-1)
