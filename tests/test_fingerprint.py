"""Data are known by what they are, and not by where they lie."""

import hashlib
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from bigbatch.commands import saved
from bigbatch.config import assemble
from bigbatch.config.config import read_config
from bigbatch.data import dataset, fingerprint
from bigbatch.data.source import Data
from bigbatch.engine.task import Task
from bigbatch.errors import UserError
from bigbatch.workdir import resume
from bigbatch.workdir.files import Workdir, write_json
from tests import trained

N = 200
NUMBERS = np.arange(N * 3, dtype=np.float32).reshape(N, 3)


class Items:
    """Single examples, of which some may be others, or which are drawn at every reading."""

    def __init__(self, others=(), drawn=None):
        self.others, self.drawn = others, drawn

    def __len__(self):
        return N

    def __getitem__(self, number):
        noise = self.drawn.normal() if self.drawn is not None else 0
        return {"x": NUMBERS[number] + np.float32(number in self.others) + np.float32(noise)}


def told(data, part="train"):
    return data.description["fingerprint"][part]


def test_one_byte_of_arrays_in_memory_is_told():
    images = np.zeros((N, 4, 4, 1), np.uint8)
    labels = np.zeros(N, np.int32)
    facts = dataset.Info("x", 2, (4, 4, 1), (0.0,), (1.0,), N, N)

    def described(image, label):
        parts = dataset.arrays(images, labels), dataset.arrays(image, label)
        data = dataset.data_set(facts, *parts)
        own = Data({"x": images, "y": labels}, {"x": image, "y": label})
        return [(told(d), told(d, "test")) for d in (data, own)]

    for train, test in described(images, labels):
        assert train == test
        assert train.endswith("of all 200 examples")
    other_image, other_label = images.copy(), labels.copy()
    other_image[77, 1, 2], other_label[78] = 1, 1
    for changed in ((other_image, labels), (images, other_label)):
        for train, test in described(*changed):
            assert train != test


def test_the_hash_is_that_of_the_bytes():
    def entry(name, array):
        return f"{name} {array.dtype} {array.shape[1:]}", hashlib.sha256(array).hexdigest()

    text = repr([entry("x", NUMBERS), entry("y", NUMBERS[:, 0].copy())])
    expected = hashlib.sha256(text.encode()).hexdigest()[:16]
    made = Data({"y": NUMBERS[:, 0], "x": NUMBERS.astype(">f8")})
    assert told(made) == f"sha256 {expected} of all 200 examples"


def test_examples_of_large_files_are_told_by_64_of_them(tmp_path, monkeypatch):
    probed = np.linspace(0, N - 1, 64).astype(int).tolist()
    unseen = next(i for i in range(N) if i not in probed)
    plain = told(Data(Items()))
    assert plain.endswith("of 64 of 200 examples")
    assert told(Data(Items(others=[unseen]))) == plain
    for number in (probed[0], probed[31], probed[-1]):
        assert told(Data(Items(others=[number]))) != plain
    path = tmp_path / "numbers.bin"
    NUMBERS.tofile(path)
    mapped = np.memmap(path, np.float32, mode="r").reshape(N, 3)
    assert told(Data({"x": mapped})) == told(Data({"x": NUMBERS}))
    monkeypatch.setattr(fingerprint, "_SMALL_FILE_BYTES", N)
    assert told(Data({"x": mapped})) == plain
    # Windows hold each byte many times over.
    windows = np.lib.stride_tricks.sliding_window_view(NUMBERS[:, 0], 5)
    assert told(Data({"x": windows})).endswith("of 64 of 196 examples")


def test_arrays_in_memory_are_read_whole_and_large_files_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "_SMALL_FILE_BYTES", NUMBERS.nbytes - 1)
    np.save(tmp_path / "numbers.npy", NUMBERS)
    mapped = np.load(tmp_path / "numbers.npy", mmap_mode="r")
    assert fingerprint.is_read_whole(NUMBERS)
    assert fingerprint.is_read_whole(mapped[1:])
    assert not fingerprint.is_read_whole(mapped)
    assert not fingerprint.is_read_whole(mapped[:])


def test_what_is_drawn_at_every_reading_is_known_by_its_shape():
    data = [Data(Items(drawn=np.random.default_rng(seed))) for seed in range(2)]
    assert told(data[0]) == told(data[1])
    assert told(data[0]).startswith("no hash of 64 of 200 examples")


def test_augmentation_is_no_part_of_it():
    data = Data({"x": NUMBERS}, augment=lambda example, key: {"x": example["x"] + key[0]})
    assert told(data) == told(Data({"x": NUMBERS}))


def npz(path, seed):
    rng = np.random.default_rng(seed)
    parts = {"train": 320, "test": 40}
    arrays = {f"{p}_images": rng.integers(0, 256, (n, 8, 8, 1), np.uint8) for p, n in parts.items()}
    labels = {f"{p}_labels": rng.integers(0, 4, n) for p, n in parts.items()}
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **arrays, **labels)


def test_other_data_in_the_place_are_refused_and_the_same_elsewhere_are_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assemble, "prepared", lambda *arguments, **options: None)
    monkeypatch.setattr(assemble.loop, "train", lambda *arguments, **options: {})
    npz(tmp_path / "d.npz", 0)

    def claim(path, workdir):
        config = trained.config(data={"name": "arrays", "path": path})
        assemble.train(config, Workdir(Path(workdir)))
        # `evaluate` and its like go by what the directory says.
        saved.run_of(Workdir(Path(workdir)), None)

    compared = []
    with monkeypatch.context() as patch:
        patch.setattr(resume.distributed, "agree", lambda facts, what: compared.append(facts))
        claim("d.npz", "r")
    # Processes of one run compare what they have, each from its own place.
    assert compared[0]["data.fingerprint.train"].endswith("of all 320 examples")
    assert compared[0]["data.path"] is None
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    saved.run_of(Workdir(Path("../r")), None)
    claim("../d.npz", "../r")
    os.rename("../d.npz", "moved.npz")
    claim("moved.npz", "../r")
    npz(tmp_path / "d.npz", 1)
    said = r"'sha256 .* of all 320 examples'; allowed: 'sha256"
    with pytest.raises(UserError, match=said) as caught:
        claim("../d.npz", "../r")
    fields = {problem.field for problem in caught.value.problems}
    assert fields == {"data.fingerprint.train", "data.fingerprint.test"}


def test_where_the_data_of_ones_own_lie_is_no_part_of_it():
    def described(path):
        data = {"name": ":numbers", "path": path, "examples": N}
        named = {":numbers": lambda path, examples: Data({"x": NUMBERS}), ":task": own_task}
        tree = trained.tree(data=data, task={"name": ":task"}, ghost_batch_examples=1)
        del tree["model"]
        config = read_config(tree, "", named.__getitem__)
        return assemble.identity_of(config, config.data)["data"]

    assert described("here") == described("there")
    assert described("here")["examples"] == N


def own_task():
    return Task(
        init=lambda key: (jnp.zeros(3), {}),
        apply=lambda params, statistics, examples, train: (examples["x"] @ params, {}),
        loss=lambda made, examples: {
            "loss": jnp.sum(examples["weight"] * made),
            "count": jnp.sum(examples["weight"]),
        },
    )


def test_a_run_without_a_fingerprint_is_refused_with_what_to_do(tmp_path):
    files, config = Workdir(tmp_path / "run"), trained.config()
    trained.claimed(files, config)
    identity = {"data": {"name": "digits", "fingerprint": {"train": "sha256 of all"}}}
    with pytest.raises(UserError, match=r"begun by an older bigbatch.* begin here with"):
        resume.check_same(files, identity)
    write_json(files.run, {"identity": identity})
    resume.check_same(files, identity)
