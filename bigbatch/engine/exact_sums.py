"""Sums of floats that come out the same, to the bit, in any order and any grouping.

Floating-point addition is not associative, so a sum over other devices or microbatches is another
sum. It can be made exact (Demmel and Nguyen 2013, "Fast Reproducible Floating-Point Summation").
Every addend r is split into `BINS` slices and a rest that is dropped,

    q1 = (r + M1) - M1,   q2 = ((r - q1) + M2) - M2,   q3 = ((r - q1 - q2) + M3) - M3,

and the slices are summed bin by bin. Why each bin's sum is exact, with p bits of precision (24 for
float32) and n addends |r| <= 2^k:

1. M1 = 1.5 * 2^E with E = k + L, L >= log2(n), L >= 1. Then |r| <= 2^(E-1), so r + M1 lies in
   [2^E, 2^(E+1)], where floats are spaced by u = 2^(E-p+1): r is rounded to a multiple of u, and
   the subtraction of M1, itself a multiple, is exact. So q1 is a multiple of u, |q1| <= 2^k (2^k
   is a multiple of u too, as L < p), and depends on r and M1 alone.
2. Any sum of some of the n slices is a multiple of u of magnitude at most n 2^k <= 2^E < 2^p u.
   Such numbers are floats. So every partial sum, in any order, over microbatches, devices or
   hosts, is exact, and the bin's total is *the* total.
3. r - q1 is exact (Sterbenz-like: a multiple of r's own spacing no larger than u/2) and at most
   u/2 = 2^(E-p): the bound of the next bin, with the same L. So it goes on.

At the end the bins are added, largest first: two roundings of numbers that no order has touched.
What is dropped of one addend is at most u3/2 = 2^(k + 3(L-p)), p = 24: with a thousand addends
2^-42 of the bound, so a small element among large ones keeps its digits.

The bound 2^k must be known before the addends are, by all devices alike. It is that of the update
before with room above (`next_bounds`), and stands in the state of the run. A bound that fails
is noticed by the largest magnitude, whose maximum has no order either; then nothing may be used of
the sums. Not-a-numbers and infinities are found in the sums.

Nothing here may be folded away by the compiler: M is made of traced exponents by `ldexp`, exactly.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bigbatch.engine.task import PyTree

BINS = 3
# A bound is this many powers of two above the largest magnitude of the update before.
_ROOM = 5
# Keeps the last bin's spacing, 2^(k + 3 L - 3 p + 1), far from the numbers that devices flush to 0.
LEAST_EXPONENT = -40
# Above this many addends the bins would hold too few bits of each.
MAX_ADDENDS = 2**18


class Bins(NamedTuple):
    """Sums by bin of a tree of numbers.

    Attributes:
      slices: like the tree, every leaf [BINS, ...].
      largest: [leaves], the largest magnitude among each leaf's addends.
    """

    slices: PyTree
    largest: jax.Array


def zeros(tree: PyTree) -> Bins:
    """Bins that hold nothing, for addends like `tree` (shapes are enough)."""
    leaves = jax.tree.leaves(tree)
    dtype = jnp.result_type(*leaves)
    slices = jax.tree.map(lambda leaf: jnp.zeros((BINS, *leaf.shape), dtype), tree)
    return Bins(slices, jnp.zeros(len(leaves), dtype))


def first_exponents(tree: PyTree) -> jax.Array:
    """Bounds before anything is known: so low that the first update finds true ones.

    Returns:
      int32[leaves], k of each leaf's bound 2^k.
    """
    return jnp.full(len(jax.tree.leaves(tree)), LEAST_EXPONENT, jnp.int32)


def shifters(exponents: jax.Array, addends: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """M of every leaf and bin: 1.5 * 2^(k + L), and each bin's k from the one before.

    Args:
      exponents: int32[leaves], k of each leaf's bound 2^k.
      addends: how many addends there are at most in all, over all devices; a traced whole number up
        to `MAX_ADDENDS`.
      dtype: of the sums.

    Returns:
      dtype[leaves, BINS].
    """
    # |x| = mantissa * 2^exponent with the mantissa in [1/2, 1): the least L with 2^L >= addends, as
    # no logarithm would give it.
    _, spread = jnp.frexp(jnp.asarray(addends, jnp.float32) - 0.5)
    spread = jnp.maximum(spread, 1)
    precision_bits = jnp.finfo(dtype).nmant + 1
    bins = jnp.arange(BINS, dtype=jnp.int32)
    powers = exponents[:, None] + spread + bins * (spread - precision_bits)
    return jnp.ldexp(jnp.full(powers.shape, 1.5, dtype), powers)


def add(bins: Bins, addend: PyTree, shifters: jax.Array) -> Bins:
    """Adds one addend.

    Args:
      bins: the sums so far.
      addend: a tree of floats, as `zeros` was given.
      shifters: from the function of that name.

    Returns:
      The sums with it; exact where the addend keeps to its bounds.
    """
    # What made the addend must not be merged with the splitting of it.
    addend = jax.tree.map(
        lambda leaf: leaf.astype(shifters.dtype), jax.lax.optimization_barrier(addend)
    )
    leaves, structure = jax.tree.flatten(addend)
    rows = jax.tree.unflatten(structure, list(shifters))
    slices = jax.tree.map(
        lambda leaf, row, total: total + _split(leaf, row), addend, rows, bins.slices
    )
    largest = jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in leaves])
    return Bins(slices, jnp.maximum(bins.largest, largest))


def total(slices: PyTree) -> PyTree:
    """The sums themselves, from the bins' totals over everything."""
    return jax.tree.map(lambda leaf: (leaf[0] + leaf[1]) + leaf[2], slices)


def next_bounds(
    total: PyTree, largest: jax.Array, exponents: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The bounds for what comes next, and whether these sums may be used.

    Args:
      total: the sums.
      largest: [leaves], the largest magnitudes over everything that was added.
      exponents: int32[leaves], the bounds so far.

    Returns:
      int32[leaves], the exponents of the new bounds: the old ones where all addends were 0, or a
      sum is not finite. And a bool: the sums are exact, or are not finite, so that no repetition
      would mend them.
    """
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(total)]))
    within = jnp.all(largest <= jnp.ldexp(jnp.ones_like(largest), exponents))
    # |x| < 2^seen, exactly.
    _, seen = jnp.frexp(largest)
    seen = jnp.maximum(seen + _ROOM, LEAST_EXPONENT)
    # Where the sums are computed again, nothing that was enough is lowered.
    seen = jnp.where(within, seen, jnp.maximum(seen, exponents))
    return jnp.where((largest > 0) & finite, seen, exponents), within | ~finite


def _split(leaf: jax.Array, shifters: jax.Array) -> jax.Array:
    """The slices of a leaf, [BINS, ...]."""
    slices = []
    for index in range(BINS):
        slices.append((leaf + shifters[index]) - shifters[index])
        leaf = leaf - slices[-1]
    return jnp.stack(slices)


def dropped_at_most(bound: float, addends: int, precision_bits: int = 24) -> float:
    """The largest part of one addend that its slices leave out, in the unit of the bound.

    >>> dropped_at_most(1.0, 1024) == 2.0**-42
    True
    """
    spread = max(1, math.ceil(math.log2(addends)))
    return bound * 2.0 ** (BINS * (spread - precision_bits))
