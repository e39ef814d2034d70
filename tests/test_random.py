"""The generator and the permutation: known answers, equal bits, bijection, statistical quality."""

import collections
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.data import random
from bigbatch.errors import UserError

words = st.integers(0, 2**32 - 1)


def chi_square_deviations(counts: np.ndarray, expected: np.ndarray | float) -> float:
    """By how many standard deviations Pearson's statistic misses its mean (one constraint)."""
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = counts.size - 1
    return float((statistic - freedom) / math.sqrt(2 * freedom))


def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return random.permute(np, np.arange(size), size, random.epoch_key(np, seed, epoch))


# The known-answer file of Random123, the library of the generator's authors.
KNOWN_ANSWERS = [
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
]


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize(("key", "counter", "answer"), KNOWN_ANSWERS)
def test_threefry_gives_the_known_answers(xp, key, counter, answer):
    result = random.threefry2x32(xp, key, counter)
    assert all(word.dtype == np.uint32 for word in result)
    assert tuple(int(word) for word in result) == answer


def test_threefry_equals_that_of_jax():
    rng = np.random.default_rng(0)
    key = rng.integers(0, 2**32, size=2, dtype=np.uint32)
    counter = rng.integers(0, 2**32, size=(2, 1000), dtype=np.uint32)
    ours = random.threefry2x32(np, (key[0], key[1]), (counter[0], counter[1]))
    theirs = jax.extend.random.threefry_2x32(jnp.asarray(key), jnp.asarray(counter.ravel()))
    np.testing.assert_array_equal(np.stack(ours).ravel(), theirs)


@given(seed=words, epoch=words, offsets=st.lists(words, min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_numpy_and_jax_give_equal_bits(seed, epoch, offsets):
    offset = np.array(offsets, np.uint32)
    args = (np.uint32(seed), random.Purpose.AUGMENTATION, np.uint32(epoch), offset)
    for ours, theirs in zip(
        random.random_bits(np, *args), random.random_bits(jnp, *args), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_purposes_epochs_and_seeds_give_different_bits():
    results = {
        tuple(int(word) for word in random.random_bits(np, seed, purpose, epoch, offset))
        for seed in range(4)
        for purpose in random.Purpose
        for epoch in range(4)
        for offset in range(4)
    }
    assert len(results) == 4 * len(random.Purpose) * 4 * 4


@pytest.mark.parametrize("bound", [1, 2, 9, 81, 1000])
def test_small_integers_are_uniform(bound):
    bits, _ = random.random_bits(np, 1, random.Purpose.AUGMENTATION, 0, np.arange(200_000))
    counts = np.bincount(random.below(np, bits, bound), minlength=bound)
    assert counts.size == bound
    assert bound == 1 or abs(chi_square_deviations(counts, 200_000 / bound)) < 5


@given(size=st.integers(1, 3000), seed=words, epoch=words)
@settings(max_examples=100, deadline=None)
def test_permutation_is_a_bijection(size, seed, epoch):
    assert sorted(permutation(size, seed, epoch).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 1437, 50_000])
def test_permutation_is_a_bijection_at_the_sizes_that_matter(size):
    for epoch in range(3):
        np.testing.assert_array_equal(np.sort(permutation(size, 5, epoch)), np.arange(size))


@given(
    size=st.integers(1, 2**32 - 1),
    key=st.tuples(words, words),
    places=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=50),
)
@settings(max_examples=30, deadline=None)
def test_permutation_of_large_sizes_is_injective_and_inside(size, key, places):
    index = np.unique((np.array(places) * size).astype(np.int64))
    result = random.permute(np, index, size, key)
    assert result.dtype == np.uint32
    assert result.max() < size
    assert np.unique(result).size == index.size


@pytest.mark.parametrize("size", [1, 2, 3, 1437, 50_000])
def test_permutation_in_jax_equals_that_in_numpy_and_can_be_traced(size):
    @jax.jit
    def in_jax(index, seed, epoch):
        return random.permute(jnp, index, size, random.epoch_key(jnp, seed, epoch))

    result = in_jax(jnp.arange(size), np.uint32(7), np.uint32(4_000_000_000))
    assert result.dtype == np.uint32
    np.testing.assert_array_equal(result, permutation(size, 7, 4_000_000_000))


def test_permutation_is_evaluated_elementwise():
    key = random.epoch_key(np, 3, 2)
    whole = random.permute(np, np.arange(1437), 1437, key)
    assert [int(random.permute(np, i, 1437, key)) for i in (0, 700, 1436)] == [
        int(whole[i]) for i in (0, 700, 1436)
    ]
    grid = np.arange(12).reshape(3, 4) * 100
    np.testing.assert_array_equal(random.permute(np, grid, 1437, key), whole[grid])


# These must never change: a run that is resumed with a newer bigbatch reads the same examples.
GOLDEN = {
    (7, 0, 0): [5, 0, 4, 1, 3, 6, 2],
    (1437, 0, 0): [625, 148, 455, 350, 1222, 1330, 33, 490],
    (1437, 0, 1): [908, 1081, 482, 759, 799, 97, 126, 1288],
    (50_000, 42, 199): [25125, 605, 18298, 23426, 30819, 24028, 30663, 11979],
    (1_281_167, 1, 89): [796785, 1133959, 205830, 914816, 1019734, 109003, 724561, 7409],
}


@pytest.mark.parametrize(("size", "seed", "epoch"), GOLDEN)
def test_permutation_golden_values(size, seed, epoch):
    result = random.permute(np, np.arange(min(size, 8)), size, random.epoch_key(np, seed, epoch))
    assert result.tolist() == GOLDEN[size, seed, epoch]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_permutation_of_a_small_set_is_equally_likely(size):
    counts = collections.Counter(tuple(permutation(size, seed, 0)) for seed in range(2400))
    assert len(counts) == math.factorial(size)
    frequencies = np.array(list(counts.values()))
    assert abs(chi_square_deviations(frequencies, 2400 / math.factorial(size))) < 5


def test_every_index_goes_everywhere_equally_often():
    """Each place's marginal over epochs, and each index's over places, is uniform."""
    size, epochs = 37, 2000
    counts = np.zeros((size, size))
    for epoch in range(epochs):
        counts[np.arange(size), permutation(size, 11, epoch)] += 1
    # Rows and columns each sum to `epochs`, so there are (size - 1)^2 degrees of freedom.
    statistic = ((counts - epochs / size) ** 2 / (epochs / size)).sum() * (size - 1) / size
    freedom = (size - 1) ** 2
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("distance", [1, 2, 38])
def test_pairs_at_a_fixed_distance_are_uniform(distance):
    """Where index i goes tells nothing of where i + distance goes (38 is the network's width)."""
    size, bins = 1437, 12
    counts = np.zeros((bins, bins))
    for epoch in range(40):
        cells = permutation(size, 2, epoch) * bins // size
        np.add.at(counts, (cells[:-distance], cells[distance:]), 1)
    share = np.bincount(np.arange(size) * bins // size, minlength=bins) / size
    expected = np.outer(share, share) * counts.sum()
    assert abs(chi_square_deviations(counts, expected)) < 5


def test_differences_of_neighbours_are_those_of_a_random_permutation():
    """(p[i+1] - p[i]) mod size is uniform over 1 .. size - 1, in one epoch of a large set."""
    size = 50_000
    order = permutation(size, 0, 0).astype(np.int64)
    differences = np.diff(order) % size
    assert differences.min() >= 1
    counts = np.bincount((differences - 1) * 100 // (size - 1), minlength=100)
    share = np.bincount(np.arange(size - 1) * 100 // (size - 1), minlength=100) / (size - 1)
    assert abs(chi_square_deviations(counts, share * counts.sum())) < 5


@pytest.mark.parametrize(("seed", "later"), [(0, 1), (1, 0), (2**32 - 1, 0)])
def test_epochs_and_seeds_are_unrelated(seed, later):
    """The number of places with the same index follows Poisson's law with mean 1."""
    same = sum(
        int((permutation(1437, 0, epoch) == permutation(1437, seed, epoch + later)).sum())
        for epoch in range(30)
    )
    assert abs(same - 30) < 5 * math.sqrt(30)


@pytest.mark.parametrize(("size", "nearest"), [(0, 1), (-3, 1), (2**32, 2**32 - 1)])
def test_a_size_out_of_range_is_the_users_error(size, nearest):
    with pytest.raises(UserError) as error:
        random.permute(np, np.arange(1), size, (0, 0))
    (problem,) = error.value.problems
    assert (problem.field, problem.given, problem.nearest) == ("size", size, nearest)
