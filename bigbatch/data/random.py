"""Random numbers and permutations that are pure functions of a key and a counter.

One 32-bit generator (Threefry-2x32 with 20 rounds: Salmon, Moraes, Dror and Shaw, "Parallel random
numbers: as easy as 1, 2, 3", SC 2011) and one permutation, both written once over the array
namespace `xp`: `numpy` and `jax.numpy` give equal bits. Only uint32 is used, so JAX needs no 64-bit
mode. The values are pinned by tests, because a run's examples must never change with a version of
NumPy or JAX.
"""

import enum
import functools
import math
from types import ModuleType
from typing import Any

import numpy as np

from bigbatch.errors import Problem, UserError

# Two uint32 arrays (or ints): the high-level name of Threefry's 64-bit keys, counters and results.
Words = tuple[Any, Any]

_KEY_PARITY = 0x1BD11BDA
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_FEISTEL_ROUNDS = 8
_MAX_WORD = 2**32 - 1


class Purpose(enum.IntEnum):
    """What random numbers are for. Each purpose is a sequence of its own; never renumber one."""

    PERMUTATION = 0
    AUGMENTATION = 1
    MODEL = 2


def threefry2x32(xp: ModuleType, key: Words, counter: Words) -> Words:
    """Threefry-2x32 with 20 rounds.

    Args:
      xp: `numpy` or `jax.numpy`.
      key: two words, uint32 or ints in [0, 2^32); broadcast against the counter.
      counter: two words, likewise.

    Returns:
      Two uint32 arrays of the common shape: 64 random bits for each (key, counter).

    >>> [hex(word) for word in threefry2x32(np, (0, 0), (0, 0))]
    ['0x6b200159', '0x99ba4efe']
    """
    key_0, key_1 = (xp.asarray(word, dtype=xp.uint32) for word in key)
    x_0, x_1 = (xp.asarray(word, dtype=xp.uint32) for word in counter)
    keys = (key_0, key_1, key_0 ^ key_1 ^ xp.uint32(_KEY_PARITY))
    # Sums wrap around by definition; NumPy would warn of it where all the words are scalars.
    with np.errstate(over="ignore"):
        x_0, x_1 = x_0 + keys[0], x_1 + keys[1]
        for group in range(5):
            for rotation in _ROTATIONS[group % 2]:
                x_0 = x_0 + x_1
                x_1 = x_0 ^ ((x_1 << xp.uint32(rotation)) | (x_1 >> xp.uint32(32 - rotation)))
            x_0 = x_0 + keys[(group + 1) % 3]
            x_1 = x_1 + keys[(group + 2) % 3] + xp.uint32(group + 1)
    return x_0, x_1


def random_bits(xp: ModuleType, seed: Any, purpose: Purpose, epoch: Any, offset: Any) -> Words:
    """64 random bits for each position (epoch, offset): a pure function of seed and position.

    Positions pass 2^31, so they travel as two words: `position = epoch * train_examples + offset`.

    Args:
      xp: `numpy` or `jax.numpy`.
      seed: of the run; uint32 or an int in [0, 2^32).
      purpose: which of the independent sequences.
      epoch: uint32, any shape.
      offset: uint32, a shape that broadcasts against `epoch`.

    Returns:
      Two uint32 arrays of the common shape.
    """
    return threefry2x32(xp, (seed, int(purpose)), (epoch, offset))


def below(xp: ModuleType, bits: Any, bound: int) -> Any:
    """Random integers in [0, bound) from random words.

    The remainder favours small values by a relative bound / 2^32: less than 2e-8 for an image crop
    from 81 places, far below what any training run could show.

    Args:
      xp: `numpy` or `jax.numpy`.
      bits: uint32 random words, any shape.
      bound: from 1 to 2^32 - 1.

    Returns:
      uint32 integers, the shape of `bits`.
    """
    return xp.asarray(bits, dtype=xp.uint32) % xp.uint32(bound)


def epoch_key(xp: ModuleType, seed: Any, epoch: Any) -> Words:
    """The key of an epoch's permutation, for `permute`.

    Args:
      xp: `numpy` or `jax.numpy`.
      seed: of the run; uint32 or an int in [0, 2^32).
      epoch: uint32 or an int in [0, 2^32).

    Returns:
      Two uint32 scalars.
    """
    return random_bits(xp, seed, Purpose.PERMUTATION, epoch, 0)


def permute(xp: ModuleType, index: Any, size: int, key: Words) -> Any:
    """Where a keyed permutation of [0, size) sends each index.

    A Feistel network on the rectangle of a by b cells, a = ceil(sqrt(size)) and b = ceil(size / a):
    rounds add a random function of the column to the row (modulo a), and of the row to the column
    (modulo b), in turn (the generalised Feistel cipher of Black and Rogaway, "Ciphers with
    arbitrary finite domains", CT-RSA 2002). The fewer than a cells past `size` are left by cycle
    walking: the network is applied again until the result is inside. A round's function has at
    most a values, so they are drawn once as a table, and an index costs eight look-ups however
    large the data set is.

    Args:
      xp: `numpy` or `jax.numpy`; with the latter it can be traced, `size` excepted.
      index: integers in [0, size), any shape. Others give meaningless results.
      size: how many there are to permute, from 1 to 2^32 - 1.
      key: two words, of one permutation (`epoch_key`).

    Returns:
      uint32 integers in [0, size), the shape of `index`; distinct for distinct indices.

    Raises:
      UserError: the size is out of range.

    >>> permute(np, np.arange(5), 5, epoch_key(np, seed=0, epoch=0)).tolist()
    [2, 4, 1, 0, 3]
    """
    if not 1 <= size <= _MAX_WORD:
        nearest = min(max(size, 1), _MAX_WORD)
        raise UserError(Problem("size", size, "a whole number from 1 to 2^32 - 1", nearest))
    num_rows = math.isqrt(size - 1) + 1
    num_columns = -(-size // num_rows)
    rounds = xp.arange(_FEISTEL_ROUNDS, dtype=xp.uint32)[:, None]
    lines = xp.arange(num_rows, dtype=xp.uint32)[None, :]
    table, _ = threefry2x32(xp, key, (rounds, lines))
    network = functools.partial(_network, xp, table, num_rows, num_columns)
    limit = xp.uint32(size)
    value = network(xp.asarray(index, dtype=xp.uint32))
    if xp is np:
        value = np.asarray(value)
        while (outside := value >= limit).any():
            value[outside] = network(value[outside])
        return value
    from jax import lax

    return lax.while_loop(
        lambda value: (value >= limit).any(),
        lambda value: xp.where(value >= limit, network(value), value),
        value,
    )


def _network(xp: ModuleType, table: Any, num_rows: int, num_columns: int, value: Any) -> Any:
    """One pass through the Feistel network.

    Args:
      xp: `numpy` or `jax.numpy`.
      table: uint32[rounds, num_rows] random words: round i's function of a line.
      num_rows: at least num_columns, at most 2^16, so that no sum overflows.
      num_columns: at least 1.
      value: uint32 cells in [0, num_rows * num_columns), any shape.

    Returns:
      uint32 cells, distinct for distinct ones.
    """
    row, column = value // xp.uint32(num_columns), value % xp.uint32(num_columns)
    for i in range(_FEISTEL_ROUNDS):
        if i % 2 == 0:
            row = (row + below(xp, table[i], num_rows)[column]) % xp.uint32(num_rows)
        else:
            column = (column + below(xp, table[i], num_columns)[row]) % xp.uint32(num_columns)
    return row * xp.uint32(num_columns) + column
