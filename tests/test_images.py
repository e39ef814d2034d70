"""Images of every kind of pixels, in memory and in records, as a viewer shows them."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from bigbatch.data import images
from bigbatch.data.records import jpeg
from bigbatch.data.records.crops import Window
from bigbatch.data.records.reader import BadRecordError
from bigbatch.data.tfds import files
from bigbatch.data.tfds.metadata import ARRAY_RECORD, TFRECORD, Prepared
from bigbatch.data.tfrecord import framed
from bigbatch.errors import UserError

RNG = np.random.default_rng(9)
SIDE = 12
PALETTE = RNG.integers(0, 256, (4, 3), np.uint8)
GREY, COLOUR, PALETTED = 0, 2, 3


def png(depth, kind, samples, **chunks):
    """A PNG of the samples [height, width(, 3)], as its standard has it."""

    def chunk(name, content):
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    bits = [np.unpackbits(samples.astype(">u2")[..., None].view(np.uint8), axis=-1)[..., -depth:]]
    rows = np.packbits(bits[0].reshape(len(samples), -1), axis=1)
    content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    head = struct.pack(">IIBBBBB", samples.shape[1], len(samples), depth, kind, 0, 0, 0)
    between = b"".join(chunk(name.encode(), value) for name, value in chunks.items())
    return (
        images.PNG + chunk(b"IHDR", head) + between + chunk(b"IDAT", content) + chunk(b"IEND", b"")
    )


def samples(depth, *shape):
    return RNG.integers(0, 2**depth, (SIDE, SIDE, *shape))


def record(encoded, label=3):
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    example.features.feature["image"].bytes_list.value.append(encoded)
    example.features.feature["label"].int64_list.value.append(label)
    return example.SerializeToString()


def both(encoded):
    """The pixels in memory and in records."""
    memory, label = files._example(record(encoded), (SIDE, SIDE, 3))
    assert label == 3
    jpeg.prepare_thread()
    out = np.zeros((SIDE, SIDE, 3), np.uint8)
    size = jpeg.image_size(encoded)
    decoding = jpeg.DECODINGS["smooth"]
    jpeg.decode(encoded, size, Window(0, 0, *size), decoding, flip=False, out=out)
    return memory, out


OPAQUE = {
    **{f"grey {depth}": png(depth, GREY, samples(depth)) for depth in (1, 2, 4, 8, 16)},
    **{f"colour {depth}": png(depth, COLOUR, samples(depth, 3)) for depth in (8, 16)},
    **{
        f"palette {depth}": png(depth, PALETTED, samples(min(depth, 2)), PLTE=PALETTE.tobytes())
        for depth in (2, 4, 8)
    },
}


@pytest.mark.parametrize("encoded", OPAQUE.values(), ids=OPAQUE)
def test_kinds_without_transparency_are_as_in_tensorflow(encoded):
    import tensorflow as tf

    expected = tf.io.decode_png(encoded, channels=3).numpy()
    for pixels in both(encoded):
        np.testing.assert_array_equal(pixels, expected)


def on_white(colours, opacity):
    return np.rint(255 + (colours.astype(float) - 255) * (opacity[..., None] / 255))


def test_what_is_transparent_is_shown_on_white():
    colours, opacity = samples(8, 3).astype(np.uint8), samples(8).astype(np.uint8)
    indices, alphas = samples(2), np.array([0, 100, 255, 7], np.uint8)
    grey = samples(16)
    few, key = samples(8) % 3, 2
    cases = [
        (encoded(np.dstack([colours, opacity])), colours, opacity),
        (encoded(np.dstack([colours[..., 0], opacity])), colours[..., :1].repeat(3, 2), opacity),
        (
            png(2, PALETTED, indices, PLTE=PALETTE.tobytes(), tRNS=alphas.tobytes()),
            PALETTE[indices],
            alphas[indices],
        ),
        (
            png(16, GREY, grey, tRNS=struct.pack(">H", grey[0, 0])),
            (grey >> 8)[..., None].repeat(3, 2),
            255 * (grey != grey[0, 0]),
        ),
        (
            png(8, GREY, few, tRNS=struct.pack(">H", key)),
            few[..., None].repeat(3, 2),
            255 * (few != key),
        ),
    ]
    for image, shown, alpha in cases:
        for pixels in both(image):
            np.testing.assert_allclose(pixels, on_white(shown, alpha), atol=1, rtol=0)


def encoded(pixels):
    made = io.BytesIO()
    Image.fromarray(pixels).save(made, "PNG")
    return made.getvalue()


def test_channels_are_those_of_the_data_set():
    grey = samples(8).astype(np.uint8)
    same = np.dstack([grey] * 3)
    table = np.arange(256, dtype=np.uint8).repeat(3).tobytes()
    for image in (encoded(grey), encoded(same), png(8, PALETTED, grey, PLTE=table)):
        pixels, _ = files._example(record(image), (SIDE, SIDE, 1))
        np.testing.assert_array_equal(pixels[..., 0], grey)
    with pytest.raises(ValueError, match="colours where grey"):
        files._example(record(OPAQUE["colour 8"]), (SIDE, SIDE, 1))
    with pytest.raises(ValueError, match="not of"):
        files._example(record(OPAQUE["colour 8"]), (SIDE, SIDE + 1, 3))
    layered = np.dstack([same, 255 - grey])
    np.testing.assert_array_equal(
        files._example(record(encoded(layered)), layered.shape)[0], layered
    )


def small_set(directory, file_format):
    """A prepared set of eight images in one file, and the arrays."""
    content = [RNG.integers(0, 256, (6, 6, 3), np.uint8) for _ in range(8)]
    records = [record(encoded(image), label) for label, image in enumerate(content)]
    usual = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    counts = {"train": (8,)}
    facts = "small", directory, file_format, counts, {"train": usual}, (6, 6, 3), 8
    prepared = Prepared(*facts)
    (file,) = prepared.files("train")
    if file_format == TFRECORD:
        file.write_bytes(b"".join(map(framed, records)))
    else:
        from array_record.python.array_record_module import ArrayRecordWriter

        writer = ArrayRecordWriter(str(file), "group_size:1")
        for each in records:
            writer.write(each)
        writer.close()
    return prepared, file, np.stack(content)


@pytest.mark.parametrize("file_format", [TFRECORD, ARRAY_RECORD])
def test_flipped_bits_and_cuts_change_no_example_silently(tmp_path, file_format):
    prepared, file, content = small_set(tmp_path, file_format)
    whole = file.read_bytes()
    np.testing.assert_array_equal(files.read(prepared, "train")[0], content)
    refused = 0
    for damage in range(400):
        changed = bytearray(whole)
        place = int(RNG.integers(len(whole)))
        changed[place] ^= 1 << int(RNG.integers(8))
        file.write_bytes(bytes(changed if damage % 4 else whole[:place]))
        try:
            made, labels = files.read(prepared, "train")
        except UserError as error:
            refused += file.name in str(error)
        else:
            np.testing.assert_array_equal(made, content)
            np.testing.assert_array_equal(labels, np.arange(8))
    # Every bit of a TFRECORD file counts; some of ArrayRecord's are padding.
    assert refused == 400 or (file_format == ARRAY_RECORD and refused > 100)


@pytest.mark.parametrize("side", [9_000, 20_000, 2**31 - 1])
def test_images_that_would_fill_memory_are_refused(side):
    row = zlib.compress(bytes(10**6))
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    name = b"IHDR"
    bomb = images.PNG + struct.pack(">I", len(head)) + name + head
    bomb += struct.pack(">I", zlib.crc32(name + head))
    bomb += (
        struct.pack(">I", len(row)) + b"IDAT" + row + struct.pack(">I", zlib.crc32(b"IDAT" + row))
    )
    tracemalloc.start()
    with pytest.raises(BadRecordError, match="pixels, more than 67,108,864"):
        jpeg.image_size(bomb)
    with pytest.raises(ValueError, match="pixels, more than 67,108,864"):
        files._example(record(bomb), (SIDE, SIDE, 3))
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_a_jpeg_that_would_fill_memory_is_refused():
    made = bytearray(encoded_jpeg())
    at = made.index(b"\xff\xc0") + 5
    made[at : at + 4] = struct.pack(">HH", 60_000, 60_000)
    with pytest.raises(BadRecordError, match="60000 x 60000 pixels"):
        jpeg.image_size(bytes(made))


def encoded_jpeg():
    made = io.BytesIO()
    Image.fromarray(samples(8, 3).astype(np.uint8)).save(made, "JPEG")
    return made.getvalue()
