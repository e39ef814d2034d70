"""The framing of TFRecord files, which TensorBoard's event files are too.

A file is a chain: the length of a record (uint64, little-endian) and its checksum (uint32), the
record and its checksum (uint32).
"""

import struct

import google_crc32c

HEAD = struct.Struct("<QI")
TAIL = struct.Struct("<I")
LENGTH = struct.Struct("<Q")
_MASK_DELTA = 0xA282EAD8


def framed(record: bytes) -> bytes:
    """A record as a file holds it."""
    length = LENGTH.pack(len(record))
    return b"".join(
        (length, TAIL.pack(masked_crc32c(length)), record, TAIL.pack(masked_crc32c(record)))
    )


def unframed(content: bytes) -> list[bytes]:
    """The records of a file's content.

    Raises:
      ValueError: it ends within one, or a checksum is another than the one written.

    >>> unframed(framed(b"one") + framed(b""))
    [b'one', b'']
    """
    records: list[bytes] = []
    begin = 0
    while begin < len(content):
        end = begin + HEAD.size + TAIL.size
        length, checksum = HEAD.unpack_from(content, begin) if end <= len(content) else (0, 0)
        end += length
        if end > len(content):
            raise ValueError(f"it ends within record {len(records)}")
        record = content[begin + HEAD.size : end - TAIL.size]
        written = checksum, *TAIL.unpack_from(content, end - TAIL.size)
        length_bytes = content[begin : begin + LENGTH.size]
        if (masked_crc32c(length_bytes), masked_crc32c(record)) != written:
            raise ValueError(f"a checksum of record {len(records)} is another than the one written")
        records.append(record)
        begin = end
    return records


def masked_crc32c(data: bytes | memoryview) -> int:
    """The checksum as it is written: CRC-32C, rotated right by 15 bits, plus a constant.

    >>> hex(masked_crc32c(b"123456789"))
    '0xc78ab0e5'
    """
    crc = google_crc32c.value(bytes(data))
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF
