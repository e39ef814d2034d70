"""Where the records of TFRecord files lie, so that any of them can be read directly.

A TFRecord file is a chain (see `bigbatch.data.tfrecord`). Only by walking along it can one
find where record k begins, so that is done once, from length to length, and kept in a file beside
the data, or in the user's cache directory where these cannot be written to or are in a bucket.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bigbatch.bars import Bar
from bigbatch.data.tfrecord import HEAD, LENGTH, TAIL, masked_crc32c
from bigbatch.errors import Problem, UserError
from bigbatch.places.caches import cache_directory
from bigbatch.places.paths import is_bucket, size_bytes
from bigbatch.places.replacing import replacing

# Finding a length is one small read, so the time goes into waiting: more threads than cores.
_THREADS = 8


class Index(NamedTuple):
    """Where the records of a split lie.

    Attributes:
      sizes_bytes: int64[files], of each file when the index was made.
      boundaries: for each file int64[records + 1], its records' first bytes and the file's end.
        Record k with its length and checksums is bytes boundaries[k] to boundaries[k + 1].
    """

    sizes_bytes: np.ndarray
    boundaries: tuple[np.ndarray, ...]


def load_or_build(
    files: Sequence[Path], shard_examples: Sequence[int], *, show_progress: bool = False
) -> Index:
    """The index of TFRecord files, from the file that keeps it, or made now and kept.

    Args:
      files: of a split, in order, in one directory; all there.
      shard_examples: how many records each should hold.
      show_progress: whether to show a progress bar on standard error while it is made.

    Returns:
      The index, which fits the files' present sizes.

    Raises:
      UserError: files that are cut short, damaged or of another number of records, all together.
    """
    sizes = np.array([size_bytes(file) for file in files], np.int64)
    places = _places(files)
    for place in places:
        index = _load(place, sizes, shard_examples)
        if index is not None:
            return index
    index = Index(sizes, _build(files, sizes, shard_examples, show_progress))
    for place in places:
        with contextlib.suppress(OSError):
            _save(place, index)
            break
    return index


def _places(files: Sequence[Path]) -> list[Path]:
    """The index's file: beside the data, or else in the cache directory of a user who has one."""
    directory = files[0].parent
    stem = files[0].name.partition("-00000")[0]
    digest = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
    name, cache = f"{stem}.bigbatch_index.npz", cache_directory("record_index")
    beside = [] if is_bucket(directory) else [directory / name]
    return [*beside, *([cache / f"{digest}-{name}"] if cache else [])]


def _load(place: Path, sizes: np.ndarray, shard_examples: Sequence[int]) -> Index | None:
    """The index in a file, or None: it is not there, damaged, or of other files."""
    try:
        with open(place, "rb") as kept, np.load(kept) as file:
            kept_sizes, counts, flat = file["sizes_bytes"], file["counts"], file["boundaries"]
        fits = np.array_equal(kept_sizes, sizes) and np.array_equal(counts, shard_examples)
        if not fits or flat.dtype != np.int64 or len(flat) != counts.sum() + len(counts):
            return None
        parts = np.split(flat, np.cumsum(counts + 1)[:-1])
    except Exception:
        # zip, zlib and npy have errors of their own; whatever it is, the index is made again.
        return None
    ends = zip(parts, sizes, strict=True)
    if all(part[0] == 0 and part[-1] == size and (np.diff(part) > 0).all() for part, size in ends):
        return Index(sizes, tuple(parts))
    return None


def _save(place: Path, index: Index) -> None:
    """Writes the index whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with replacing(place) as file:
        np.savez(
            file,
            sizes_bytes=index.sizes_bytes,
            counts=np.array([len(part) - 1 for part in index.boundaries], np.int64),
            boundaries=np.concatenate(index.boundaries),
        )


def _build(
    files: Sequence[Path], sizes: np.ndarray, shard_examples: Sequence[int], show_progress: bool
) -> tuple[np.ndarray, ...]:
    words = f"index of {files[0].parent.name} {files[0].name.partition('.')[0]}, made once"
    bar = Bar(int(sizes.sum()), "bytes", show=show_progress, words=words)
    problems, boundaries = [], []
    with bar, ThreadPoolExecutor(_THREADS) as pool:
        walks = [
            pool.submit(_walk, file, int(size)) for file, size in zip(files, sizes, strict=True)
        ]
        for file, size, expected, walk in zip(files, sizes, shard_examples, walks, strict=True):
            found, fault = walk.result()
            if fault is None and len(found) - 1 != expected:
                fault = f"it holds {len(found) - 1:,} records, not {expected:,}"
            if fault is not None:
                problems.append(damaged(file, fault))
            boundaries.append(found)
            bar.move(int(size))
    if problems:
        raise UserError(problems)
    return tuple(boundaries)


def _walk(file: Path, size: int) -> tuple[np.ndarray, str | None]:
    """The boundaries of a file's records, and what is wrong with the file, if anything."""
    boundaries, fault = [0], None
    with _heads(file) as head_at:
        while boundaries[-1] < size:
            begin, record = boundaries[-1], len(boundaries) - 1
            head = head_at(begin)
            if len(head) == HEAD.size:
                length, checksum = HEAD.unpack(head)
                if masked_crc32c(head[: LENGTH.size]) != checksum:
                    fault = f"the length of record {record} is damaged, at byte {begin:,}"
                    break
                boundaries.append(begin + HEAD.size + length + TAIL.size)
            if len(head) < HEAD.size or boundaries[-1] > size:
                fault = f"it ends within record {record}, at byte {size:,}"
                break
    return np.array(boundaries, np.int64), fault


@contextlib.contextmanager
def _heads(file: Path) -> Iterator[Callable[[int], bytes]]:
    """What reads the head of a record that begins at a byte; of a bucket some MB at a time."""
    if is_bucket(file):
        with file.open("rb") as opened:
            yield lambda begin: bytes(opened.read(HEAD.size)) if opened.seek(begin) >= 0 else b""
        return
    descriptor = os.open(file, os.O_RDONLY)
    try:
        yield lambda begin: os.pread(descriptor, HEAD.size, begin)
    finally:
        os.close(descriptor)


def damaged(file: Path, fault: str) -> Problem:
    """What to say of a file of records that cannot be used."""
    allowed = f"a whole file of records ({fault}); copy or prepare it again"
    return Problem("directory", str(file), allowed)
