"""The data sets, and the example stream against a loop over single examples."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.data import augment, random, sets, stream
from bigbatch.data.augment import Augment
from bigbatch.errors import UserError


def problems(call, *args, **kwargs):
    """The fields and nearest values of the mistakes that the call finds."""
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    return [(problem.field, problem.nearest) for problem in error.value.problems]


def toy(n: int, shape: tuple[int, int, int]) -> sets.Arrays:
    """Images of random pixels from 1 to 255, so that black shows where a crop left the image."""
    rng = np.random.default_rng(n)
    images = rng.integers(1, 256, size=(n, *shape), dtype=np.uint8)
    return sets.Arrays(images, np.arange(n, dtype=np.int32))


def one_by_one(data, seed, first_example, num_examples, flip, pad):
    """The definition, one example and one pixel at a time."""
    n = len(data)
    _, height, width, channels = data.images.shape
    images, labels = [], []
    for position in range(first_example, first_example + num_examples):
        epoch, offset = divmod(position, n)
        index = int(random.permute(np, offset, n, random.epoch_key(np, seed, epoch)))
        place, coin = random.random_bits(
            np, seed, random.Purpose.AUGMENTATION, epoch, np.uint32(offset)
        )
        top, left = divmod(int(place) % (2 * pad + 1) ** 2, 2 * pad + 1)
        mirrored = flip and int(coin) >= 2**31
        image = np.zeros((height, width, channels), np.uint8)
        for y, x in itertools.product(range(height), range(width)):
            from_y = y + top - pad
            from_x = (width - 1 - x if mirrored else x) + left - pad
            if 0 <= from_y < height and 0 <= from_x < width:
                image[y, x] = data.images[index, from_y, from_x]
        images.append(image)
        labels.append(data.labels[index])
    return np.array(images), np.array(labels)


@pytest.mark.parametrize("shape", [(8, 8, 1), (5, 7, 3), (4, 4, 2)])
@pytest.mark.parametrize(("flip", "pad"), [(False, 0), (True, 0), (False, 2), (True, 3)])
def test_stream_equals_a_loop_over_examples(shape, flip, pad):
    data = toy(23, shape)
    # Across an epoch's edge, over more than a whole epoch, and far past 2^31.
    for first, num in ((0, 5), (20, 60), (23 * 10**9 + 7, 40)):
        result = stream.examples(data, 9, first, num, Augment(flip, pad))
        images, labels = one_by_one(data, 9, first, num, flip, pad)
        assert result["image"].dtype == np.uint8
        assert result["label"].dtype == np.int32
        np.testing.assert_array_equal(result["image"], images)
        np.testing.assert_array_equal(result["label"], labels)


def test_stream_crosses_the_edges_of_its_chunks():
    """A set of two chunks and a half, read over the edges of chunks and of epochs."""
    n = 40_000
    data = sets.Arrays(np.ones((n, 1, 1, 1), np.uint8), np.arange(n, dtype=np.int32))
    result = stream.examples(data, 3, 0, 2 * n)["label"]
    for epoch in (0, 1):
        key = random.epoch_key(np, 3, epoch)
        expected = random.permute(np, np.arange(n), n, key)
        np.testing.assert_array_equal(result[epoch * n : (epoch + 1) * n], expected)


@given(
    first=st.integers(0, 31 * 2**32 - 1200),
    cuts=st.lists(st.integers(0, 200), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_where_a_range_is_cut_changes_nothing(first, cuts, seed):
    data, change = toy(31, (4, 4, 1)), Augment(flip=True, pad_pixels=1)
    whole = stream.examples(data, seed, first, sum(cuts), change)
    starts = np.cumsum([first, *cuts[:-1]])
    order = np.random.default_rng(seed).permutation(len(cuts))
    parts = {i: stream.examples(data, seed, int(starts[i]), cuts[i], change) for i in order}
    for field in ("image", "label"):
        joined = np.concatenate([parts[i][field] for i in range(len(cuts))])
        np.testing.assert_array_equal(joined, whole[field])


def test_every_epoch_shows_every_example_once_in_an_order_of_its_own():
    data = sets.load("digits").train
    n = len(data)
    orders = stream.indices(n, 0, 0, 3 * n).reshape(3, n)
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(n))
    for one, other in itertools.combinations(orders, 2):
        # As many fixed points as two random permutations have: Poisson with mean 1.
        assert (one == other).sum() < 10


# These must never change: a run that is resumed with a newer bigbatch reads the same examples.
def test_stream_golden_values():
    data = sets.load("digits").train
    assert stream.indices(1437, 0, 1434, 6).tolist() == [937, 1329, 180, 908, 1081, 482]
    result = stream.examples(data, 1, 10**10, 6, Augment(flip=True, pad_pixels=1))
    assert result["label"].tolist() == [7, 9, 5, 3, 4, 1]
    assert result["image"].sum(axis=(1, 2, 3)).tolist() == [330, 279, 255, 341, 339, 253]
    assert result["image"][0, 3, :, 0].tolist() == [10, 16, 15, 12, 9, 0, 0, 0]


def test_stream_returns_arrays_of_its_own():
    data = sets.load("digits").train
    stream.examples(data, 0, 0, 8)["image"][:] = 0
    stream.indices(len(data), 0, 0, 8)[:] = 0
    assert stream.examples(data, 0, 0, 8)["image"].any()
    assert stream.indices(len(data), 0, 0, 8).any()


def test_crops_and_flips_are_uniform():
    """One bright pixel in the middle lands everywhere in the window equally often."""
    n, pad = 50_000, 2
    images = np.zeros((n, 5, 5, 1), np.uint8)
    images[:, 2, 2] = 1
    data = sets.Arrays(images, np.zeros(n, np.int32))
    counts = stream.examples(data, 0, 0, n, Augment(pad_pixels=pad))["image"].sum(axis=0, dtype=int)
    assert counts.sum() == n
    assert abs(counts - n / 25).max() < 5 * np.sqrt(n / 25)
    images[:, 2, 2], images[:, 2, 0] = 0, 1
    mirrored = stream.examples(data, 0, 0, n, Augment(flip=True))["image"][:, 2, 4].sum(dtype=int)
    assert abs(mirrored - n / 2) < 5 * np.sqrt(n / 4)


def test_augment_leaves_its_input_alone():
    images = toy(4, (6, 6, 3)).images
    before = images.copy()
    words = np.full(4, 2**32 - 1, np.uint32)
    changed = augment.apply(Augment(flip=True, pad_pixels=2), images, (words, words))
    np.testing.assert_array_equal(images, before)
    assert (changed != before).any()


def test_mistakes_in_a_range_are_found_together():
    data = toy(10, (4, 4, 1))
    assert problems(stream.examples, data, -1, -5, 2.5) == [
        ("seed", 0),
        ("first_example", 0),
        ("num_examples", None),
    ]
    assert problems(stream.examples, data, 2**32, 10 * 2**32 + 1, True) == [
        ("seed", 2**32 - 1),
        ("first_example", 10 * 2**32),
        ("num_examples", None),
    ]
    assert problems(stream.examples, data, 0, 10 * 2**32 - 3, 4) == [("num_examples", 3)]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (Augment(pad_pixels=-1), [("pad_pixels", 0)]),
        (Augment(pad_pixels=4), [("pad_pixels", 3)]),
        (Augment(flip=1, pad_pixels=1.5), [("flip", True), ("pad_pixels", 0)]),
    ],
)
def test_mistakes_in_an_augmentation(change, expected):
    assert problems(stream.examples, toy(3, (4, 5, 1)), 0, 0, 3, change) == expected


def test_digits_are_those_of_the_facts():
    data = sets.load("digits")
    facts = sets.info("digits")
    assert len(data.train) == data.train_examples == facts.train_examples == 1437
    assert len(data.test) == data.test_examples == facts.test_examples == 360
    for part in (data.train, data.test):
        assert part.images.dtype == np.uint8
        assert part.labels.dtype == np.int32
        assert part.images.shape[1:] == facts.image_shape
        assert part.images.max() == 16
        assert set(part.labels.tolist()) == set(range(facts.num_classes))
    assert data.train.images.mean() == pytest.approx(facts.mean[0], abs=1e-4)
    assert data.train.images.std() == pytest.approx(facts.std[0], abs=1e-4)
    # Every fifth image is a test image, from the first on.
    assert data.test.labels[:4].tolist() == [0, 5, 0, 5]
    assert data.train.labels[:8].tolist() == [1, 2, 3, 4, 6, 7, 8, 9]


def test_digits_equal_those_of_scikit_learn():
    source = pytest.importorskip("sklearn.datasets").load_digits()
    data = sets.load("digits")
    test = np.arange(len(source.images)) % 5 == 0
    for part, chosen in ((data.train, ~test), (data.test, test)):
        np.testing.assert_array_equal(part.images[..., 0], source.images[chosen])
        np.testing.assert_array_equal(part.labels, source.target[chosen])


def test_facts_are_known_without_the_data():
    assert sets.info("cifar10").train_examples == 50_000
    assert sets.info("imagenet2012").train_examples == 1_281_167
    assert sets.info("cifar10", train_examples=400).train_examples == 400
    for name in sets.NAMES:
        facts = sets.info(name)
        assert facts.name == name
        assert len(facts.mean) == len(facts.std) == facts.image_shape[2]
        assert min(facts.std) > 0


def test_fewer_training_examples_are_the_first_ones():
    whole, part = sets.load("digits"), sets.load("digits", train_examples=300)
    assert (part.train_examples, part.test_examples) == (300, 360)
    assert part.mean == whole.mean
    np.testing.assert_array_equal(part.train.images, whole.train.images[:300])
    np.testing.assert_array_equal(part.train.labels, whole.train.labels[:300])
    np.testing.assert_array_equal(part.test.images, whole.test.images)


def test_a_data_set_is_training_data():
    data = sets.load("digits", flip=True, pad_pixels=1, test_examples=50)
    made = data.training(3, 1_430, 20)
    expected = stream.examples(data.train, 3, 1_430, 20, Augment(True, 1))
    shown = data.evaluation(40, 10)
    whole = sets.load("digits").test
    np.testing.assert_array_equal(shown["image"], whole.images[40:50])
    np.testing.assert_array_equal(shown["label"], whole.labels[40:50])
    for name, array in expected.items():
        np.testing.assert_array_equal(made[name], array)
        assert data.example_shapes[name] == (array.shape[1:], array.dtype)
    assert (data.test_examples, data.num_bad_records, data.on_device) == (50, None, None)
    assert json.loads(json.dumps(data.description)) == data.description
    for other in ({"flip": False}, {"pad_pixels": 2}, {"train_examples": 300}):
        options = {"flip": True, "pad_pixels": 1, "test_examples": 50} | other
        assert sets.load("digits", **options).description != data.description
    there = sets.load("digits", flip=True, pad_pixels=1, test_examples=50, on_device=True)
    assert there.description == data.description
    assert data.is_augmented
    assert not sets.load("digits").is_augmented
    assert there.on_device.nbytes == 1437 * (64 + 4)


@pytest.mark.parametrize("call", [sets.info, sets.load])
def test_mistakes_in_a_name_or_a_count(call):
    assert problems(call, "digit") == [("name", "digits")]
    assert problems(call, "digits", train_examples=1438) == [("train_examples", 1437)]
    assert problems(call, "digits", train_examples=0) == [("train_examples", 1)]
    assert problems(call, "digits", train_examples=2.0) == [("train_examples", None)]


def test_imagenet_is_not_on_disk():
    assert problems(sets.load, "imagenet2012", directory="/none") == [("name", None)]


def test_arrays_of_the_user():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(20, 6, 5), dtype=np.uint8)
    images[:, :, 0] = 7
    labels = np.arange(20) % 3
    data = sets.from_arrays(images[:15], labels[:15], images[15:], labels[15:], train_examples=10)
    assert (data.num_classes, data.image_shape, data.name) == (3, (6, 5, 1), "arrays")
    assert (data.train_examples, data.test_examples) == (10, 5)
    assert data.mean == pytest.approx([images[:10].mean()])
    assert data.std == pytest.approx([images[:10].std()])
    np.testing.assert_array_equal(data.test.images[..., 0], images[15:])
    assert images.flags.writeable, "the user's own array is left alone"
    with pytest.raises(ValueError, match="read-only"):
        data.train.images[0] = 0
    black = sets.from_arrays(images * 0, labels, images, labels)
    assert black.std == (1.0,)


def test_mistakes_in_arrays_are_found_together():
    images, labels = np.zeros((4, 3, 3), np.uint8), np.array([0, 1, 2, 9])
    assert problems(sets.from_arrays, images / 2, labels[:3], images, labels / 2) == [
        ("train_images", "uint8"),
        ("train_labels", (4,)),
        ("test_labels", "int32"),
    ]
    assert problems(sets.from_arrays, images, labels, images, -labels, num_classes=9) == [
        ("train_labels", None),
        ("test_labels", None),
    ]
    assert problems(sets.from_arrays, images[0], labels[:3], images[:0], labels[:0]) == [
        ("train_images", None),
        ("test_images", None),
    ]
    assert problems(sets.from_arrays, images, labels, images[:, :2], labels, train_examples=5) == [
        ("test_images", None),
        ("train_examples", 4),
    ]
