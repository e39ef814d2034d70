"""Which part of an image is shown, as a pure function of random words and the image's size.

Training draws windows of 8 to 100 % of the image's area with a ratio of width to height from 3/4 to
4/3 (Szegedy et al., "Going deeper with convolutions", CVPR 2015); evaluation shows the centre.
Areas and ratios are uniform. Only whole numbers, products, quotients and square roots are used,
which IEEE 754 defines to the last bit, so that every processor draws the same windows.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bigbatch.data.random import threefry2x32

ATTEMPTS = 10
_AREA = 0.08, 1.0
_RATIO = 3 / 4, 4 / 3
# The evaluation's image is resized to this times the side that is then cut from its centre.
_EVALUATION_SCALE = 256 / 224


class Window(NamedTuple):
    """A part of an image, in whole pixels."""

    top: int
    left: int
    height: int
    width: int


def words(bits: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """All the random words that one training window can need.

    Args:
      bits: two uint32[n], of `stream.augmentation_bits`.

    Returns:
      uint32[n, ATTEMPTS + 1, 2]: the generator under the examples' bits as keys, at the counters
      (0, 0), (1, 0), ... (ATTEMPTS, 0).
    """
    key: Any = tuple(word[:, None] for word in bits)
    counter = np.arange(ATTEMPTS + 1, dtype=np.uint32)[None, :]
    return np.stack(threefry2x32(np, key, (counter, 0)), axis=-1)


def training_window(words: Sequence[Sequence[int]], height: int, width: int) -> Window:
    """The window of a training image.

    Attempt i draws an area and a ratio from the words i: area = (0.08 + 0.92 u) height * width,
    ratio = 3/4 + 7/12 v, for u and v the words divided by 2^32. Its window has
    round(sqrt(area * ratio)) columns and round(sqrt(area / ratio)) rows, halves up. The first
    attempt that fits into the image is taken, at top = a mod (height - rows + 1) and left =
    b mod (width - columns + 1), for a and b the last words. Where no attempt fits, the window is
    the largest one in the image's middle whose ratio is allowed.

    Args:
      words: ATTEMPTS + 1 pairs of random words, of `words`.
      height: of the image, in pixels.
      width: likewise.

    Returns:
      The window.

    >>> training_window([(2**31, 2**31)] * 11, 375, 500)
    Window(top=0, left=112, height=312, width=325)
    """
    for area_word, ratio_word in words[:ATTEMPTS]:
        share = _AREA[0] + (_AREA[1] - _AREA[0]) * (area_word / 2**32)
        ratio = _RATIO[0] + (_RATIO[1] - _RATIO[0]) * (ratio_word / 2**32)
        area = share * (height * width)
        columns = math.floor(math.sqrt(area * ratio) + 0.5)
        rows = math.floor(math.sqrt(area / ratio) + 0.5)
        if 0 < rows <= height and 0 < columns <= width:
            top_word, left_word = words[ATTEMPTS]
            top, left = top_word % (height - rows + 1), left_word % (width - columns + 1)
            return Window(top, left, rows, columns)
    rows = min(height, max(1, math.floor(width / _RATIO[0])))
    columns = min(width, max(1, math.floor(height * _RATIO[1])))
    return Window((height - rows) // 2, (width - columns) // 2, rows, columns)


def evaluation_window(height: int, width: int) -> Window:
    """The window of a test image: the square in its middle, 224/256 of its shorter side.

    Resized to `image_size` it is what the middle of the whole image is, whose shorter side was
    resized to image_size * 256/224 (256 for 224), up to the rounding of its edges.

    >>> evaluation_window(375, 500)
    Window(top=23, left=86, height=328, width=328)
    """
    side = max(1, math.floor(min(height, width) / _EVALUATION_SCALE + 0.5))
    return Window((height - side) // 2, (width - side) // 2, side, side)
