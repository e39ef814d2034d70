import base64
import io
import zlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bigbatch.data.records import jpeg
from bigbatch.data.records.crops import Window, evaluation_window
from bigbatch.data.records.reader import BadRecordError
from tests.imagenet_files import encode, photo

FAST, SMOOTH = jpeg.DECODINGS["fast"], jpeg.DECODINGS["smooth"]
RNG = np.random.default_rng(5)
PHOTO = photo(RNG, 150, 200)
ENCODED = encode(PHOTO, quality=85)


@pytest.fixture(autouse=True)
def prepared_thread():
    jpeg.prepare_thread()


def shown(encoded, window=None, side=None, decoding=SMOOTH, flip=False):
    """The window in the given size; by default the whole image as it is."""
    size = jpeg.image_size(encoded)
    window = Window(0, 0, *size) if window is None else window
    out = np.zeros((side or window.height, side or window.width, 3), np.uint8)
    if side is None:
        assert window.height == window.width
    jpeg.decode(encoded, size, window, decoding, flip=flip, out=out)
    return out


def tensorflow_image(encoded, decoding):
    import tensorflow as tf

    return tf.io.decode_jpeg(
        encoded, channels=3, dct_method="INTEGER_FAST", fancy_upscaling=decoding.smooth_chroma
    ).numpy()


@pytest.mark.parametrize("decoding", [FAST, SMOOTH])
@pytest.mark.parametrize("options", [{"subsampling": 2}, {"subsampling": 0}, {"progressive": True}])
def test_pixels_are_tensorflows(decoding, options):
    """A window that is not resized: the decoder's own pixels, bit for bit."""
    encoded = encode(PHOTO, quality=85, **options)
    window = Window(9, 41, 100, 100)
    expected = tensorflow_image(encoded, decoding)[9:109, 41:141]
    np.testing.assert_array_equal(shown(encoded, window, decoding=decoding), expected)
    np.testing.assert_array_equal(
        shown(encoded, window, decoding=decoding, flip=True), expected[:, ::-1]
    )


def test_tensorflows_default_decoding_is_smooth():
    import tensorflow as tf

    expected = tf.io.decode_jpeg(ENCODED, channels=3).numpy()
    np.testing.assert_array_equal(shown(ENCODED, Window(0, 0, 150, 150)), expected[:, :150])


@pytest.mark.parametrize(
    ("decoding", "method", "most"), [(FAST, "bilinear", 1.0), (SMOOTH, "bicubic", 2.5)]
)
def test_resized_pixels_against_tensorflow(decoding, method, most):
    """OpenCV's cubic is sharper than TensorFlow's (a = -0.75, not -0.5); its linear is the same."""
    import tensorflow as tf

    window = Window(10, 20, 120, 150)
    pixels = tensorflow_image(ENCODED, decoding)[10:130, 20:170]
    expected = np.clip(tf.image.resize(pixels, (96, 96), method=method).numpy(), 0, 255)
    difference = np.abs(shown(ENCODED, window, 96, decoding) - expected)
    assert difference.mean() < most / 2
    assert np.quantile(difference, 0.99) < 4 * most


@pytest.mark.parametrize("divisor", [2, 4, 8])
def test_large_windows_are_decoded_small(divisor, monkeypatch):
    """A smaller inverse transform gives nearly the mean over squares of pixels."""
    image = photo(np.random.default_rng(1), 330, 450)
    encoded = encode(image, quality=95, subsampling=0)
    side = 320 // divisor
    found = shown(encoded, Window(0, 16, 320, 320), side)
    whole = tensorflow_image(encoded, SMOOTH)[:320, 16:336].astype(float)
    means = whole.reshape(side, divisor, side, divisor, 3).mean(axis=(1, 3))
    assert np.abs(found - means).mean() < 3
    # Without it, pixels in between are left out: further from the means.
    monkeypatch.setattr(jpeg, "_divisor", lambda window, side: 1)
    plain = shown(encoded, Window(0, 16, 320, 320), side)
    assert np.abs(plain - means).mean() > np.abs(found - means).mean()


def shift(found, expected, axis):
    """How far `found` lies behind `expected` along an axis, in pixels, whatever its contrast."""
    slope = -np.gradient(expected, axis=axis)
    columns = np.stack([slope, expected, np.ones_like(expected)], axis=-1).reshape(-1, 3)
    return np.linalg.lstsq(columns, found.ravel())[0][0]


@pytest.mark.parametrize("divisor", [1, 2, 4, 8])
def test_windows_of_images_decoded_small_lie_where_those_of_whole_ones_do(divisor):
    """Waves across and down the image, against Pillow's whole image and means over its areas."""
    height, width, side = 397, 451, 30
    down, across = (100 * np.sin(np.arange(length) / (4 * divisor)) for length in (height, width))
    waves = 128 + np.dstack(np.broadcast_arrays(across[None], down[:, None], 0.0))
    encoded = encode(waves.round().astype(np.uint8), quality=100, subsampling=0)
    whole = Image.open(io.BytesIO(encoded))
    rng = np.random.default_rng(divisor)
    shifts = []
    for _ in range(60):
        rows, columns = rng.integers(divisor * side, min(2 * divisor * side, height), 2)
        top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
        found = shown(encoded, Window(*map(int, (top, left, rows, columns))), side).astype(float)
        box = (left, top, left + columns, top + rows)
        expected = whole.resize((side, side), Image.Resampling.BOX, box=box)
        expected = np.asarray(expected, float)
        # In pixels of the image that was decoded.
        down = shift(found[..., 1], expected[..., 1], 0) * rows / side / divisor
        across = shift(found[..., 0], expected[..., 0], 1) * columns / side / divisor
        shifts += [(down, across)]
    assert np.abs(shifts).max() < 0.55
    # Each edge is off by at most half a pixel, evenly: 4 standard errors of what lies between two.
    assert np.abs(np.mean(shifts, axis=0)).max() < 4 * np.sqrt(1 / 12 / 2 / len(shifts))


@given(st.integers(0, 4000), st.integers(1, 4000), st.sampled_from([1, 2, 4, 8]))
def test_edges_are_rounded_alike_on_both_sides(first, length, divisor):
    """A window of an image of 8000 pixels, and its mirror image."""
    window = jpeg._decoded(first, length, divisor)
    mirrored = jpeg._decoded(8000 - first - length, length, divisor)
    assert (mirrored.start, mirrored.stop) == (
        8000 // divisor - window.stop,
        8000 // divisor - window.start,
    )
    assert abs(window.start - Fraction(first, divisor)) <= Fraction(1, 2)
    assert abs(window.stop - Fraction(first + length, divisor)) <= Fraction(1, 2)


def test_evaluation_is_resize_then_centre_crop():
    """Against Pillow's whole image, its shorter side resized to 256/224 of the wanted one."""
    image = photo(np.random.default_rng(2), 160, 240)
    encoded = encode(image, quality=95)
    found = shown(encoded, evaluation_window(160, 240), 112).astype(float)
    resized = Image.open(io.BytesIO(encoded)).resize((192, 128), Image.Resampling.BICUBIC)
    expected = np.asarray(resized.crop((40, 8, 152, 120)), float)
    assert np.abs(found - expected).mean() < 5
    # Shifted by one pixel it is further off.
    for rows, columns in ((1, 0), (0, 1), (-1, 0), (0, -1)):
        moved = np.roll(expected, (rows, columns), axis=(0, 1))
        assert np.abs(found - expected).mean() < np.abs(found - moved).mean()


def test_grey_and_cmyk_images():
    import tensorflow as tf

    grey = encode(PHOTO[:150, :150], mode="L")
    np.testing.assert_array_equal(shown(grey), tf.io.decode_jpeg(grey, channels=3).numpy())
    cmyk = encode(PHOTO[:150, :150], mode="CMYK")
    assert Image.open(io.BytesIO(cmyk)).mode == "CMYK"
    difference = shown(cmyk).astype(int) - tf.io.decode_jpeg(cmyk, channels=3).numpy()
    assert np.abs(difference).max() <= 6
    assert np.abs(difference).mean() < 2


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_png_images(mode):
    encoded = encode(PHOTO[:150, :150], "PNG", mode)
    expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    np.testing.assert_array_equal(shown(encoded), expected)


def test_orientation_marks_are_ignored_as_in_tensorflow():
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = encode(PHOTO[:150, :150], exif=exif)
    np.testing.assert_array_equal(shown(encoded), tensorflow_image(encoded, SMOOTH))


def test_harmless_remarks_of_the_decoder_are_no_damage():
    """Bytes between the pixels and the end mark; ImageNet has such files."""
    padded = ENCODED[:-2] + bytes(5000) + ENCODED[-2:]
    window = Window(0, 0, 150, 150)
    np.testing.assert_array_equal(shown(padded, window), shown(ENCODED, window))


def test_colour_planes_in_an_unusual_ratio():
    """An image of libjpeg's, 24x20 pixels, whose colour planes have an eighth of the pixels."""
    encoded = zlib.decompress(base64.b85decode(UNUSUAL))
    expected = np.asarray(Image.open(io.BytesIO(encoded)))
    assert expected.shape == (20, 24, 3)
    np.testing.assert_array_equal(shown(encoded, Window(0, 0, 20, 20)), expected[:, :20])


UNUSUAL = (
    "c-s4a<NpH&0WUXCHwH#V1_nkTWcYuZ!I^=Bjg6g+m4ls~os*M;i${c)hnt&6Qb?FzL{>^(PF6}rMnOeST|r4lS"
    "w=>~TvNxu(8R<<Uft5x!pKI?*u)5A2qPyaCl5D|1TU|Ik)n*E5y{~H0R}-11`!4cW=1ClCP7AKLB{__803NOWM"
    "u>c1}I=;VrF4wW9Q)H;sz?%D!{<R$jr>d!pzFb!UB}71<Et92(k((8alEG2PU#B6^a-&PF%>L?6mQqXwbzED#l"
    "4gO`Kd};u4Zls%q*Qnp!5NX66=_R?aT2ZtfnQUcn)uVc`*xQOPN(Y3Ui6S;Zx#W#tu>Rn0A}ZS5VMU6UqHnL2I"
    "yjG40*Enc#8+42=DS8dw7W$U)>J9h3mboj{8W5-XNJay^vm8;jT-?(|};iJb-o<4j2;^nK4pFV&2`tAFVpT9u<"
    "Vq{=ugaNGn5(N5-iG_ukg&pKCMy7I*0znp5MME|r$3XVPLSZGNMh+3Di3>L#<Wx2e`XHKAbdgI;#pI#tN08URJ"
    "|oU!O=S5D?lFYFZZYsMGXf)zS&+e=;Zww-`{7C(?%!JHx;X!zl-AOg=#R0st!;k_V_n<2_si>wzL5)jUS-w1-S"
    "mFOhlRH%#vYyGDdKf%vC89F8jHHL4?c>zs_{VPrRUMRS##$<$aGcL_5Xhp0CXPq)c"
)


def noise(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + b"\xff\xd0" * 20 + content[middle + 40 :]


@pytest.mark.parametrize(
    ("encoded", "words"),
    [
        (b"", "neither JPEG nor PNG"),
        (b"GIF89a" + bytes(50), "neither JPEG nor PNG"),
        (ENCODED[:60], "head"),
        (ENCODED[: len(ENCODED) // 2], "damaged"),
        (ENCODED[:-2], "damaged"),
        (noise(ENCODED), "damaged"),
        # A harmless remark beside it does not hide it.
        (noise(ENCODED)[:-2] + bytes(5000) + ENCODED[-2:], "damaged"),
        (encode(PHOTO, "PNG")[:30], "PNG"),
        (encode(PHOTO, "PNG")[:5000], "PNG"),
    ],
)
def test_damaged_images(encoded, words):
    with pytest.raises(BadRecordError, match=words):
        shown(encoded, Window(0, 0, 20, 20))
