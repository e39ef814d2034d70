"""From an encoded image to a window of it in the size that the network wants.

JPEGs are decoded by libjpeg-turbo (simplejpeg), resized by OpenCV; both give up Python's lock. The
window decides how much is decoded: where it is at least twice the wanted size, the inverse
transform makes an image of half, a quarter or an eighth of the size, which is faster and has less
aliasing. Leaving rows out as well was measured and is not done: the decoder can then no longer tell
a damaged image from one that ends early.
"""

import functools
import threading
from typing import Any, NamedTuple

import numpy as np

from bigbatch.data import images
from bigbatch.data.records.crops import Window
from bigbatch.data.records.reader import BadRecordError
from bigbatch.data.records.record_libraries import libraries


class Decoding(NamedTuple):
    """How pixels are made; every setting uses the fast integer inverse transform, as TensorFlow.

    Attributes:
      smooth_chroma: interpolate the colour planes (TensorFlow's default) instead of repeating them.
      bicubic: interpolation over 4x4 neighbours instead of 2x2.
    """

    smooth_chroma: bool
    bicubic: bool


DECODINGS = {
    "fast": Decoding(smooth_chroma=False, bicubic=False),
    "smooth": Decoding(smooth_chroma=True, bicubic=True),
}
# libjpeg's remarks on files that are whole all the same; ImageNet has some.
_HARMLESS = ("extraneous bytes before marker", "unknown JFIF revision", "Invalid SOS parameters")
# Colour planes in a ratio that simplejpeg does not know.
_UNUSUAL = "Could not determine subsampling"
_memory = threading.local()


def prepare_thread() -> None:
    """Once in each thread that decodes: makes its pixels the same on every processor."""
    # Intel's library inside of OpenCV does other arithmetic on other processors.
    libraries().cv2.ipp.setUseIPP(False)


def image_size(encoded: bytes) -> tuple[int, int]:
    """Height and width of a JPEG or PNG image, as stored.

    Raises:
      BadRecordError: it is none, or damaged.
    """
    if encoded.startswith(images.JPEG):
        try:
            height, width = libraries().simplejpeg.decode_jpeg_header(encoded, strict=False)[:2]
        except (ValueError, KeyError):
            return _open(encoded, "JPEG").size[::-1]
        try:
            images.check_size(width, height)
        except ValueError as error:
            raise BadRecordError(f"its JPEG cannot be used: {error}") from error
        return height, width
    if encoded.startswith(images.PNG):
        return _open(encoded, "PNG").size[::-1]
    raise BadRecordError("its image is neither JPEG nor PNG")


def decode(
    encoded: bytes,
    size: tuple[int, int],
    window: Window,
    decoding: Decoding,
    *,
    flip: bool,
    out: np.ndarray,
) -> None:
    """Decodes a window of an image, resizes it and mirrors it if asked for.

    Grey images get three equal channels; CMYK is converted as TensorFlow does, up to rounding. For
    all else that PNG knows see `images.shown`.

    Call `prepare_thread` once before.

    Args:
      encoded: a JPEG or PNG image.
      size: its height and width, from `image_size`.
      window: of the image.
      decoding: how.
      flip: mirror left and right.
      out: uint8[side, side, 3] that is written.

    Raises:
      BadRecordError: the image is damaged.
    """
    cv2 = libraries().cv2
    side = out.shape[0]
    divisor = _divisor(window, side)
    if encoded.startswith(images.JPEG):
        pixels = _decode_jpeg(encoded, size, divisor, decoding)
    else:
        pixels = _decode_by_pillow(encoded, "PNG")
    if pixels.shape[:2] == size:
        # Pillow makes images of the whole size only.
        divisor = 1
    rows = _decoded(window.top, window.height, divisor)
    columns = _decoded(window.left, window.width, divisor)
    interpolation = cv2.INTER_CUBIC if decoding.bicubic else cv2.INTER_LINEAR
    shown = pixels[rows, columns]
    if flip:
        shown = cv2.resize(shown, (side, side), interpolation=interpolation)
        cv2.flip(shown, 1, dst=out)
    else:
        cv2.resize(shown, (side, side), dst=out, interpolation=interpolation)


def _divisor(window: Window, side: int) -> int:
    """The largest of 1, 2, 4 and 8 by which the window can be made smaller and still be enough."""
    room = min(window.height, window.width) // side
    return next((divisor for divisor in (8, 4, 2) if room >= divisor), 1)


def _decoded(first: int, length: int, divisor: int) -> slice:
    """A window's pixels in an image that was decoded small: its edges are rounded, halves outwards.

    Each edge is off by at most half a pixel of that image, and to no side more than to the other: a
    mirrored window gives the mirrored pixels.

    >>> _decoded(3, 10, 4), _decoded(1, 10, 2)
    (slice(1, 3, None), slice(0, 6, None))
    """
    start = (2 * first + divisor - 1) // (2 * divisor)
    return slice(start, (2 * (first + length) + divisor) // (2 * divisor))


def _decode_jpeg(
    encoded: bytes, size: tuple[int, int], divisor: int, decoding: Decoding
) -> np.ndarray:
    """uint8[H, W, 3], in memory that this thread's next image takes over."""
    height, width = (-(-side // divisor) for side in size)
    needed = height * width * 3
    if getattr(_memory, "pixels", np.empty(0)).size < needed:
        # New memory for each image costs more than its colours.
        _memory.pixels = np.empty(needed, np.uint8)
    call = functools.partial(
        libraries().simplejpeg.decode_jpeg,
        encoded,
        "RGB",
        fastdct=True,
        fastupsample=not decoding.smooth_chroma,
        min_height=height,
        min_width=width,
        min_factor=divisor,
        buffer=_memory.pixels,
    )
    try:
        return call()
    except ValueError as error:
        if _UNUSUAL in str(error):
            return _decode_by_pillow(encoded, "JPEG")
        lines = [line for line in str(error).splitlines() if line]
        if not all(any(words in line for words in _HARMLESS) for line in lines):
            raise BadRecordError(f"its JPEG is damaged: {_line(error)}") from error
    return call(strict=False)


def _open(encoded: bytes, kind: str) -> Any:
    """An image by Pillow, which knows all kinds and is slower."""
    try:
        return images.opened(encoded)
    except ValueError as error:
        raise BadRecordError(f"its {kind} cannot be used: {_line(error)}") from error


def _decode_by_pillow(encoded: bytes, kind: str) -> np.ndarray:
    try:
        return images.shown(_open(encoded, kind))
    except ValueError as error:
        raise BadRecordError(f"its {kind} is damaged: {_line(error)}") from error


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
