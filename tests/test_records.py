"""The real imagenet2012 of tensorflow-datasets, read without TensorFlow."""

import itertools
import json
import resource
import shutil
import stat
import subprocess
import sys

import numpy as np
import pytest

from bigbatch import cli
from bigbatch.data import random, sets, tfrecord
from bigbatch.data.records import crops, jpeg, reader, tfrecord_index
from bigbatch.data.records.reader import Records, parse
from bigbatch.data.tfds import metadata as tfds_metadata
from bigbatch.errors import UserError
from tests.imagenet_files import FORMATS, IMAGES_PER_CLASS, TEST_IMAGES, TRAIN_CLASSES

N = TRAIN_CLASSES * IMAGES_PER_CLASS


def open_set(data_dir, **changes):
    sizes = {"train_examples": N, "test_examples": TEST_IMAGES, "image_size": 24}
    return sets.load("imagenet2012", directory=data_dir, **(sizes | changes))


@pytest.mark.parametrize("file_format", FORMATS)
def test_records_are_tensorflow_datasets_own(imagenet, file_format):
    import tensorflow_datasets as tfds

    data_dir = imagenet.directories[file_format]
    prepared = tfds_metadata.find("imagenet2012", data_dir)
    for split, count in (("train", N), ("validation", TEST_IMAGES)):
        records = Records(prepared, split)
        assert len(records) == count
        read = [parse(records.read(i)) for i in range(count)]
        builder = tfds.builder("imagenet2012", data_dir=data_dir)
        options = {"split": split, "decoders": {"image": tfds.decode.SkipDecoding()}}
        if file_format == "tfrecord":
            config = tfds.ReadConfig(interleave_cycle_length=1)
            there = builder.as_dataset(**options, read_config=config).as_numpy_iterator()
        else:
            there = builder.as_data_source(**options)
        assert read == [(e["image"], int(e["label"])) for e in there]
        records.close()
        # The next read opens them again.
        assert parse(records.read(count - 1)) == read[-1]
        records.close()
        if split == "train":
            assert {image for image, _ in read} == set(imagenet.images.values())


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("decoding", ["fast", "smooth"])
def test_examples_are_the_definition(imagenet, file_format, decoding):
    """Each example by itself, from the random words on; the window in whole pixels by OpenCV."""
    import cv2
    import tensorflow as tf

    data = open_set(imagenet.directories[file_format], decoding=decoding, workers=2)
    records = Records(
        tfds_metadata.find("imagenet2012", imagenet.directories[file_format]), "train"
    )
    # As its threads do.
    jpeg.prepare_thread()
    seed, first, count = 7, 2 * N - 5, 12
    made = data.train.training(seed, first, count, flip=True)
    smooth = decoding == "smooth"
    flips = 0
    for i, position in enumerate(range(first, first + count)):
        epoch, offset = divmod(position, N)
        index = int(random.permute(np, offset, N, random.epoch_key(np, seed, epoch)))
        encoded, label = parse(records.read(index))
        pixels = tf.io.decode_jpeg(encoded, channels=3, fancy_upscaling=smooth).numpy()
        base = random.random_bits(np, seed, random.Purpose.AUGMENTATION, epoch, np.uint32(offset))
        words = [random.threefry2x32(np, base, (attempt, 0)) for attempt in range(11)]
        height, width = pixels.shape[:2]
        top, left, rows, columns = crops.training_window(
            [(int(a), int(b)) for a, b in words], height, width
        )
        assert label == made["label"][i]
        flip = int(base[1]) >= 2**31
        flips += flip
        shown = made["image"][i][:, ::-1] if flip else made["image"][i]
        if min(rows, columns) >= 48:
            # Decoded in half of the size: see test_jpeg.
            continue
        expected = cv2.resize(
            np.ascontiguousarray(pixels[top : top + rows, left : left + columns]),
            (24, 24),
            interpolation=cv2.INTER_CUBIC if smooth else cv2.INTER_LINEAR,
        )
        np.testing.assert_array_equal(shown, expected)
    assert 0 < flips < count
    assert made["image"].dtype == np.uint8
    assert made["label"].dtype == np.int32
    for part in (data.train, data.test):
        part.close()


def test_examples_are_the_same_however_they_are_made(imagenet):
    """Workers, file formats, cuts of the range, and where two processes' shares join."""
    first, count = 10**8 - 20, 64
    whole = None
    for file_format in FORMATS:
        for workers in (1, 2, 4, 8):
            data = open_set(imagenet.directories[file_format], workers=workers)
            made = data.train.training(3, first, count, flip=True)
            whole = whole or made
            rng = np.random.default_rng(workers)
            cuts = [0, *sorted(rng.choice(np.arange(1, count), workers, replace=False)), count]
            parts = [
                data.train.training(3, first + a, b - a, flip=True)
                for a, b in itertools.pairwise(cuts)
            ]
            for name, array in whole.items():
                np.testing.assert_array_equal(made[name], array)
                np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), array)
            data.train.close()


def test_the_set_is_training_data(imagenet):
    data = open_set(imagenet.directories["array_record"], flip=True)
    made, expected = data.training(3, N - 4, 9), data.train.training(3, N - 4, 9, flip=True)
    shown = data.evaluation(2, 5)
    for name, array in expected.items():
        np.testing.assert_array_equal(made[name], array)
        assert data.example_shapes[name] == (array.shape[1:], array.dtype)
        np.testing.assert_array_equal(shown[name], data.test.evaluation(2, 5)[name])
    assert (data.num_bad_records, data.on_device, data.is_augmented) == (None, None, True)
    assert json.loads(json.dumps(data.description)) == data.description
    others = ({"flip": False}, {"decoding": "smooth"}, {"image_size": 16}, {"train_examples": 5})
    for other in others:
        options = {"flip": True} | other
        changed = open_set(imagenet.directories["array_record"], **options)
        assert changed.description != data.description


def test_every_epoch_shows_every_image_once(imagenet):
    data = open_set(imagenet.directories["array_record"])
    expected = np.bincount(list(imagenet.labels.values()), minlength=TRAIN_CLASSES)
    for epoch in (0, 1, 5):
        labels = data.train.training(0, epoch * N, N, flip=False)["label"]
        np.testing.assert_array_equal(np.bincount(labels), expected)


def test_reading_needs_no_tensorflow(imagenet):
    program = f"""
import sys
from bigbatch.data import sets
sizes = {{"train_examples": 8, "test_examples": 2, "image_size": 16}}
for directory in {[str(d) for d in imagenet.directories.values()]}:
    data = sets.load("imagenet2012", directory=directory, **sizes)
    train, test = data.train.training(0, 0, 9, flip=True), data.test.evaluation(0, 2)
    print(train["image"].sum(), test["image"].sum())
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, other = done.stdout.splitlines()
    assert one == other


def test_the_first_examples_only(imagenet):
    data = open_set(imagenet.directories["array_record"], train_examples=5)
    whole = open_set(imagenet.directories["array_record"])
    assert data.train_examples == len(data.train) == 5
    # Records 0 to 4, in another order: each label comes as often.
    shown = data.train.training(0, 0, 5, flip=False)["label"]
    first = whole.train.evaluation(0, 5)["label"]
    assert sorted(shown) == sorted(first)


# The index of TFRecord files.


def test_index_is_made_once_and_kept_beside_the_data(imagenet, tmp_path, monkeypatch):
    data_dir = tmp_path / "data"
    shutil.copytree(imagenet.directories["tfrecord"], data_dir)
    for file in data_dir.glob("*/*/*.npz"):
        file.unlink()
    before = {file.name for file in data_dir.rglob("*")}
    open_set(data_dir)
    new = {file.name for file in data_dir.rglob("*")} - before
    assert new == {
        "imagenet2012-train.tfrecord.bigbatch_index.npz",
        "imagenet2012-validation.tfrecord.bigbatch_index.npz",
    }
    monkeypatch.setattr(tfrecord_index, "_walk", lambda *args: pytest.fail("made again"))
    open_set(data_dir)


def test_index_boundaries_against_tensorflow(imagenet):
    import tensorflow as tf

    files = imagenet.files("tfrecord", "train")
    files = [file for file in files if file.suffix != ".npz"]
    expected = [list(tf.data.TFRecordDataset(str(f)).as_numpy_iterator()) for f in files]
    index = tfrecord_index.load_or_build(files, [len(records) for records in expected])
    for file, records, boundaries in zip(files, expected, index.boundaries, strict=True):
        content = file.read_bytes()
        assert boundaries[-1] == len(content)
        found = [content[a + 12 : b - 4] for a, b in itertools.pairwise(boundaries)]
        assert found == records


def test_checksums_are_tensorflows(imagenet):
    """Of lengths and records, as they stand in a file that TensorFlow wrote."""
    content = next(
        f for f in imagenet.files("tfrecord", "train") if f.suffix != ".npz"
    ).read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert tfrecord.masked_crc32c(content[:8]) == int.from_bytes(content[8:12], "little")
    record, checksum = content[12 : 12 + length], content[12 + length : 16 + length]
    assert tfrecord.masked_crc32c(record) == int.from_bytes(checksum, "little")


def test_index_of_data_that_cannot_be_written_to(imagenet, tmp_path, monkeypatch):
    data_dir = tmp_path / "data"
    shutil.copytree(imagenet.directories["tfrecord"], data_dir)
    for file in data_dir.glob("*/*/*.npz"):
        file.unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    there = tfds_metadata.find("imagenet2012", data_dir).directory
    real = tfrecord_index.replacing

    def refuse(path):
        # The superuser, who may run this, can write anywhere.
        if path.parent == there:
            raise PermissionError(path)
        return real(path)

    monkeypatch.setattr(tfrecord_index, "replacing", refuse)
    open_set(data_dir)
    kept = list((tmp_path / "cache").rglob("*.npz"))
    assert len(kept) == 2
    assert not list(data_dir.rglob("*.npz"))
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o644 for file in kept)
    monkeypatch.setattr(tfrecord_index, "_walk", lambda *args: pytest.fail("made again"))
    open_set(data_dir)


@pytest.mark.parametrize("content", [b"", b"PK not an archive", "cut", None])
def test_a_damaged_or_old_index_is_made_anew(imagenet, tmp_path, content):
    data_dir = tmp_path / "data"
    shutil.copytree(imagenet.directories["tfrecord"], data_dir)
    expected = open_set(data_dir).train.training(0, 0, N, flip=True)
    kept = next(data_dir.rglob("*train*.npz"))
    if content is None:
        with np.load(kept) as file:
            arrays = dict(file)
        arrays["sizes_bytes"] = arrays["sizes_bytes"] + 1
        np.savez(kept, **arrays)
    elif content == "cut":
        kept.write_bytes(kept.read_bytes()[:200])
    else:
        kept.write_bytes(content)
    made = open_set(data_dir).train.training(0, 0, N, flip=True)
    np.testing.assert_array_equal(made["image"], expected["image"])


def test_the_command_prepares_it_from_the_two_tars(imagenet, tmp_path, capsys):
    tars = imagenet.directories["tfrecord"].with_name("manual")
    command = ["data", "prepare", "imagenet2012", f"--from={tars}", f"--directory={tmp_path}"]
    assert cli.main(command) == 0
    assert str(tmp_path / "imagenet2012") in capsys.readouterr().out
    made, known = (
        open_set(place).train.training(0, 0, N, flip=True)
        for place in (tmp_path, imagenet.directories["array_record"])
    )
    for name in ("image", "label"):
        np.testing.assert_array_equal(made[name], known[name])


@pytest.mark.parametrize(
    ("limits", "raised"), [((20, 10**6), True), ((10**6, 10**6), False), ((-1, -1), False)]
)
def test_the_limit_of_open_files_is_raised_where_there_are_more(monkeypatch, limits, raised):
    """-1 is no limit."""
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: asked.append(wanted))
    reader._allow_open_files(1024)
    assert bool(asked) == raised
    assert all(soft > 1024 and hard == limits[1] for soft, hard in asked)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (20, 100))
    with pytest.raises(UserError, match=r"open files: given 100; .*1,024 record files"):
        reader._allow_open_files(1024)
