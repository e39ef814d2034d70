"""How a file is written: beside the old one, whose place it takes when it is whole."""

import contextlib
import io
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from bigbatch.places.paths import is_bucket

BEING_WRITTEN = ".being-written"


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[BinaryIO]:
    """Gives a file to write to; what was there before stays until all is written and on the disk.

    After an error, and after a loss of power too, the old file is as it was. Its permissions stay,
    and a link to it stays a link. What is no file, as /dev/stdout, is written as it is. In a bucket
    the object appears whole.

    Raises:
      OSError: it cannot be written.
    """
    if is_bucket(path):
        from bigbatch.places import buckets

        written = io.BytesIO()
        yield written
        buckets.put(path, written.getvalue())
        return
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "wb") as file:
            yield file
        return
    place = Path(os.path.realpath(path))
    temporary = place.with_name(f".{secrets.token_hex(8)}{BEING_WRITTEN}")
    try:
        with open(temporary, "xb") as file:
            if place.exists():
                # One that is protected is not replaced.
                open(place, "ab").close()
                shutil.copymode(place, temporary)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, place)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
