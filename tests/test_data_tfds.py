"""Data sets that tensorflow-datasets prepared: read, described, and what is wrong with them."""

import gzip
import io
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from bigbatch import cli
from bigbatch.data import sets
from bigbatch.data.tfds import files as tfds_files
from bigbatch.data.tfds import idx_files, prepare
from bigbatch.data.tfds import metadata as tfds_metadata
from bigbatch.errors import RunError, UserError


def problems(call, *args, **kwargs):
    """The fields and nearest values of the mistakes that the call finds."""
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    return [(problem.field, problem.nearest) for problem in error.value.problems]


def write_tfds(root, name, file_format, counts, first_label=0):
    """Files of tensorflow-datasets, made without it where that needs TensorFlow."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    builder = tfds.builder(name, data_dir=root, file_format=file_format)
    directory = builder.data_path
    directory.mkdir(parents=True)
    shape = builder.info.features["image"].shape
    infos, written = [], {}
    for split, count in counts.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=directory, dataset_name=name, split=split, filetype_suffix=file_format
        )
        images = np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)
        labels = first_label + np.arange(count) % 10
        writer = ArrayRecordWriter(str(template.sharded_filepaths(1)[0]), "group_size:1")
        for image, label in zip(images, labels, strict=True):
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG")
            example = tf_example_pb2.Example()
            example.features.feature["image"].bytes_list.value.append(png.getvalue())
            example.features.feature["label"].int64_list.value.append(int(label))
            example.features.feature["id"].bytes_list.value.append(b"unused")
            writer.write(example.SerializeToString())
        writer.close()
        written[split] = images, labels
        infos.append(
            tfds.core.SplitInfo(
                name=split, shard_lengths=[count], num_bytes=1, filename_template=template
            )
        )
    builder.info.set_splits(tfds.core.splits.SplitDict(infos))
    builder.info.write_to_directory(directory)
    return written


def find(name, root):
    prepared = tfds_metadata.find(name, root)
    assert prepared is not None
    return prepared


def test_arrays_are_read_without_tensorflow(tmp_path):
    written = write_tfds(tmp_path, "cifar10", "array_record", {"train": 12, "test": 5})
    prepared = find("cifar10", tmp_path)
    assert (prepared.image_shape, prepared.num_classes) == ((32, 32, 3), 10)
    for split in ("train", "test"):
        images, labels = tfds_files.read(prepared, split)
        np.testing.assert_array_equal(images, written[split][0])
        np.testing.assert_array_equal(labels, written[split][1])
    # A whole data set is expected: these are not CIFAR-10's 50,000.
    assert problems(sets.load, "cifar10", directory=tmp_path) == [
        ("train_examples", 12),
        ("test_examples", 5),
    ]


def test_a_set_that_is_not_in_the_table(tmp_path):
    written = write_tfds(tmp_path, "cmaterdb", "array_record", {"train": 12, "test": 5})
    facts = sets.info("cmaterdb", directory=tmp_path)
    assert (facts.train_examples, facts.test_examples, facts.num_classes) == (12, 5, 10)
    assert facts.image_shape == (32, 32, 3)
    data = sets.load("cmaterdb", directory=tmp_path, train_examples=7)
    images = written["train"][0][:7]
    np.testing.assert_array_equal(data.train.images, images)
    np.testing.assert_array_equal(data.test.labels, written["test"][1])
    assert data.mean == pytest.approx(images.mean(axis=(0, 1, 2)))
    assert data.std == pytest.approx(images.std(axis=(0, 1, 2)))
    assert problems(sets.info, "cmaterdb", directory=tmp_path, train_examples=13) == [
        ("train_examples", 12)
    ]


def test_missing_files_are_said_with_the_command_that_gets_them(tmp_path):
    command = f"bigbatch data prepare cifar10 --directory={tmp_path}"
    with pytest.raises(UserError, match=command) as error:
        sets.load("cifar10", directory=tmp_path)
    assert [(p.field, p.nearest) for p in error.value.problems] == [("name", None)]
    with pytest.raises(UserError, match="bigbatch data prepare cmaterdb"):
        sets.info("cmaterdb", directory=tmp_path)


def idx(array: np.ndarray) -> bytes:
    head = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return gzip.compress(head + array.tobytes())


@pytest.fixture
def idx_directory(tmp_path):
    """A tiny Fashion-MNIST in its four files."""
    directory = tmp_path / "idx"
    directory.mkdir()
    rng = np.random.default_rng(0)
    for part, count in (("train", 30), ("t10k", 11)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (directory / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(images))
        labels = np.arange(count, dtype=np.uint8) % 10
        (directory / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    return directory


def test_fashion_mnist_is_made_from_its_idx_files(tmp_path, idx_directory, capsys):
    arguments = ["data", "prepare", "fashion_mnist", f"--directory={tmp_path / 'tfds'}"]
    assert cli.main([*arguments, f"--from={idx_directory}"]) == 0
    assert "is now prepared" in capsys.readouterr().out
    parts = idx_files.read_parts(idx_directory)
    prepared = find("fashion_mnist", tmp_path / "tfds")
    for split in ("train", "test"):
        images, labels = tfds_files.read(prepared, split)
        np.testing.assert_array_equal(images, parts[split][0])
        np.testing.assert_array_equal(labels, parts[split][1])
    assert cli.main(arguments) == 0
    assert "is already prepared" in capsys.readouterr().out


def test_images_that_are_no_squares():
    """Their height comes first, and their width first where a library says their size."""
    from tensorflow_datasets.proto import tf_example_pb2

    image, png = np.arange(72, dtype=np.uint8).reshape(4, 6, 3), io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    example = tf_example_pb2.Example()
    example.features.feature["image"].bytes_list.value.append(png.getvalue())
    example.features.feature["label"].int64_list.value.append(7)
    found, label = tfds_files._example(example.SerializeToString(), (4, 6, 3))
    np.testing.assert_array_equal(found, image)
    assert label == 7
    with pytest.raises(ValueError, match=r"of \(4, 6\) pixels, not of \(6, 4\)"):
        tfds_files._example(example.SerializeToString(), (6, 4, 3))


@pytest.mark.parametrize(("images", "labels"), [((11, 28, 28), 10), ((11, 28), 11)])
def test_labels_that_are_of_other_images_are_refused(idx_directory, images, labels):
    for kind, shape in (("images-idx3", images), ("labels-idx1", (labels,))):
        (idx_directory / f"t10k-{kind}-ubyte.gz").write_bytes(idx(np.zeros(shape, np.uint8)))
    with pytest.raises(UserError, match=re.escape(f"images {images} and labels ({labels},)")):
        idx_files.read_parts(idx_directory)


def test_what_was_made_is_a_data_set_to_tensorflow_datasets(tmp_path, idx_directory):
    """Its own reader of ArrayRecord gives the same examples."""
    import tensorflow_datasets as tfds

    prepare.prepare("fashion_mnist", data_dir=tmp_path / "tfds", source=idx_directory)
    source = tfds.data_source("fashion_mnist", split="test", data_dir=tmp_path / "tfds")
    images, labels = idx_files.read_parts(idx_directory)["test"]
    assert len(source) == len(images)
    for i, example in enumerate(source):
        np.testing.assert_array_equal(example["image"], images[i])
        assert example["label"] == labels[i]


def test_preparing_needs_no_tensorflow_where_arrays_are_written(tmp_path, idx_directory):
    code = (
        "import sys; from bigbatch import cli; status = cli.main(sys.argv[1:]); "
        "assert 'tensorflow' not in sys.modules; assert 'jax' not in sys.modules; sys.exit(status)"
    )
    arguments = ["data", "prepare", "fashion_mnist", f"--directory={tmp_path / 'tfds'}"]
    command = [sys.executable, "-c", code, *arguments, f"--from={idx_directory}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_reading_needs_no_tensorflow_datasets_and_preparing_says_so(
    tmp_path, idx_directory, monkeypatch
):
    root = tmp_path / "tfds"
    prepare.prepare("fashion_mnist", data_dir=root, source=idx_directory)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    images, labels = tfds_files.read(find("fashion_mnist", root), "test")
    expected = idx_files.read_parts(idx_directory)["test"]
    np.testing.assert_array_equal(images, expected[0])
    np.testing.assert_array_equal(labels, expected[1])
    with pytest.raises(RunError, match=r"needs tensorflow_datasets .* 'bigbatch\[records\]'"):
        prepare.prepare("fashion_mnist", data_dir=root)


@pytest.mark.parametrize(("name", "packaged"), [("mnist", False), ("fashion_mnist", True)])
def test_what_could_not_be_prepared_says_where_else_its_files_are(
    tmp_path, monkeypatch, name, packaged
):
    class Builder:
        MANUAL_DOWNLOAD_INSTRUCTIONS = ""
        is_prepared = staticmethod(lambda: False)

        def download_and_prepare(self, **_):
            raise ConnectionError("no network")

    monkeypatch.setattr(prepare, "_builder", lambda *_: Builder())
    monkeypatch.setattr(prepare, "_SYSTEM_FILES", {"fashion_mnist": tmp_path})
    with pytest.raises(RunError, match="ConnectionError: no network\nIt is also made") as error:
        prepare.prepare(name, data_dir=tmp_path)
    assert ("Debian's package" in str(error.value)) == packaged


def test_damaged_and_missing_idx_files_are_told_together(tmp_path, idx_directory):
    whole = (idx_directory / "train-images-idx3-ubyte.gz").read_bytes()
    (idx_directory / "train-images-idx3-ubyte.gz").write_bytes(whole[:-100])
    (idx_directory / "train-labels-idx1-ubyte.gz").unlink()
    (idx_directory / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\x00\x00\x0d\x01"))
    (idx_directory / "t10k-images-idx3-ubyte.gz").write_bytes(
        gzip.compress(gzip.decompress(idx(np.zeros((3, 2, 2), np.uint8)))[:-1])
    )
    with pytest.raises(UserError) as error:
        prepare.prepare("fashion_mnist", data_dir=tmp_path, source=idx_directory)
    words = [str(problem) for problem in error.value.problems]
    for text in ("a whole gz file", "a file that is there", "head announces", "unsigned bytes"):
        assert any(text in word for word in words), (text, words)
    assert not (tmp_path / "fashion_mnist").exists()


def test_mistakes_of_data_prepare(tmp_path):
    assert problems(prepare.prepare, "fashion_mnits", data_dir=tmp_path) == [
        ("name", "fashion_mnist")
    ]
    assert problems(prepare.prepare, "digits", data_dir=tmp_path) == [("name", None)]
    assert problems(prepare.prepare, "cifar10", source=tmp_path / "none") == [("from", None)]


def test_info_says_what_is_known_and_the_command_that_gets_the_rest(tmp_path, capsys):
    def info(*arguments):
        assert cli.main(["data", "info", *arguments]) == 0
        return capsys.readouterr().out

    assert "comes with bigbatch" in info("digits")
    text = info("cifar10", f"--directory={tmp_path}")
    for expected in ("50,000 training", "(32, 32, 3), 10 classes", "125.31", "not on disk"):
        assert expected in text
    assert f"bigbatch data prepare cifar10 --directory={tmp_path}\n" in text
    write_tfds(tmp_path, "stl10", "array_record", {"train": 12, "test": 5})
    text = info("stl10", f"--directory={tmp_path}")
    for expected in ("12 training", "5 to test", "(96, 96, 3)", "array_record files in"):
        assert expected in text
    (shard,) = tfds_metadata.find("stl10", tmp_path).files("test")
    shard.unlink()
    assert f"missing of test: 1 of 1 files\n    {shard.name}" in info(
        "stl10", f"--directory={tmp_path}"
    )


def test_missing_damaged_and_wrong_files_are_named(tmp_path):
    write_tfds(tmp_path, "stl10", "array_record", {"train": 12, "test": 5})
    prepared = find("stl10", tmp_path)
    (train,), (test,) = prepared.files("train"), prepared.files("test")
    whole = train.read_bytes()
    train.write_bytes(whole[:-1_000])
    with pytest.raises(UserError, match=r"stl10-train.*prepare it again"):
        sets.load("stl10", directory=tmp_path)
    # A whole file of another part: the number of records tells.
    train.write_bytes(test.read_bytes())
    with pytest.raises(UserError, match="it holds 5 records, not 12"):
        sets.load("stl10", directory=tmp_path)
    train.unlink()
    with pytest.raises(UserError, match=r"stl10-train.*it is not there"):
        sets.load("stl10", directory=tmp_path)


def test_labels_out_of_range_are_named(tmp_path):
    """Ten classes, and a description that knows of seven."""
    write_tfds(tmp_path, "stl10", "array_record", {"train": 12, "test": 5})
    features = find("stl10", tmp_path).directory / "features.json"
    features.write_text(features.read_text().replace('"numClasses": "10"', '"numClasses": "7"'))
    with pytest.raises(UserError, match=r"label 7 of example 7 in the train part") as error:
        sets.load("stl10", directory=tmp_path)
    assert len(error.value.problems) == 1


def test_a_label_past_2_31_is_no_smaller_one(tmp_path):
    write_tfds(tmp_path, "stl10", "array_record", {"train": 12, "test": 5}, first_label=2**32)
    with pytest.raises(UserError, match=r"record 0: .* 4294967296 out of bounds"):
        sets.load("stl10", directory=tmp_path)


def test_tfrecord_files_are_read_as_tensorflow_wrote_them(tmp_path):
    """TFRecord is what tensorflow-datasets writes unless it is told otherwise."""
    import tensorflow as tf

    written = write_tfds(tmp_path, "stl10", "array_record", {"train": 12, "test": 5})
    prepared = find("stl10", tmp_path)
    for split in written:
        (file,) = prepared.files(split)
        records = tfds_files._records(file, "array_record")
        with tf.io.TFRecordWriter(str(file).replace("array_record", "tfrecord")) as writer:
            for record in records:
                writer.write(record)
        file.unlink()
    info = prepared.directory / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    data = sets.load("stl10", directory=tmp_path)
    np.testing.assert_array_equal(data.train.images, written["train"][0])
    np.testing.assert_array_equal(data.test.labels, written["test"][1])
    (file,) = find("stl10", tmp_path).files("train")
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(UserError, match="it ends within record 11"):
        sets.load("stl10", directory=tmp_path)
