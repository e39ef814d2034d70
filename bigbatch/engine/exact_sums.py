"""Sums of floats that come out the same, to the bit, in any order and any grouping.

Floating-point addition is not associative, so a sum over other devices or microbatches is another
sum. Integers have no such order. So every addend r is rounded to a multiple of a unit u that
depends on nothing but its leaf's bound 2^k, and the multiples are summed: two words of an integer
of 62 bits for float32 (126 for float64), which carries from the low one to the high one. Ahrens,
Demmel and Nguyen 2020 ("Algorithms for Efficient Reproducible Floating Point Summation") carry
between bins of floats to the same end; their width, like u here, does not depend on the number of
addends.

With p bits of precision (24 for float32), words of W bits (32), low words of L = W - 2 bits (30)
and u = 2^(k - H - L), H = W - 22 (10), why every sum of n <= 2^20 addends |r| <= 2^k is exact up to
that rounding:

1. x = r 2^(H-k) is exact, |x| <= 2^H, and so are h = rint(x) and x - h: a multiple of the spacing
   of x and at most 1/2. l = rint((x - h) 2^L) is a whole number, |l| <= 2^(L-1). h 2^L + l is r/u
   rounded to the nearest: at most 1/2 off, and only where r has bits below u.
2. The low word is kept in [-2^(L-1), 2^(L-1)): one more l keeps it in a word, and what leaves that
   range is carried, at most 1 each time. So the high word is at most n (2^H + 1) < 2^(W-1).
3. Over devices the words are added as integers too, the low one in two halves, so that up to
   2^(W/2) devices keep within a word. Then the carries are done again: the pair of words is a
   function of the integer that it stands for, whatever the order was.
4. The words become floats once, by `_to_float`: within 2^-p of their value, twice.

Where 2^k is at most 2^9 times the leaf's largest addend m, as `next_bounds` sees to, the whole
error of float32 is

    |error| <= 2^-22 sum |r_i| + n u / 2,        u / 2 = 2^(k-41) <= 2^-32 m.

Where m is under 2^(`LEAST_EXPONENT` - 9) nothing is promised but the same bits.

The bound 2^k must be known before the addends are, by all devices alike. It is that of the update
before with room above (`next_bounds`), and stands in the state of the run. A bound that fails, or
is too far above, is noticed by the largest magnitude, whose maximum has no order either; then
nothing may be used of the sums.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigbatch.engine.task import PyTree

# Above so many addends the high word would run over.
MAX_ADDENDS = 2**20
# A bound is this many powers of two above the largest magnitude of the update before.
_ROOM = 5
# And at most so many above that of its own update.
_MOST_ROOM = 9
# Keeps the unit, 2^(k - 40), far from the numbers that devices flush to 0.
LEAST_EXPONENT = -80


class Digits(NamedTuple):
    """An addend that is whole numbers already; see `digits`.

    Attributes:
      digits: of each element, [3, ...], whole numbers as floats; or sums of them, exact for as many
        as are added in floats.
      largest: the largest magnitude among what they were made of.
    """

    digits: jax.Array
    largest: jax.Array


class FixedPoint(NamedTuple):
    """Sums of a tree of numbers, as integers.

    Attributes:
      words: like the tree, every leaf [2, ...]: the high words, the low ones.
      largest: [leaves], the largest magnitude among each leaf's addends; infinite where one of
        them is not finite.
    """

    words: PyTree
    largest: jax.Array


def zeros(tree: PyTree) -> FixedPoint:
    """Sums of nothing, for addends like `tree` (shapes are enough)."""
    leaves = jax.tree.leaves(tree)
    dtype = jnp.result_type(*leaves)
    words = jax.tree.map(lambda leaf: jnp.zeros((2, *leaf.shape), _word(dtype)), tree)
    return FixedPoint(words, jnp.zeros(len(leaves), dtype))


def first_exponents(tree: PyTree) -> jax.Array:
    """Bounds before anything is known: so low that the first update finds true ones.

    Returns:
      int32[leaves], k of each leaf's bound 2^k.
    """
    return jnp.full(len(jax.tree.leaves(tree)), LEAST_EXPONENT, jnp.int32)


def add(total: FixedPoint, addend: PyTree, exponents: jax.Array) -> FixedPoint:
    """Adds one addend.

    Args:
      total: the sums so far.
      addend: a tree of floats, as `zeros` was given.
      exponents: int32[leaves], k of each leaf's bound 2^k.

    Returns:
      The sums with it; exact, up to the rounding to units, where the addend keeps to its bounds.
    """
    dtype = total.largest.dtype
    # What made the addend must not be merged with the rounding of it.
    addend = jax.tree.map(lambda leaf: leaf.astype(dtype), jax.lax.optimization_barrier(addend))
    leaves, structure = jax.tree.flatten(addend, is_leaf=_is_made)
    rows = jax.tree.unflatten(structure, list(exponents))
    words = jax.tree.map(_add_leaf, addend, rows, total.words, is_leaf=_is_made)
    largest = [leaf.largest if _is_made(leaf) else magnitude(leaf) for leaf in leaves]
    return FixedPoint(words, jnp.maximum(total.largest, jnp.stack(largest)))


def _is_made(leaf: Any) -> bool:
    return isinstance(leaf, Digits)


def magnitude(array: jax.Array) -> jax.Array:
    """The largest, infinite where some element is not finite."""
    return jnp.max(jnp.where(jnp.isfinite(array), jnp.abs(array), jnp.inf), initial=0)


def digits(array: jax.Array, exponent: jax.Array) -> jax.Array:
    """An array as whole numbers, of which sums of up to 2^9 are exact in floats too: [3, ...].

    Args:
      array: floats.
      exponent: a whole number, k of the array's bound 2^k.
    """
    high, low = _rounded(array, exponent)
    words = jnp.stack([high, low]).astype(_word(array.dtype))
    return parts(words).astype(array.dtype)


def parts(words: PyTree) -> PyTree:
    """Each leaf's words, [3, ...], the low one halved: they may be summed over devices."""

    def leaf_parts(leaf: jax.Array) -> jax.Array:
        high, low = leaf
        half = _low_bits(leaf.dtype) // 2
        return jnp.stack([high, low >> half, low & (2**half - 1)])

    return jax.tree.map(leaf_parts, words)


def total(parts: PyTree, largest: jax.Array, exponents: jax.Array) -> tuple[PyTree, PyTree]:
    """The sums themselves.

    Args:
      parts: from the function of that name, summed over everything.
      largest: [leaves], the largest magnitudes over everything.
      exponents: int32[leaves], as `add` was given.

    Returns:
      The sums, not a number throughout a leaf where one of its addends is not finite; and what they
      leave of the true sums of the rounded addends, so that whole numbers past 2^p are exact in
      the two together.
    """
    leaves, structure = jax.tree.flatten(parts)
    pairs = [
        _to_float(leaf, largest.dtype, exponents[i], jnp.isfinite(largest[i]))
        for i, leaf in enumerate(leaves)
    ]
    sums, rests = zip(*pairs, strict=True)
    return jax.tree.unflatten(structure, sums), jax.tree.unflatten(structure, rests)


def whole_sum(array: jax.Array) -> jax.Array:
    """The sum of all elements of an array, to the bit the same in any order and any grouping.

    Here the addends are known before their bound has to be: it is that of their largest. Each is
    rounded to a multiple of 2^-(p+16) of that, in digits whose sums along an axis fit a word; axis
    after axis is summed, the longest last, and each time the digits are carried.

    Returns:
      A scalar, within a few roundings of the sum of the rounded addends; not a number where one of
      the addends is not finite.
    """
    bits = min(10, 30 - max(array.shape, default=1).bit_length())
    largest = jnp.max(jnp.abs(array), initial=0)
    finite = jnp.isfinite(largest)
    _, exponent = jnp.frexp(jnp.where(finite, largest, 0))
    # In two steps: neither factor alone may leave the range of floats.
    halves = [exponent // 2, exponent - exponent // 2]
    down, up = ([_power_of_two(sign * half, array.dtype) for half in halves] for sign in (-1, 1))
    rest, digits = array * down[0] * down[1], []
    for _ in range(-(-(jnp.finfo(array.dtype).nmant + 17) // bits)):
        rest = rest * 2.0**bits
        digit = jax.lax.round(rest, jax.lax.RoundingMethod.TO_NEAREST_EVEN)
        rest = rest - digit
        digits.append(digit.astype(jnp.int32))
    # The last is of so many bits below the point.
    unit = bits * len(digits)
    while digits[0].shape:
        axis = int(np.argmin(digits[0].shape))
        room = -(-digits[0].shape[axis].bit_length() // bits)
        summed = [jnp.sum(digit, axis, dtype=jnp.int32) for digit in digits]
        digits, carry = [], jnp.zeros_like(summed[0])
        for digit in [*reversed(summed), *[carry] * room]:
            carry, low = _carried(digit + carry, bits)
            digits.insert(0, low)
        digits[0] += carry << bits
    total = left = jnp.zeros((), array.dtype)
    for place, digit in enumerate(reversed(digits)):
        total, rest = two_sum(total, digit.astype(array.dtype) * 2.0 ** (place * bits - unit))
        left = left + rest
    return jnp.where(finite, (total + left) * up[0] * up[1], jnp.nan)


def next_bounds(largest: jax.Array, exponents: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The bounds for what comes next, and whether these sums may be used.

    Args:
      largest: [leaves], the largest magnitudes over everything that was added.
      exponents: int32[leaves], the bounds so far.

    Returns:
      int32[leaves], the exponents of the new bounds: the old ones where all addends were 0, or
      something is not finite. And a bool: the sums are as exact as promised, or are not finite, so
      that no repetition would mend them.
    """
    finite = jnp.all(jnp.isfinite(largest))
    # |x| < 2^seen, exactly.
    _, seen = jnp.frexp(jnp.where(finite, largest, 0))
    near = (exponents <= seen + (_MOST_ROOM - 1)) | (exponents <= LEAST_EXPONENT) | (largest == 0)
    holds = near & (largest <= jnp.ldexp(jnp.ones_like(largest), exponents))
    exact = jnp.all(holds)
    follow = jnp.maximum(seen + _ROOM, LEAST_EXPONENT)
    # Where the sums are computed again, a bound that holds stays.
    moves = (largest > 0) & finite & (exact | ~holds)
    return jnp.where(moves, follow, exponents), exact | ~finite


def _word(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.dtype(f"int{jnp.finfo(dtype).bits}")


def _low_bits(dtype: jnp.dtype) -> int:
    return jnp.iinfo(dtype).bits - 2


def _high_bits(dtype: jnp.dtype) -> int:
    return _low_bits(dtype) - MAX_ADDENDS.bit_length() + 1


def _carried(low: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """What a low word, or half, hands on; and what is left, in [-2^(bits-1), 2^(bits-1))."""
    carry = (low + 2 ** (bits - 1)) >> bits
    return carry, low - (carry << bits)


def _rounded(leaf: jax.Array, exponent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An array in units, h 2^L + l: floats that are whole numbers."""
    word = _word(leaf.dtype)
    scaled = leaf * _power_of_two(_high_bits(word) - exponent, leaf.dtype)
    high = jax.lax.round(scaled, jax.lax.RoundingMethod.TO_NEAREST_EVEN)
    low = (scaled - high) * 2.0 ** _low_bits(word)
    return high, jax.lax.round(low, jax.lax.RoundingMethod.TO_NEAREST_EVEN)


def _add_leaf(leaf: jax.Array | Digits, exponent: jax.Array, words: jax.Array) -> jax.Array:
    if isinstance(leaf, Digits):
        high, low = _joined(leaf.digits.astype(words.dtype))
    else:
        high, low = (part.astype(words.dtype) for part in _rounded(leaf, exponent))
    carry, low = _carried(words[1] + low, _low_bits(words.dtype))
    return jnp.stack([words[0] + high + carry, low])


def _joined(parts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Words of sums of `parts`."""
    high, middle, low = parts
    half = _low_bits(parts.dtype) // 2
    carry, middle = _carried(middle + (low >> half), half)
    return high + carry, (middle << half) + (low & (2**half - 1))


def _to_float(
    parts: jax.Array, dtype: jnp.dtype, exponent: jax.Array, finite: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The float nearest to a sum, but for a second rounding, and what it leaves of the sum."""
    high, low = _joined(parts)
    bits = _low_bits(parts.dtype)

    def rounded(word: jax.Array, power: int) -> tuple[jax.Array, jax.Array]:
        value = word.astype(dtype)
        rest = (word - value.astype(word.dtype)).astype(dtype)
        scale = _power_of_two(exponent + power, dtype)
        return value * scale, rest * scale

    # exponent - H - L is the power of the unit.
    unit = -_high_bits(parts.dtype) - bits
    large, large_rest = rounded(high, unit + bits)
    small, small_rest = rounded(low, unit)
    value, rest = two_sum(large, small)
    value, rest = two_sum(value, rest + (large_rest + small_rest))
    return jnp.where(finite, value, jnp.nan), jnp.where(finite, rest, jnp.nan)


def two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rounded sum and what rounding left of it, exactly (Knuth 1969, section 4.2.2)."""
    value = a + b
    of_b = value - a
    return value, (a - (value - of_b)) + (b - of_b)


def _power_of_two(exponent: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.ldexp(jnp.ones((), dtype), exponent)
