"""Record data that is damaged, missing or not what was asked for."""

import os
import shutil
import struct

import numpy as np
import pytest

from bigbatch.data import sets
from bigbatch.data.records.reader import BadRecordError, parse
from bigbatch.data.tfds import metadata as tfds_metadata
from bigbatch.errors import RunError, UserError
from tests.imagenet_files import FORMATS, TEST_IMAGES
from tests.test_records import N, open_set


@pytest.fixture(params=FORMATS)
def own_copy(request, imagenet, tmp_path):
    """A copy of the data set that may be damaged."""
    shutil.copytree(imagenet.directories[request.param], tmp_path / "data")
    return tmp_path / "data"


def train_files(data_dir):
    return sorted(
        file
        for file in data_dir.glob("imagenet2012/*/imagenet2012-train.*-*-of-*")
        if file.suffix != ".npz"
    )


def problems(call, *args, **kwargs):
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    return error.value.problems


def test_missing_files_are_named_together(own_copy):
    files = train_files(own_copy)
    files[0].unlink()
    files[2].unlink()
    found = problems(open_set, own_copy)
    assert [p.given for p in found] == [str(files[0]), str(files[2])]
    assert all("not there" in p.allowed for p in found)


def last_record(file):
    """The number of the one that a TFRECORD file ends within: a length, 12 bytes and the record."""
    content, begin, number = file.read_bytes(), 0, -1
    while begin < len(content):
        begin += 16 + struct.unpack_from("<Q", content, begin)[0]
        number += 1
    return number


def test_a_file_that_was_cut(own_copy):
    """TFRecord: found when it is opened. ArrayRecord: when its first record is shown."""
    file = train_files(own_copy)[1]
    os.truncate(file, file.stat().st_size - 700)
    if "tfrecord" in file.name:
        (problem,) = problems(open_set, own_copy)
        assert problem.given == str(file)
        assert f"ends within record {last_record(file)}," in problem.allowed
    else:
        data = open_set(own_copy)
        with pytest.raises(RunError, match=f"record 0 of {file}|record [0-9]+ of {file}"):
            data.train.training(0, 0, N, flip=False)


def test_a_file_of_other_records(own_copy):
    """Whole files, but one of them is another shard's."""
    files = train_files(own_copy)
    counts = tfds_metadata.find("imagenet2012", own_copy).shard_examples["train"]
    test = next(own_copy.glob("*/*/imagenet2012-validation*-00000-of-*"))
    shutil.copy(test, files[0])
    if "tfrecord" in files[0].name:
        (problem,) = problems(open_set, own_copy)
        assert f"not {counts[0]}" in problem.allowed
    else:
        with pytest.raises(RunError, match=f"not {counts[0]}"):
            open_set(own_copy).train.training(0, 0, N, flip=False)


def test_another_number_of_examples_than_the_plans(imagenet):
    data_dir = imagenet.directories["array_record"]
    train, test = problems(sets.load, "imagenet2012", directory=data_dir, image_size=24)
    assert (train.field, train.nearest) == ("train_examples", N)
    assert (test.field, test.nearest) == ("test_examples", TEST_IMAGES)
    (problem,) = problems(open_set, data_dir, train_examples=N + 1)
    assert (problem.field, problem.nearest) == ("train_examples", N)


def test_nothing_there(tmp_path):
    (problem,) = problems(open_set, tmp_path)
    assert "bigbatch data prepare imagenet2012" in problem.allowed


def flip_a_bit(data_dir, image: bytes) -> None:
    """Changes one bit of one image in its file."""
    piece = image[len(image) // 2 :][:32]
    for file in train_files(data_dir):
        content = bytearray(file.read_bytes())
        at = content.find(piece)
        if at >= 0:
            content[at] ^= 4
            file.write_bytes(content)
            return
    raise AssertionError("no file holds the image")


def write_again(data_dir, changes) -> None:
    """Writes the TFRecord files of a split with other examples: `changes(example)` in place."""
    import tensorflow as tf

    for file in train_files(data_dir):
        records = list(tf.data.TFRecordDataset(str(file)).as_numpy_iterator())
        with tf.io.TFRecordWriter(str(file)) as writer:
            for record in records:
                example = tf.train.Example.FromString(record)
                changes(example.features.feature)
                writer.write(example.SerializeToString())


def test_flipped_bits_are_found_by_checksums(own_copy, imagenet):
    flip_a_bit(own_copy, next(iter(imagenet.images.values())))
    data = open_set(own_copy)
    with pytest.raises(RunError, match=r"record \d+ of .*imagenet2012-train.*cannot be used"):
        data.train.training(0, 0, N, flip=False)
    whole = open_set(own_copy, on_bad_record="replace")
    assert len(whole.train.training(0, 0, N, flip=False)["label"]) == N
    assert whole.num_bad_records == 1


@pytest.fixture
def with_bad_records(imagenet, tmp_path):
    """Three records that cannot be used: half a JPEG, a label out of range, no image."""
    data_dir = tmp_path / "data"
    shutil.copytree(imagenet.directories["tfrecord"], data_dir)
    bad = dict(zip(list(imagenet.images)[3:6], ("half", "label", "none"), strict=True))

    def change(feature):
        kind = bad.get(feature["file_name"].bytes_list.value[0].decode())
        image = feature["image"].bytes_list.value
        if kind == "half":
            image[0] = image[0][: len(image[0]) // 2]
        elif kind == "label":
            feature["label"].int64_list.value[0] = 1000
        elif kind == "none":
            del image[:]

    write_again(data_dir, change)
    return data_dir


def test_bad_records_are_an_error_that_names_them(with_bad_records):
    data = open_set(with_bad_records)
    messages = []
    for position in range(N):
        try:
            data.train.training(0, position, 1, flip=True)
        except RunError as error:
            messages.append(str(error))
    assert len(messages) == 3
    for message in messages:
        assert "imagenet2012-train.tfrecord-" in message
        assert "data.on_bad_record" in message
    for words in ("damaged", "label is 1000", "feature `image`"):
        assert sum(words in message for message in messages) == 1
    for part in (data.train, data.test):
        part.close()


def test_bad_records_are_replaced_by_the_next_of_the_epoch(with_bad_records, capsys):
    good = open_set(with_bad_records)
    bad = set()
    for position in range(N):
        try:
            good.train.training(0, position, 1, flip=True)
        except RunError:
            bad.add(position)
    assert len(bad) == 3
    expected = []
    for position in range(N):
        while position % N in bad:
            position += 1
        expected.append(good.train.training(0, position % N, 1, flip=True))
    whole = None
    for workers in (1, 4):
        data = open_set(with_bad_records, on_bad_record="replace", workers=workers)
        made = data.train.training(0, 0, N, flip=True)
        whole = whole or made
        parts = [data.train.training(0, p, 1, flip=True) for p in range(N)]
        for name in made:
            np.testing.assert_array_equal(made[name], whole[name])
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), made[name])
            np.testing.assert_array_equal(np.concatenate([e[name] for e in expected]), made[name])
        assert data.num_bad_records == 3
        # Each is said once.
        assert capsys.readouterr().err.count("another one is shown") == 3


def test_a_set_of_bad_records_ends(imagenet, tmp_path):
    data_dir = tmp_path / "data"
    shutil.copytree(imagenet.directories["tfrecord"], data_dir)

    def change(feature):
        feature["label"].int64_list.value[0] = -1

    write_again(data_dir, change)
    data = open_set(data_dir, on_bad_record="replace")
    with pytest.raises(RunError, match="100 records in a row"):
        data.train.training(0, 0, 2, flip=True)


def test_records_that_are_no_examples():
    for record in (b"\xff\xff\xff", b""):
        with pytest.raises(BadRecordError):
            parse(record)
