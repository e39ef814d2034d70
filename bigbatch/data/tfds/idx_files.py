"""The four gz files in which MNIST and Fashion-MNIST are given away, in LeCun's idx format."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from bigbatch.errors import Problem, UserError

# Name in the file -> what it is called in a data set.
_PARTS = {"train": "train", "t10k": "test"}
_UNSIGNED_BYTES = 0x08
# Five times what these sets have.
_MOST_BYTES = 2**28


def file_names() -> tuple[str, ...]:
    """The names of the four files."""
    return tuple(
        f"{part}-{what}-ubyte.gz" for part in _PARTS for what in ("images-idx3", "labels-idx1")
    )


def read_parts(directory: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The images and labels of both parts.

    Args:
      directory: holds the files of `file_names`.

    Returns:
      `train` and `test`: images uint8[n, H, W, 1] and labels uint8[n], in the files' order.

    Raises:
      UserError: files are missing or damaged, all that could be found out at once.
    """
    problems: list[Problem] = []
    arrays = {}
    for name in file_names():
        try:
            arrays[name] = _read(directory / name)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    parts = {}
    for written, part in _PARTS.items():
        images = arrays[f"{written}-images-idx3-ubyte.gz"]
        labels = arrays[f"{written}-labels-idx1-ubyte.gz"]
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            given = f"images {images.shape} and labels {labels.shape} in {directory}/{written}-*"
            raise UserError(Problem("from", given, "images (n, height, width), labels (n,)"))
        parts[part] = images[..., None], labels
    return parts


def _read(path: Path) -> np.ndarray:
    """One file's array: a magic number with type and rank, the sizes (big-endian), the values."""
    if not path.is_file():
        raise UserError(Problem("from", str(path), "a file that is there"))
    try:
        with gzip.open(path) as file:
            # A few bytes may stand for any number of equal ones.
            content = file.read(_MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(Problem("from", str(path), f"a whole gz file ({error})")) from error
    if len(content) > _MOST_BYTES:
        allowed = f"a file of at most {_MOST_BYTES:,} bytes, unpacked"
        raise UserError(Problem("from", str(path), allowed))
    rank = content[3] if len(content) >= 4 else 0
    header = 4 + 4 * rank
    if content[:3] != bytes((0, 0, _UNSIGNED_BYTES)) or len(content) < header:
        raise UserError(Problem("from", str(path), "an idx file of unsigned bytes"))
    shape = tuple(np.frombuffer(content, ">u4", rank, 4).tolist())
    if len(content) != header + math.prod(shape):
        given = f"{path} with {len(content) - header:,} values"
        raise UserError(Problem("from", given, f"the {shape} values that its head announces"))
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
