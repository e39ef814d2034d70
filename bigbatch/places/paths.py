"""Places: paths on this machine, and in a bucket of Google Cloud Storage, which begin with gs://.

Those on this machine are pathlib's. A bucket's are etils.epath's, which have the same methods; what
these cannot do is in `bigbatch.places.buckets`.
"""

import re
from pathlib import Path
from typing import Any

from bigbatch.errors import Problem, UserError

_SCHEME = re.compile(r"[a-z][a-z0-9]+:/.*", re.DOTALL | re.IGNORECASE)
# Without what gcsfs takes for a pattern or a generation, and TensorStore for no character.
_USABLE = re.compile(
    r"gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/[^/\\*?\[\]{}#\s\ud800-\udfff]+)*/?"
)


def is_bucket(path: str | Path) -> bool:
    """Whether a path is one in a bucket."""
    return str(path).startswith("gs://")


def place(path: str | Path, field: str = "path") -> Path:
    """The path of a text: pathlib's, or one in a bucket.

    Args:
      path: as the user gives it.
      field: its name in the words of the user.

    Raises:
      UserError: it is in no bucket that is known, or a library for buckets is not installed.
    """
    text = str(path)
    if not _SCHEME.fullmatch(text):
        return Path(path)
    if not _USABLE.fullmatch(text) or {".", ".."} & {*text.split("/")}:
        allowed = "a path on this machine, or gs://BUCKET/NAME/... without spaces, \\ * ? # [ ] { }"
        raise UserError(Problem(field, text, allowed))
    try:
        from bigbatch.places import buckets
    except ImportError as error:
        allowed = f"a path on this machine: buckets need pip install 'bigbatch[gcs]' ({error})"
        raise UserError(Problem(field, text, allowed)) from error
    return buckets.path_of(text)


def size_bytes(path: Path) -> int:
    """Of a file that is there."""
    status: Any = path.stat()
    return int(status.length if is_bucket(path) else status.st_size)


def to_prepare(directory: str | Path) -> str:
    """How a directory is given to `bigbatch data prepare`, which fills one on this machine."""
    if not is_bucket(directory):
        return f"--directory={directory}"
    return f"--directory=DIR, and then: gcloud storage cp --recursive 'DIR/*' {directory}"


def file_to_write(path: str | Path, field: str) -> Path:
    """The path of a file that can be written, as far as can be told; see `place`.

    Raises:
      UserError: its directory is not there, or it is one.
    """
    found = place(path, field)
    if found.is_dir() or not (is_bucket(found) or found.parent.is_dir()):
        raise UserError(Problem(field, str(path), "a file in a directory that is there"))
    return found


def expect_bucket(path: Path, field: str) -> Path:
    """Makes sure that a path's bucket, if it is in one, is there and can be read.

    Args:
      path: in it.
      field: its name in the words of the user.

    Returns:
      The path.

    Raises:
      UserError: it is not, or with other credentials.
    """
    if is_bucket(path):
        from bigbatch.places import buckets

        try:
            buckets.expect(path)
        except OSError as error:
            allowed = f"a bucket that is there and can be read ({error.strerror})"
            raise UserError(Problem(field, str(path), allowed)) from error
    return path


def absolute(path: Path) -> Path:
    """The path as it holds from every directory."""
    return path if is_bucket(path) else path.absolute()
