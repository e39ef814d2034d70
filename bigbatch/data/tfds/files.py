"""Small data sets from the files of tensorflow-datasets, read without TensorFlow.

A file's records are read at once and only the pixels are decoded one image at a time: six times
faster than example by example through `tfds.data_source`.
"""

from pathlib import Path

import numpy as np

from bigbatch.data import images
from bigbatch.data.tfds import metadata as tfds_metadata
from bigbatch.data.tfds.metadata import Prepared
from bigbatch.data.tfrecord import unframed
from bigbatch.errors import Problem, UserError
from bigbatch.places.paths import to_prepare

FORMATS = (tfds_metadata.ARRAY_RECORD, tfds_metadata.TFRECORD)


def read(prepared: Prepared, split: str) -> tuple[np.ndarray, np.ndarray]:
    """One split of an image-classification set, in the order of its files.

    Args:
      prepared: from `tfds_metadata.find`, with images of one shape.
      split: of its splits.

    Returns:
      Images, uint8[n, H, W, C], and labels, int32[n].

    Raises:
      UserError: files are missing, damaged or in another format, or hold other images than the data
        set's description says. All missing files are told together.
    """
    check(prepared)
    files = prepared.files(split)
    missing = [_damaged(prepared, file, "it is not there") for file in files if not file.is_file()]
    if missing:
        raise UserError(missing)
    count = prepared.num_examples(split)
    try:
        pixels = np.empty((count, *prepared.image_shape), np.uint8)  # type: ignore[misc]
        labels = np.empty(count, np.int32)
    except (MemoryError, ValueError) as error:
        raise UserError(_damaged(prepared, prepared.directory, str(error))) from error
    done = 0
    for file, expected in zip(files, prepared.shard_examples[split], strict=True):
        try:
            records = _records(file, prepared.file_format)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(_damaged(prepared, file, str(error))) from error
        if len(records) != expected:
            words = f"it holds {len(records):,} records, not {expected:,}"
            raise UserError(_damaged(prepared, file, words))
        for i, record in enumerate(records):
            try:
                pixels[done + i], labels[done + i] = _example(record, pixels.shape[1:])
            except Exception as error:
                # The parsers of records and images fail in ways of their own.
                words = f"record {i}: {type(error).__name__}: {error}"
                raise UserError(_damaged(prepared, file, words)) from error
        done += expected
    return pixels, labels


def check(prepared: Prepared, *, any_shape: bool = False) -> None:
    """Raise a UserError unless a prepared data set has images, of one shape each or of any."""
    if prepared.file_format not in FORMATS:
        given = f"{prepared.file_format} files in {prepared.directory}"
        raise UserError(Problem("name", given, f"files of a format in {', '.join(FORMATS)}"))
    if prepared.image_shape is None or prepared.num_classes is None:
        allowed = "a data set for classification, with the features image and label"
        raise UserError(Problem("name", prepared.name, allowed))
    if len(prepared.image_shape) != 3 or (None in prepared.image_shape and not any_shape):
        given = f"{prepared.name}, with images of shape {prepared.image_shape}"
        raise UserError(Problem("name", given, "a data set whose images all have one shape"))


def missing(name: str, data_dir: str | Path | None) -> Problem:
    """What to say of a data set that is not on disk: the command that gets it."""
    place = tfds_metadata.data_directory(data_dir) / name
    command = prepare_command(name, data_dir)
    allowed = f"a data set that is on disk (nothing is in {place}; this gets it: {command})"
    return Problem("name", name, allowed)


def prepare_command(name: str, data_dir: str | Path | None) -> str:
    """The command that puts a data set on disk."""
    where = "" if data_dir is None else f" {to_prepare(data_dir)}"
    return f"bigbatch data prepare {name}{where}"


def _damaged(prepared: Prepared, file: Path, words: str) -> Problem:
    allowed = f"files as {prepared.name} was prepared with ({words}); remove {prepared.directory} "
    return Problem("directory", str(file), f"{allowed}and prepare it again")


def _records(file: Path, file_format: str) -> list[bytes]:
    """All records of a file."""
    if file_format == tfds_metadata.ARRAY_RECORD:
        from array_record.python.array_record_module import ArrayRecordReader

        reader = ArrayRecordReader(str(file))
        try:
            return list(reader.read_all()) if reader.num_records() else []
        finally:
            reader.close()
    return unframed(file.read_bytes())


def _example(record: bytes, shape: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """The image, uint8[H, W, C], and the label of a record."""
    from bigbatch.data import tf_example

    features = tf_example.Example.FromString(record).features.feature
    image = images.opened(features["image"].bytes_list.value[0])
    label = features["label"].int64_list.value[0]
    if image.size[::-1] != shape[:2]:
        raise ValueError(f"an image of {image.size[::-1]} pixels, not of {shape[:2]}")
    return images.shown(image, shape[2]), label
