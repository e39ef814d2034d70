"""What tells other examples from the same ones, wherever they lie.

Arrays in memory are told by all of their bytes, examples in large files by those of 64 of them: a
change elsewhere in a file is not seen. The words say which, and are compared as they are.
"""

import hashlib
import mmap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

_PROBED_EXAMPLES = 64
_PIECE_BYTES = 2**25
# Read in about a second.
_SMALL_FILE_BYTES = 2**30


def of_examples(
    num_examples: int, read: Callable[[np.ndarray], Mapping[str, np.ndarray]], *, whole: bool
) -> str:
    """A hash of examples in words.

    Args:
      num_examples: how many there are, at least 1.
      read: gives examples by their numbers, stacked, by name. What it gives otherwise when it is
        asked again cannot be told by its bytes.
      whole: whether all are read, else 64 from the first to the last.

    >>> of_examples(3, lambda numbers: {"x": numbers}, whole=True)
    'sha256 fc30e835f5e7ac9a of all 3 examples'
    """
    # An array of all their numbers could be the largest there is.
    numbers: Sequence[int] = range(num_examples)
    probed = f"all {num_examples:,} examples"
    if not whole and num_examples > _PROBED_EXAMPLES:
        numbers = np.linspace(0, num_examples - 1, _PROBED_EXAMPLES).astype(np.int64).tolist()
        probed = f"{_PROBED_EXAMPLES} of {num_examples:,} examples"
    first = read(np.arange(1))
    example_bytes = sum(array.nbytes for array in first.values())
    step = max(1, _PIECE_BYTES // max(np.int64().nbytes, example_bytes))
    found = [_sha256(read, numbers, step) for _ in range(1 if whole else 2)]
    if found[0] != found[-1]:
        return f"no hash of {probed}, which are others at every reading"
    return f"sha256 {found[0][:16]} of {probed}"


def _sha256(
    read: Callable[[np.ndarray], Mapping[str, np.ndarray]], numbers: Sequence[int], step: int
) -> str:
    digests: dict[str, Any] = {}
    for begin in range(0, len(numbers), step):
        for name, array in read(np.asarray(numbers[begin : begin + step])).items():
            kind = f"{name} {array.dtype.newbyteorder('<')} {array.shape[1:]}"
            little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
            digests.setdefault(kind, hashlib.sha256()).update(little.reshape(-1).view(np.uint8))
    told = sorted((kind, digest.hexdigest()) for kind, digest in digests.items())
    return hashlib.sha256(repr(told).encode()).hexdigest()


def is_read_whole(array: Any) -> bool:
    """Whether all of an array is read: one in memory or in a small file.

    Windows that overlap, which have more bytes than there are, are not.
    """
    at, root, mapped = array, array, False
    while at is not None:
        mapped = mapped or isinstance(at, np.memmap | mmap.mmap)
        root = at if isinstance(at, np.ndarray) else root
        at = getattr(at, "base", None)
    if not isinstance(array, np.ndarray) or array.nbytes > root.nbytes:
        return False
    return not mapped or array.nbytes <= _SMALL_FILE_BYTES
