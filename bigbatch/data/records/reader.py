"""Random access to the records of a data set that tensorflow-datasets prepared.

Both of its formats, ArrayRecord and TFRecord, are read without TensorFlow; the latter with an index
(`tfrecord_index`). Records are numbered through all files of a split, in their order.
"""

import os
import threading
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from bigbatch.data.records.tfrecord_index import Index, damaged, load_or_build
from bigbatch.data.tfds import metadata as tfds_metadata
from bigbatch.data.tfds.metadata import Prepared
from bigbatch.data.tfrecord import HEAD, TAIL, masked_crc32c
from bigbatch.errors import Problem, UserError
from bigbatch.places.paths import is_bucket

# Files that a process has open beside those of the records.
_OTHER_OPEN_FILES = 256
# Reads of a bucket for each core.
_IN_FLIGHT = 8


class BadRecordError(Exception):
    """One record that cannot be used; its text says why, without naming it."""


class Example(NamedTuple):
    """What a record of an image-classification set holds.

    Attributes:
      image: an encoded image, JPEG or PNG.
      label: as written.
    """

    image: bytes
    label: int


class _Files(Protocol):
    """The records of files in one format."""

    def read(self, file: int, record: int) -> bytes: ...

    def close(self) -> None: ...


class Records:
    """The records of a split; threads may read at the same time.

    Files are opened when they are first read, and stay open.
    """

    def __init__(self, prepared: Prepared, split: str, *, show_progress: bool = False):
        """Finds the files, and makes the index of TFRecord files where there is none.

        Args:
          prepared: from `tfds_metadata.find`.
          split: of its splits.
          show_progress: whether to show a progress bar on standard error while an index is made.

        Raises:
          UserError: missing or damaged files, all of them together; a format that is neither
            ArrayRecord nor TFRecord; more files than the system lets a process open.
        """
        if prepared.file_format not in (tfds_metadata.ARRAY_RECORD, tfds_metadata.TFRECORD):
            given = f"{prepared.file_format} files in {prepared.directory}"
            raise UserError(Problem("name", given, "files in the format array_record or tfrecord"))
        if not prepared.shard_examples.get(split):
            given = f"{prepared.directory}, with the splits {', '.join(prepared.shard_examples)}"
            raise UserError(Problem("directory", given, f"a data set with the split {split}"))
        self._paths = prepared.files(split)
        there = _names(self._paths[0].parent)
        missing = [path for path in self._paths if path.name not in there]
        if missing:
            raise UserError(damaged(path, "it is not there") for path in missing)
        _allow_open_files(len(self._paths))
        counts = prepared.shard_examples[split]
        # _first[i] is the number of the first record of file i.
        self._first = np.concatenate([[0], np.cumsum(counts)])
        self._files: _Files
        if prepared.file_format == tfds_metadata.TFRECORD:
            index = load_or_build(self._paths, counts, show_progress=show_progress)
            self._files = _TFRecordFiles(self._paths, index)
        else:
            self._files = _ArrayRecordFiles(self._paths, counts)

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def usual_workers(self) -> int:
        """As many threads as this process has cores; more where they wait for a bucket."""
        return len(os.sched_getaffinity(0)) * (_IN_FLIGHT if is_bucket(self._paths[0]) else 1)

    def read(self, index: int) -> bytes:
        """The record of that number.

        Raises:
          BadRecordError: it is damaged, or its file is.
        """
        return self._files.read(*self._place(index))

    def where(self, index: int) -> str:
        """File and number in it of a record, for messages."""
        file, record = self._place(index)
        return f"record {record} of {self._paths[file]}"

    def close(self) -> None:
        """Closes the files. No thread may be reading; the next read opens them again."""
        self._files.close()

    def _place(self, index: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._first, index, side="right")) - 1
        return file, int(index - self._first[file])


def parse(record: bytes) -> Example:
    """Image and label of a record, as tensorflow-datasets writes them: features of an Example.

    Args:
      record: a serialized `tf.train.Example` with the features `image` and `label`.

    Raises:
      BadRecordError: it is none.
    """
    from google.protobuf.message import DecodeError

    from bigbatch.data import tf_example

    try:
        features = tf_example.Example.FromString(record).features.feature
    except DecodeError as error:
        raise BadRecordError(f"it is no tf.train.Example: {error}") from error
    image = features["image"].bytes_list.value
    label = features["label"].int64_list.value
    if len(image) != 1 or len(label) != 1:
        raise BadRecordError("it has not one feature `image` and one feature `label`")
    return Example(image[0], label[0])


class _TFRecordFiles:
    def __init__(self, paths: list[Path], index: Index):
        self._paths = paths
        self._index = index
        self._lock = threading.Lock()
        self._descriptors: dict[int, int] = {}

    def read(self, file: int, record: int) -> bytes:
        begin, end = self._index.boundaries[file][record : record + 2].tolist()
        try:
            data = self._bytes(file, begin, end)
        except OSError as error:
            raise BadRecordError(f"it cannot be read: {error}") from error
        if len(data) != end - begin:
            raise BadRecordError("the file ends within it: it was cut since its index was made")
        content = data[HEAD.size : -TAIL.size]
        if HEAD.unpack_from(data)[0] != len(content):
            raise BadRecordError("it has another length than in the index of its file")
        if masked_crc32c(content) != TAIL.unpack_from(data, len(data) - TAIL.size)[0]:
            raise BadRecordError("its checksum is another than the one written with it")
        return content

    def close(self) -> None:
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def _bytes(self, file: int, begin: int, end: int) -> bytes:
        if is_bucket(self._paths[file]):
            from bigbatch.places import buckets

            return buckets.read(self._paths[file], begin, end)
        return os.pread(self._descriptor(file), end - begin, begin)

    def _descriptor(self, file: int) -> int:
        if file not in self._descriptors:
            with self._lock:
                if file not in self._descriptors:
                    self._descriptors[file] = os.open(self._paths[file], os.O_RDONLY)
        return self._descriptors[file]


class _ArrayRecordFiles:
    def __init__(self, paths: list[Path], counts: tuple[int, ...]):
        self._paths = paths
        self._counts = counts
        self._lock = threading.Lock()
        self._readers: dict[int, Any] = {}

    def read(self, file: int, record: int) -> bytes:
        try:
            return self._reader(file).read([record])[0]
        # The reader's C++ code raises these alone.
        except (OSError, RuntimeError, IndexError) as error:
            raise BadRecordError(f"it cannot be read: {error}") from error

    def close(self) -> None:
        with self._lock:
            while self._readers:
                self._readers.popitem()[1].close()

    def _reader(self, file: int) -> Any:
        if file not in self._readers:
            from array_record.python.array_record_module import ArrayRecordReader

            with self._lock:
                if file not in self._readers:
                    path = self._paths[file]
                    # The reader's C++ code ends the process where there is no such file.
                    path.stat()
                    # Records are read one at a time, in no order.
                    options = "readahead_buffer_size:0"
                    reader = ArrayRecordReader(
                        str(path), options=options, file_reader_buffer_size=2**15
                    )
                    # A file that was cut has lost the table at its end.
                    if reader.num_records() != self._counts[file]:
                        held, expected = reader.num_records(), self._counts[file]
                        reader.close()
                        words = f"its file holds {held:,} records that can be found"
                        raise BadRecordError(f"{words}, not {expected:,}")
                    self._readers[file] = reader
        return self._readers[file]


def _names(directory: Path) -> set[str]:
    """The names of the files in a directory."""
    if is_bucket(directory):
        return {path.name for path in directory.iterdir()}
    return {entry.name for entry in os.scandir(directory) if entry.is_file()}


def _allow_open_files(count: int) -> None:
    """Lets this process open so many more files; ImageNet has more than the usual 1,024."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    needed += count + _OTHER_OPEN_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            allowed = f"a limit of at least {needed:,} (ulimit -n), for the {count:,} record files"
            raise UserError(Problem("open files", hard, allowed, needed))
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
