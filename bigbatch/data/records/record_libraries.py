"""The libraries that only record data needs, imported when the first record is read."""

import functools
from typing import Any, NamedTuple

from bigbatch.errors import RunError


class Libraries(NamedTuple):
    """Modules, which come without types."""

    cv2: Any
    simplejpeg: Any


@functools.cache
def libraries() -> Libraries:
    """The modules, set up.

    Raises:
      RunError: one is not installed.
    """
    try:
        import cv2
        import simplejpeg
    except ImportError as error:
        words = f"record data needs a library that is not installed ({error.name}): "
        raise RunError(f"{words}pip install opencv-python-headless simplejpeg") from error
    # One image is one thread's.
    cv2.setNumThreads(0)
    return Libraries(cv2, simplejpeg)
