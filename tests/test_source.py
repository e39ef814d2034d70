"""`Data` of every kind against plain indexing with the stream's order."""

import itertools
import os
import subprocess
import sys
import time
from collections import namedtuple

import grain
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from bigbatch.data import on_device, random, stream
from bigbatch.data.source import Data
from bigbatch.engine.functions import SHARDED, data_mesh
from bigbatch.errors import RunError, UserError

N, SEED = 23, 5
RNG = np.random.default_rng(0)
ARRAYS = {
    "x": RNG.normal(size=(N, 3)).astype(np.float32),
    "y": RNG.integers(0, 9, N, dtype=np.int32),
}
# Across an epoch's edge, over more than a whole one, and far past 2^31.
RANGES = [(0, 7), (N - 4, 60), (N * 10**9 + 5, 30)]


def expected(first, count, arrays=ARRAYS):
    """The definition, one position at a time."""
    indices = []
    for position in range(first, first + count):
        epoch, offset = divmod(position, N)
        indices.append(int(random.permute(np, offset, N, random.epoch_key(np, SEED, epoch))))
    return {name: np.asarray(array)[indices] for name, array in arrays.items()}


def check(data, arrays=ARRAYS, evaluates=True):
    for first, count in RANGES:
        made, wanted = data.training(SEED, first, count), expected(first, count, arrays)
        assert made.keys() == wanted.keys() == data.example_shapes.keys()
        for name, array in wanted.items():
            assert made[name].dtype == array.dtype
            np.testing.assert_array_equal(made[name], array)
            assert data.example_shapes[name] == (array.shape[1:], array.dtype)
    if evaluates:
        for name, array in data.evaluation(4, 9).items():
            np.testing.assert_array_equal(array, arrays[name][4:13])
    assert (data.train_examples, data.test_examples) == (N, N * evaluates)


class Read:
    """Something with `read`."""

    fingerprint = "of its own"

    def __len__(self):
        return N

    def read(self, numbers):
        return {name: array[numbers] for name, array in ARRAYS.items()}


class Items:
    """Something that gives single examples, in the form asked for."""

    def __init__(self, form=dict):
        self.form = form

    def __len__(self):
        return N

    def __getitem__(self, number):
        example = {name: array[number] for name, array in ARRAYS.items()}
        return self.form(example)


def as_tuple(example):
    return tuple(example.values())


Pair = namedtuple("Pair", ["x", "y"])  # noqa: PYI024


class Tensor:
    """What converts itself to an array, as PyTorch's tensors do."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.array)


def test_arrays_by_name():
    check(Data(ARRAYS, ARRAYS))
    check(Data(ARRAYS), evaluates=False)
    check(Data({name: array.tolist() for name, array in ARRAYS.items()} | ARRAYS, ARRAYS))
    # One array alone, and a part of the entries.
    check(Data(ARRAYS["y"], ARRAYS["y"], names=["y"]), {"y": ARRAYS["y"]})
    check(Data(ARRAYS | {"text": ["a"] * N}, ARRAYS, names=["x", "y"]))


def test_arrays_of_a_mapped_file(tmp_path):
    path = tmp_path / "tokens.bin"
    tokens = RNG.integers(0, 2**16, 7 * N + 3, dtype=np.uint16)
    path.write_bytes(b"odd" + tokens.tobytes())
    for mode in ("r", "r+", "c"):
        mapped = np.memmap(path, np.uint16, mode=mode, offset=3)
        windows = np.lib.stride_tricks.sliding_window_view(mapped, 9)[::7][:N]
        wanted = np.stack([tokens[7 * i : 7 * i + 9] for i in range(N - 1)])
        data = Data({"tokens": windows[: N - 1]})
        np.testing.assert_array_equal(
            data.training(SEED, 0, N - 1)["tokens"],
            wanted[stream.indices(N - 1, SEED, 0, N - 1)],
        )
        check(Data({"t": mapped[: 7 * N].reshape(N, 7)}), {"t": tokens[: 7 * N].reshape(N, 7)}, 0)
    # What a private copy was changed to is not given back to the file.
    mapped[:] = 1
    assert Data({"t": mapped}).training(0, 0, 20)["t"].sum() == 20


def test_a_source_that_reads_many_at_once():
    data = Data(Read(), Read())
    check(data)
    assert data.description == {
        "entries": {"x": ["float32", [3]], "y": ["int32", []]},
        "train_examples": N,
        "fingerprint": "of its own",
    }


@pytest.mark.parametrize("workers", [1, 3])
def test_a_source_of_single_examples(workers):
    names = ("x", "y")
    check(Data(Items(), Items(), workers=workers))
    check(Data(Items(as_tuple), Items(list_of), names=names, workers=workers))
    check(Data(Items(tensors), [*map(Items().__getitem__, range(N))], workers=workers))
    pairs = [Pair(*pair) for pair in zip(*ARRAYS.values(), strict=True)]
    check(Data(pairs, pairs, names=names, workers=workers))


def list_of(example):
    return [*example.values()]


def tensors(example):
    return {name: Tensor(value) for name, value in example.items()}


def test_threads_keep_the_order():
    """The first numbers take longest."""

    class Slow(Items):
        def __getitem__(self, number):
            time.sleep(0.0005 * (N - number))
            return super().__getitem__(number)

    check(Data(Slow(), Slow(), workers=8))


def test_a_grain_dataset_draws_anew_in_every_epoch():
    def drawn(example, rng):
        return {"x": example["x"], "noise": rng.integers(0, 2**30)}

    examples = [{"x": x} for x in ARRAYS["x"]]
    dataset = grain.MapDataset.source(examples).seed(3).random_map(drawn)
    data = Data(dataset, dataset, workers=2)
    made = data.training(SEED, 0, 3 * N)
    order = stream.indices(N, SEED, 0, 3 * N)
    for position in range(3 * N):
        wanted = dataset[int(order[position]) + N * (position // N)]
        np.testing.assert_array_equal(made["x"][position], wanted["x"])
        assert made["noise"][position] == wanted["noise"]
    # Element by element: no draw comes twice.
    assert len(np.unique(made["noise"])) == 3 * N
    np.testing.assert_array_equal(data.evaluation(0, N)["x"], ARRAYS["x"])
    with pytest.raises(UserError, match=r"train: given .* epochs are counted here"):
        Data(dataset.repeat())


def shifted(example, key):
    """Another example for another key; in place, which must not reach the source."""
    example["x"] += (key[0] % 1000).astype(np.float32)
    return {"x": example["x"], "y": example["y"], "coin": key[1] >> 31}


@pytest.mark.parametrize("source", [ARRAYS, Items(), Read()])
def test_augment_belongs_to_positions(source):
    data = Data(source, augment=shifted, workers=3)
    before = {name: array.copy() for name, array in ARRAYS.items()}
    first, count = N * 2**31 - 10, 40
    whole = data.training(SEED, first, count)
    words = [
        random.random_bits(np, SEED, random.Purpose.AUGMENTATION, *divmod(first + i, N))
        for i in range(count)
    ]
    shown = expected(first, count)
    for i, (place, coin) in enumerate(words):
        np.testing.assert_array_equal(whole["x"][i], shown["x"][i] + np.float32(place % 1000))
        assert whole["coin"][i] == coin >> 31
    for cuts in ([0, 1, 2, 40], [0, 13, 29, 40]):
        parts = [data.training(SEED, first + a, b - a) for a, b in itertools.pairwise(cuts)]
        for name, array in whole.items():
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), array)
    for name, array in before.items():
        np.testing.assert_array_equal(ARRAYS[name], array)


class Faulty(Items):
    def __getitem__(self, number):
        if number == 2:
            return {"x": np.zeros(4, np.float32), "y": np.int32(0)}
        if number == 3:
            os._exit(1)
        return super().__getitem__(number)


def test_processes_give_the_same():
    data = Data(Items(), Items(), augment=shifted, workers=2, processes=True)
    threads = Data(Items(), Items(), augment=shifted, workers=2)
    rows = Data(ARRAYS, augment=shifted, workers=1, processes=True)
    wanted = threads.training(SEED, 5, 50)
    for given in (data, rows):
        for name, array in given.training(SEED, 5, 50).items():
            np.testing.assert_array_equal(array, wanted[name])
    np.testing.assert_array_equal(data.evaluation(3, 4)["x"], ARRAYS["x"][3:7])
    faulty = Data(Items(), Faulty(), workers=1, processes=True)
    with pytest.raises(UserError, match=r"test\.x: given 'float32\[4\] in example 2'") as error:
        faulty.evaluation(0, 3)
    assert len(error.value.problems) == 1
    with pytest.raises(RunError, match="__main__"):
        faulty.evaluation(3, 1)
