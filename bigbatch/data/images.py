"""Encoded images as a viewer shows them, whatever kind of pixels their files hold.

Orientation marks (EXIF) are ignored, as TensorFlow does.
"""

import io
import struct
from typing import Any

import numpy as np

JPEG, PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
# About what Pillow warns of: a few bytes may stand for any number of equal pixels.
MOST_PIXELS = 2**26
# Where a PNG says its width and height.
_PNG_SIZE, _PNG_SIZE_AT = struct.Struct(">II"), 16


def opened(encoded: bytes) -> Any:
    """A JPEG or PNG image, of which the head has been read.

    Raises:
      ValueError: it is none, damaged, or too large.
    """
    from PIL import Image

    if encoded.startswith(PNG) and len(encoded) >= _PNG_SIZE_AT + _PNG_SIZE.size:
        check_size(*_PNG_SIZE.unpack_from(encoded, _PNG_SIZE_AT))
    try:
        image = Image.open(io.BytesIO(encoded), formats=("PNG", "JPEG"))
    except Exception as error:
        # Pillow's readers have errors of many kinds.
        raise ValueError(f"its head cannot be read: {error}") from error
    check_size(*image.size)
    return image


def check_size(width: int, height: int) -> None:
    """Raises a ValueError for an image of too many pixels."""
    if width * height > MOST_PIXELS:
        raise ValueError(f"it has {width} x {height} pixels, more than {MOST_PIXELS:,}")


def shown(image: Any, channels: int = 3) -> np.ndarray:
    """The pixels of an image by Pillow.

    What is transparent is shown on white, unless four channels are asked for. Of 16 bits the higher
    eight count.

    Args:
      image: from `opened`.
      channels: 1, of an image that shows no colour; 3; or 4, the last one opacity.

    Returns:
      uint8[height, width, channels].

    Raises:
      ValueError: it is damaged, or has colours where one channel is asked for.
    """
    from PIL import Image

    try:
        transparent = image.has_transparency_data
        if image.mode.startswith("I"):
            words = np.asarray(image)
            grey = Image.fromarray((words >> 8).astype(np.uint8))
            if transparent:
                grey.putalpha(Image.fromarray(words != image.info["transparency"]))
            image = grey
        if channels == 4:
            return np.asarray(image.convert("RGBA"))
        if transparent:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        pixels = np.asarray(image.convert("RGB"))
    except Exception as error:
        raise ValueError(str(error)) from error
    if channels == 1 and (pixels != pixels[..., :1]).any():
        raise ValueError("it has colours where grey is expected")
    return pixels[..., :channels]
