"""The framing of TensorBoard's event files: a length, the message, and checksums of both.

The checksum is CRC-32C, which Python's library does not have. A loop over the bytes of one message
takes ten times as long as all else that is done for a record; here the loop is over the place of a
byte, for many messages at once.
"""

import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, its bits reversed.


def framed(messages: Sequence[bytes]) -> bytes:
    """Messages as an event file (or TFRecord file) holds them, one after the other."""
    lengths = [struct.pack("<Q", len(message)) for message in messages]
    sums = zip(_masked(crc32c(lengths)), _masked(crc32c(messages)), strict=True)
    return b"".join(
        length + struct.pack("<I", of_length) + message + struct.pack("<I", of_message)
        for length, message, (of_length, of_message) in zip(lengths, messages, sums, strict=True)
    )


def crc32c(messages: Sequence[bytes]) -> NDArray[np.uint32]:
    """The CRC-32C of each message, uint32[messages].

    >>> [hex(c) for c in crc32c([b"123456789", b"", bytes(32)])]
    ['0xe3069283', '0x0', '0x8a9136aa']
    """
    # The longest first: those that have a byte at a place are the first ones.
    order = sorted(range(len(messages)), key=lambda i: -len(messages[i]))
    lengths = np.array([len(messages[i]) for i in order], np.int64)
    places = np.zeros((lengths.max(initial=0), len(messages)), np.uint32)
    for column, i in enumerate(order):
        places[: lengths[column], column] = np.frombuffer(messages[i], np.uint8)
    found = np.full(len(messages), 0xFFFFFFFF, np.uint32)
    reached = np.searchsorted(-lengths, -np.arange(len(places)))
    for row, count in zip(places, reached.tolist(), strict=True):
        now = found[:count]
        found[:count] = _TABLE[(now ^ row[:count]) & 0xFF] ^ (now >> 8)
    sums = np.empty_like(found)
    sums[order] = ~found
    return sums


def _masked(sums: NDArray[np.uint32]) -> list[int]:
    """Checksums as they are written: a checksum of data that holds checksums is a weak one."""
    turned = (sums >> np.uint32(15)) | (sums << np.uint32(17))
    return (turned + np.uint32(0xA282EAD8)).tolist()


def _table() -> NDArray[np.uint32]:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(_POLYNOMIAL), table >> 1)
    return table.astype(np.uint32)


_TABLE = _table()
