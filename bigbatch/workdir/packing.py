"""A tree of arrays as one run of bytes, and back.

To write a file takes some time for each array, whatever its size, and a network has hundreds. (The
device waits for these bytes: for 430 arrays of 205 MB 18 ms, with `flax.serialization` 200.)
"""

import functools
import hashlib
import math
import zlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from bigbatch import distributed
from bigbatch.engine.task import PyTree


def described(tree: PyTree) -> list[str]:
    """Name, dtype and shape of each array of a tree, in the order of their bytes.

    >>> described({"a": np.zeros((2, 3)), "b": np.int32(1)})
    ["['a'] float64 (2, 3)", "['b'] int32 ()"]
    """
    return [
        f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def pack(tree: PyTree) -> np.ndarray:
    """The bytes of all arrays, one after the other, each in row-major order: uint8[bytes], new.

    Args:
      tree: arrays, NumPy's or JAX's.
    """
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(tree))]
    packed = np.empty(sum(leaf.nbytes for leaf in leaves), np.uint8)
    end = 0
    for leaf in leaves:
        begin, end = end, end + leaf.nbytes
        packed[begin:end] = _bytes_of(np.ascontiguousarray(leaf))
    return packed


def unpack(pieces: Iterable[np.ndarray], like: PyTree) -> tuple[PyTree, int]:
    """The tree of which `pack` gave the bytes, and their CRC-32.

    Args:
      pieces: the bytes, uint8[...] each and none of them empty; one is taken when it is needed.
      like: a tree of the same names, shapes and dtypes. Where some of its arrays lie in parts, each
        is put where it is to lie before the next is made; else they are new NumPy arrays.

    Raises:
      ValueError: the tree has more bytes.
    """
    left, piece, checksum = iter(pieces), np.empty(0, np.uint8), 0
    to_parts = in_parts(like)

    def leaf_of(leaf: Any) -> Any:
        nonlocal piece, checksum
        array = np.empty(leaf.shape, leaf.dtype)
        room = _bytes_of(array)
        while len(room):
            piece = piece if len(piece) else next(left, piece)
            size = min(len(piece), len(room))
            if not size:
                raise ValueError(f"fewer than {num_bytes(like):,} bytes")
            room[:size] = piece[:size]
            room, piece = room[size:], piece[size:]
        checksum = zlib.crc32(_bytes_of(array).data, checksum)
        return jax.block_until_ready(distributed.put(array, leaf.sharding)) if to_parts else array

    return jax.tree.map(leaf_of, like), checksum


def num_bytes(tree: PyTree) -> int:
    """How many bytes `pack` gives."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def on_host(array: Any) -> np.ndarray:
    """An array of which this process may hold parts only; then all must call."""
    if in_parts(array):
        if array.is_fully_addressable:
            # An array keeps what was read of it, for as long as it is there: a copy is read.
            array = jax.device_put(array, array.sharding, may_alias=False)
        else:
            array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def in_parts(tree: PyTree) -> bool:
    """Whether some array of a tree is not whole on every device."""
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree)]
    return any(at is not None and not at.is_fully_replicated for at in shardings)


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def checksum(tree: PyTree) -> jax.Array:
    """A checksum of arrays that are never whole anywhere: uint32[arrays], wherever parts lie.

    Each word is mixed with its place, one to one, and the sum of the words is taken modulo 2^32. So
    a change of one word changes the checksum, and other changes do but for one in 2^32.
    """

    def of(leaf: jax.Array) -> jax.Array:
        words = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
        size = min(words.dtype.itemsize, 4)
        words = jax.lax.bitcast_convert_type(words, f"uint{8 * size}").astype(jnp.uint32)
        place = jnp.zeros(words.shape, jnp.uint32)
        for axis, length in enumerate(words.shape):
            place = place * jnp.uint32(length) + jax.lax.broadcasted_iota(
                jnp.uint32, words.shape, axis
            )
        words = (words ^ (place * jnp.uint32(0x9E3779B9))) * jnp.uint32(0x85EBCA6B)
        return jnp.sum(words ^ (words >> 16), dtype=jnp.uint32)

    return jnp.stack([of(leaf) for leaf in jax.tree.leaves(tree)])


def sha256(tree: PyTree) -> str:
    """A hash of the names, shapes, dtypes and bytes of a tree of arrays."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = on_host(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype};".encode())
        digest.update(_bytes_of(np.ascontiguousarray(array)).data)
    return digest.hexdigest()


def _bytes_of(array: np.ndarray) -> np.ndarray:
    """The bytes of a row-major array, uint8, in the same memory."""
    return array.reshape(-1).view(np.uint8)
