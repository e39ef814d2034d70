import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.data import random
from bigbatch.data.records import crops

WORD = st.integers(0, 2**32 - 1)
WORDS = st.lists(st.tuples(WORD, WORD), min_size=11, max_size=11)
SIDE = st.integers(1, 3000)


def nearest(square: Fraction) -> int:
    """The whole number nearest to the square's root, halves up, without floats."""
    twice = math.isqrt(math.floor(4 * square))
    return (twice + 1) // 2


@settings(max_examples=300, deadline=None)
@given(WORDS, SIDE, SIDE)
def test_training_windows_against_exact_arithmetic(words, height, width):
    """The definition with fractions: floats may differ from it by a pixel at a rounding's edge."""
    window = crops.training_window(words, height, width)
    for area_word, ratio_word in words[:10]:
        share = Fraction(8, 100) + Fraction(92, 100) * Fraction(area_word, 2**32)
        ratio = Fraction(3, 4) + Fraction(7, 12) * Fraction(ratio_word, 2**32)
        columns, rows = (
            nearest(share * height * width * ratio),
            nearest(share * height * width / ratio),
        )
        if 0 < rows <= height and 0 < columns <= width:
            break
    else:
        rows = min(height, max(1, width * 4 // 3))
        columns = min(width, max(1, height * 4 // 3))
        assert window == ((height - rows) // 2, (width - columns) // 2, rows, columns)
        return
    assert abs(window.height - rows) <= 1
    assert abs(window.width - columns) <= 1
    assert window.top == words[10][0] % (height - window.height + 1)
    assert window.left == words[10][1] % (width - window.width + 1)


@given(WORDS, SIDE, SIDE)
def test_windows_lie_in_the_image(words, height, width):
    for window in (
        crops.training_window(words, height, width),
        crops.evaluation_window(height, width),
    ):
        assert min(window) >= 0
        assert window.height >= 1
        assert window.width >= 1
        assert window.top + window.height <= height
        assert window.left + window.width <= width


def test_areas_and_ratios_are_spread_as_defined():
    """For a square image: the share is uniform where every ratio fits."""
    bits = random.random_bits(
        np, 0, random.Purpose.AUGMENTATION, 0, np.arange(4000, dtype=np.uint32)
    )
    windows = [crops.training_window(w, 600, 600) for w in crops.words(bits).tolist()]
    shares = np.array([w.height * w.width / 600**2 for w in windows])
    ratios = np.array([w.width / w.height for w in windows])
    assert shares.min() > 0.079
    assert ratios.min() > 0.745
    assert ratios.max() < 1.34
    # Below 3/4 every ratio fits, so those shares are uniform; 4 standard errors of a mean.
    inner = shares[shares < 0.75]
    assert inner.mean() == pytest.approx(
        (0.08 + 0.75) / 2, abs=4 * 0.67 / 12**0.5 / len(inner) ** 0.5
    )
    inner = ratios[shares < 0.75]
    assert inner.mean() == pytest.approx(
        (3 / 4 + 4 / 3) / 2, abs=4 * 0.58 / 12**0.5 / len(inner) ** 0.5
    )


def test_a_picture_that_no_window_fits_shows_its_middle():
    words = [(2**32 - 1, 2**31)] * 11
    assert crops.training_window(words, 100, 1000) == (0, 433, 100, 133)
    assert crops.training_window(words, 1000, 90) == (440, 0, 120, 90)
    assert crops.training_window(words, 1, 1) == (0, 0, 1, 1)


def test_the_tenth_attempt_counts():
    large, fits = (2**32 - 1, 2**31), (0, 2**31)
    place = (5, 7)
    tenth = crops.training_window([large] * 9 + [fits, place], 100, 1000)
    assert tenth == crops.training_window([fits] * 10 + [place], 100, 1000)
    assert (tenth.top, tenth.left) == (5, 7)


def test_the_side_of_an_evaluation_window_is_rounded_halves_up():
    sides = [crops.evaluation_window(side, 1000).height for side in (3, 4, 5, 6, 12)]
    # Seven eighths: 2.625, 3.5, 4.375, 5.25, 10.5.
    assert sides == [3, 4, 4, 5, 11]


def test_words_are_the_generator_under_the_examples_bits():
    bits = (np.array([5, 2**32 - 1], np.uint32), np.array([7, 0], np.uint32))
    words = crops.words(bits)
    assert words.shape == (2, 11, 2)
    for i in range(2):
        for attempt in range(11):
            key = int(bits[0][i]), int(bits[1][i])
            assert words[i, attempt].tolist() == [
                int(word) for word in random.threefry2x32(np, key, (attempt, 0))
            ]


def test_training_windows_never_change():
    """Golden values: a run's examples must not change with a version."""
    bits = random.random_bits(np, 1, random.Purpose.AUGMENTATION, 2, np.arange(4, dtype=np.uint32))
    windows = [tuple(crops.training_window(w, 375, 500)) for w in crops.words(bits).tolist()]
    assert windows == [
        (164, 211, 180, 223),
        (133, 127, 190, 235),
        (6, 128, 299, 299),
        (193, 120, 161, 182),
    ]
