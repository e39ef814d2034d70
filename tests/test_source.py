"""`Data` of every kind against plain indexing with the stream's order."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import grain
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from bigbatch.data import on_device, random, stream
from bigbatch.data.source import Data
from bigbatch.engine.functions import SHARDED, data_mesh
from bigbatch.errors import RunError, UserError
from tests.source_examples import ARRAYS, RNG, Faulty, Items, N, shifted

SEED = 5
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


def as_tuple(example):
    return tuple(example.values())


Pair = namedtuple("Pair", ["x", "y"])


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
        "fingerprint": dict.fromkeys(("train", "test"), "of its own, the source's own word"),
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


def test_processes_give_the_same():
    threads = Data(Items(), augment=shifted, workers=2).training(SEED, 5, 50)
    data = Data(Items(), augment=shifted, workers=2, processes=True)
    rows = Data(ARRAYS, augment=shifted, workers=1, processes=True)
    for given in (data, rows):
        for name, array in given.training(SEED, 5, 50).items():
            np.testing.assert_array_equal(array, threads[name])
    # What tells a whole job to stop comes to them too: the state is not saved yet.
    for number in ("HUP", "INT", "USR1", "USR2", "TERM"):
        for worker in rows._pool._processes:
            os.kill(worker, signal.Signals[f"SIG{number}"])
    np.testing.assert_array_equal(rows.training(SEED, 5, 50)["x"], threads["x"])
    faulty = Data(Items(), Faulty(), workers=1, processes=True)
    with pytest.raises(UserError, match=r"test\.x: given 'float32\[4\] in example 2'") as error:
        faulty.evaluation(0, 3)
    np.testing.assert_array_equal(faulty.evaluation(4, 4)["x"], ARRAYS["x"][4:8])
    assert len(error.value.problems) == 1
    with pytest.raises(RunError, match="__main__"):
        faulty.evaluation(3, 1)


_KILLED = """
import os, time
from bigbatch.data.source import Data

class Who:
    def __len__(self):
        return 5
    def __getitem__(self, number):
        return {"process": os.getpid()}

if __name__ == "__main__":
    data = Data(Who(), workers=1, processes=True)
    print(os.getpid(), *data.training(0, 0, 1)["process"], flush=True)
    time.sleep(60)
"""


def test_processes_end_with_the_one_that_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_KILLED)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE) as running:
        own, reading = map(int, running.stdout.readline().split())
        running.kill()
    assert own != reading
    for _ in range(100):
        try:
            os.kill(reading, 0)
        except ProcessLookupError:
            return
        # One that has ended may wait for a parent to ask for its status.
        if "State:\tZ" in Path(f"/proc/{reading}/status").read_text():
            return
        time.sleep(0.1)
    os.kill(reading, 9)
    raise AssertionError("it still runs")


def test_types_are_those_of_jax():
    wide = {
        "x": RNG.normal(size=N),
        "count": np.arange(N, dtype=np.uint64),
        "big_endian": np.arange(N, dtype=">i2"),
        "small": np.arange(N).astype(jax.numpy.bfloat16),
        "flag": np.arange(N) % 2 == 0,
        "weight": np.linspace(0, 2, N),
    }
    types = {
        "x": np.float32,
        "count": np.uint32,
        "big_endian": np.int16,
        "small": jax.numpy.bfloat16,
        "flag": bool,
        "weight": np.float32,
    }
    check(Data(wide), {name: np.asarray(wide[name]).astype(types[name]) for name in wide}, False)
    with jax.enable_x64(True):
        types |= {"x": np.float64, "count": np.uint64}
        check(Data(wide), {n: np.asarray(wide[n]).astype(types[n]) for n in wide}, False)


@pytest.mark.parametrize("value", [2**31, 2**40 + 3, -(2**31) - 1])
@pytest.mark.parametrize("kind", ["arrays", "read", "one by one", "on_device"])
def test_a_whole_number_that_jax_has_no_room_for_is_refused(value, kind):
    ids = np.arange(N)
    ids[N // 2] = value
    source, names = {"id": ids}, None
    if kind == "one by one":
        source, names = [(number,) for number in ids], ["id"]
    elif kind == "read":
        source = type("Rows", (Read,), {"read": lambda self, numbers: {"id": ids[numbers]}})()
    message = rf"train.id: given \[{value}\]; allowed: numbers that int32 holds"
    with pytest.raises(UserError, match=message):
        Data(source, names=names, on_device=kind == "on_device").training(SEED, 0, N)
    with jax.enable_x64(True):
        made = Data(source, names=names).training(SEED, 0, N)["id"]
        assert made.dtype == np.int64
        assert sorted(made.tolist()) == sorted(ids.tolist())


def test_more_examples_than_a_device_can_number_stay_on_the_host():
    many = np.broadcast_to(np.uint8(1), (2**31,))
    with pytest.raises(UserError, match=r"on_device: .* below 2\^31 examples"):
        Data({"x": many}, on_device=True)
    assert Data({"x": many}).training(SEED, 2**31 * 5, 3)["x"].tolist() == [1, 1, 1]


def test_examples_are_looked_up_on_the_devices():
    arrays = ARRAYS | {"mask": RNG.integers(0, 2, (N, 2, 2)) > 0, "index": np.arange(N) + 0.5}
    host, there = Data(arrays), Data(arrays, on_device=True)
    assert there.on_device.nbytes == N * (12 + 4 + 4 + 4)
    sharding = NamedSharding(data_mesh(jax.devices()[:4]), SHARDED)
    size, present = 16, 13

    def make(first):
        sent = there.training(SEED, first, size) | {
            "weight": (np.arange(size) < present).astype(np.float32),
            "key": np.zeros((size, 2), np.uint32),
        }
        return size, jax.device_put(sent, sharding)

    expand = on_device.maker(make, there.on_device, sharding, [size])
    for first in (0, N * 10**9 - 5):
        (made_size, made), wanted = expand(first), host.training(SEED, first, size)
        assert made_size == size
        assert made.keys() == wanted.keys() | {"weight", "key"}
        for name, array in wanted.items():
            assert made[name].dtype == array.dtype
            np.testing.assert_array_equal(made[name][:present], array[:present])
            assert not np.asarray(made[name][present:]).any()


_PASS = """
import sys
import numpy as np
from bigbatch.data.source import Data

rows = np.memmap(sys.argv[1], np.uint16, mode="r").reshape(-1, int(sys.argv[2]))

def peak_bytes():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))

data = Data({"tokens": rows})
data.training(0, 0, 64)
before, total = peak_bytes(), 0
for first in range(0, len(rows), 512):
    made = data.training(0, first, min(512, len(rows) - first))["tokens"]
    total += int(made[:, ::7].sum(dtype=np.int64))
print(peak_bytes() - before, total)
for row in np.array_split(rows, 64):
    row[:, ::2048].sum()
print(peak_bytes() - before)
"""


@pytest.mark.parametrize(
    ("megabytes", "row"), [(256, 4096), pytest.param(2048, 129, marks=pytest.mark.long)]
)
def test_a_mapped_file_takes_little_memory(tmp_path, megabytes, row):
    """A pass in random order; against one over the rows themselves, which stay resident."""
    path = tmp_path / "tokens.bin"
    size = megabytes * 2**20 // (2 * row) * (2 * row)
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(size // 2)
        file.write(b"\1\0" * 7)
    command = [sys.executable, "-c", _PASS, str(path), str(row)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    ours, total, plain = map(int, done.stdout.split())
    # Seven neighbours were written, of which every seventh is summed.
    assert total == 1
    assert ours < 100 * 10**6 < 200 * 10**6 < plain


def mistakes(*arguments, **options):
    with pytest.raises(UserError) as error:
        Data(*arguments, **options)
    return [problem.field for problem in error.value.problems]


def test_mistakes_are_sentences_that_name_the_argument():
    x, y = ARRAYS["x"], ARRAYS["y"]
    text = ARRAYS | {"text": np.array(["a"] * N), "object": np.array([{}] * N)}
    assert mistakes({}) == mistakes([]) == mistakes({"x": x[:0]}) == ["train"]
    assert mistakes(iter([])) == mistakes(3) == mistakes(lambda i: i) == ["train"]
    assert mistakes({"x": x, "y": y[1:], "z": np.float32(1)}) == ["train.y", "train.z"]
    assert mistakes(ARRAYS, {"x": x, "y": y[1:]}) == ["test.y"]
    assert mistakes(ARRAYS, {"x": x}) == mistakes(ARRAYS, []) == ["test"]
    assert mistakes(ARRAYS, {"x": x[:, 1:], "y": y / 2}) == ["test.x", "test.y"]
    assert mistakes(text) == ["train.text", "train.object"]
    assert mistakes({"key": x, "ghost_mask": x, "x": x}) == ["train.key", "train.ghost_mask"]
    assert mistakes(x) == mistakes([None]) == ["train"]
    assert mistakes(Items(as_tuple), names=["x"]) == mistakes(ARRAYS, names=["x", "Y"]) == ["names"]
    assert mistakes(ARRAYS, workers=0) == ["workers"]
    assert mistakes(Items(), on_device=True) == ["on_device"]
    assert mistakes(ARRAYS, augment=shifted, on_device=True) == ["on_device"]
    assert mistakes(Items(lambda example: example), processes=True) == ["processes"]


def test_an_example_unlike_the_first_is_named():
    ragged = [{"x": np.zeros(2 + (i == 3)), "y": i} for i in range(5)]
    for workers in (1, 4):
        with pytest.raises(UserError) as error:
            Data(ragged, workers=workers).training(0, 0, 5)
        (problem,) = error.value.problems
        assert (problem.field, problem.given) == ("train.x", "float64[3] in example 3")
        assert "float64[2]" in problem.allowed
    with pytest.raises(UserError, match=r"train: given 'x in example 1'"):
        Data([{"x": 0, "y": 1}, {"x": 0}]).training(0, 0, 2)

    class Short(Read):
        def read(self, numbers):
            return super().read(numbers[:1])

    with pytest.raises(UserError, match=r"train\.x: .*\n?train\.y: .*a row for each number"):
        Data(Short()).training(0, 0, 2)
    for range_ in ((-1, 0, 1), (0, -1, 1), (0, 0, -1)):
        with pytest.raises(UserError):
            Data(ARRAYS).training(*range_)
