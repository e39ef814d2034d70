"""Sums in any order and grouping: the same bits; and how near they are to the true sum."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.engine import exact_sums
from bigbatch.engine.exact_sums import FixedPoint

ELEMENTS = 6
add = jax.jit(exact_sums.add)


def exponents_of(rows) -> np.ndarray:
    """A bound for each of the two leaves that `as_tree` makes of a row."""
    largest = [max(np.abs(rows[:, :2]).max(), 1e-9), max(np.abs(rows[:, 2:]).max(), 1e-9)]
    return np.array([math.frexp(value)[1] for value in largest], np.int32)


def as_tree(row):
    return {"a": row[:2], "b": row[2:].reshape(2, 2)}


def summed(rows, exponents) -> FixedPoint:
    """The sums of some of the addends, one after another."""
    total = jax.device_get(exact_sums.zeros(as_tree(rows[0])))
    for row in rows:
        total = add(total, as_tree(row), exponents)
    return jax.device_get(total)


def in_groups(rows, exponents, order, cuts):
    """The total over groups of the addends in some order, the groups added from the last one on."""
    groups = [group for group in np.split(np.array(order), sorted(cuts)) if len(group)]
    sums = [summed(rows[group], exponents) for group in reversed(groups)]
    parts = [exact_sums.parts(one.words) for one in sums]
    parts = jax.tree.map(lambda *leaves: functools.reduce(np.add, leaves), *parts)
    largest = functools.reduce(np.maximum, [one.largest for one in sums])
    return jax.tree.map(np.asarray, exact_sums.total(parts, largest, exponents))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_order_and_any_grouping_give_the_same_bits(data):
    count = data.draw(st.integers(1, 20))
    number = st.floats(-1e4, 1e4, width=32, allow_subnormal=False) | st.just(0.0)
    rows = [data.draw(st.lists(number, min_size=ELEMENTS, max_size=ELEMENTS)) for _ in range(count)]
    # Of very unlike magnitudes.
    rows = np.array(rows, np.float32) * np.float32(2.0) ** np.arange(0, -24, -4)
    rows = rows.astype(np.float32)
    exponents = exponents_of(rows)
    expected, _ = in_groups(rows, exponents, range(count), [])
    order = data.draw(st.permutations(range(count)))
    cuts = data.draw(st.lists(st.integers(0, count), max_size=5))
    found, _ = in_groups(rows, exponents, order, cuts)
    for name, leaf in expected.items():
        assert leaf.tobytes() == found[name].tobytes()
        exact = [math.fsum(column) for column in rows.astype(float).T]
        np.testing.assert_allclose(
            leaf.ravel(), exact[:2] if name == "a" else exact[2:], rtol=3e-7, atol=1e-7
        )


def test_plain_sums_do_depend_on_the_order():
    rows = np.random.default_rng(0).normal(size=(64, ELEMENTS)).astype(np.float32)
    forwards = functools.reduce(np.add, rows)
    assert forwards.tobytes() != functools.reduce(np.add, rows[::-1]).tobytes()
    exponents = exponents_of(rows)
    pair = [in_groups(rows, exponents, order, [])[0] for order in (range(64), range(63, -1, -1))]
    assert pair[0]["b"].tobytes() == pair[1]["b"].tobytes()


@functools.partial(jax.jit, static_argnums=2)
def of_devices(rows, exponent, devices):
    """Totals, rests and largest of [addends, elements], each device's share summed in a loop."""
    exponents = exponent[None]

    def share(rows):
        empty = exact_sums.zeros(jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype))
        return jax.lax.fori_loop(
            0, len(rows), lambda i, total: exact_sums.add(total, rows[i], exponents), empty
        )

    own = jax.lax.map(share, rows.reshape(devices, -1, *rows.shape[1:]))
    parts = jnp.sum(jax.vmap(exact_sums.parts)(own.words), axis=0)
    largest = jnp.max(own.largest, axis=0)
    return *exact_sums.total(parts, largest, exponents), largest


@pytest.mark.parametrize("addends", [1, 7, 1024, 2**16, 2**20])
def test_the_error_keeps_to_its_bound(addends):
    """2^-22 sum |r| + n 2^-32 m, against sums in float64; elements down to 2^-30 of the largest."""
    rng = np.random.default_rng(1)
    scales = 2.0 ** -np.arange(0.0, 31.0, 5.0)
    rows = ((rng.normal(size=(addends, len(scales))) + 0.3) * scales).astype(np.float32)
    largest = np.abs(rows).max()
    # The loosest bound that is taken.
    exponent = np.int32(math.frexp(largest)[1] + 8)
    _, holds = exact_sums.next_bounds(largest[None], exponent[None])
    assert bool(holds)
    _, holds = exact_sums.next_bounds(largest[None], exponent[None] + 1)
    assert not bool(holds)
    found = [jax.device_get(of_devices(rows, exponent, n)) for n in (1, 4) if addends % n == 0]
    assert len({total.tobytes() for total, _, _ in found}) == 1
    (total, _, seen), *_ = found
    assert seen == largest
    true = rows.astype(np.float64).sum(0)
    error = np.abs(np.float64(total) - true)
    sums = np.abs(rows.astype(np.float64)).sum(0)
    assert np.all(error <= 2.0**-22 * sums + addends * 2.0**-32 * largest)
    # As near as a float32 can be where the elements are not small.
    assert np.all(error[:2] <= 2.0**-23 * np.abs(true[:2]) + addends * 2.0**-33 * largest)


def test_the_low_word_is_near_zero():
    """So it says how far a sum is from the unit of the high word, and the float is the nearest."""
    rows = np.random.default_rng(0).normal(size=(100, 50)).astype(np.float32)
    total = exact_sums.zeros(jax.ShapeDtypeStruct((50,), np.float32))
    for row in rows:
        total = exact_sums.add(total, jnp.asarray(row), jnp.full(1, 3))
        assert np.all(np.abs(np.asarray(total.words[1], np.int64) + 0.5) <= 2**29)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_no_word_runs_over(dtype, sign):
    """The most addends, all at the bound, or with low words that always carry: exact fractions."""
    with jax.enable_x64(dtype == np.float64):
        _no_word_runs_over(dtype, sign)


def _no_word_runs_over(dtype, sign):
    high_bits = 10 if dtype == np.float32 else 42
    # h + 1/2 rounds to even, with the largest low word there is.
    values = [1.0, (2**high_bits - 0.5) / 2**high_bits, 1.5 / 2**high_bits, -0.5 / 2**high_bits]
    row = sign * np.array(values, dtype)
    rows = np.broadcast_to(row, (exact_sums.MAX_ADDENDS, 4))
    total, rest, _ = jax.device_get(of_devices(rows, np.int32(0), 2))
    for value, found, left in zip(row.tolist(), total.tolist(), rest.tolist(), strict=True):
        assert Fraction(found) + Fraction(left) == Fraction(value) * exact_sums.MAX_ADDENDS


def test_whole_numbers_past_the_precision_are_exact_in_two_parts():
    rows = np.full((2**12 - 1, 1), 2.0**14 + 1, np.float32)
    total, rest, _ = jax.device_get(of_devices(rows, np.int32(15), 1))
    assert int(total[0]) + int(rest[0]) == (2**12 - 1) * (2**14 + 1)
    assert int(rest[0]) != 0


def test_bounds_that_fail_are_raised_and_those_that_hold_follow():
    def next_bounds(largest, exponents):
        bounds, ok = exact_sums.next_bounds(jnp.array(largest), jnp.array(exponents, jnp.int32))
        return bounds.tolist(), bool(ok)

    # 0.25 < 2^-1, and room of 2^5; a leaf of zeros says nothing.
    assert next_bounds([0.25, 0.0], [0, 0]) == ([4, 0], True)
    assert next_bounds([1.0, 0.5], [0, 0]) == ([6, 5], True)
    # Where a bound fails the others stay, for the same addends come again.
    assert next_bounds([1.5, 0.5], [0, 0]) == ([6, 0], False)
    # One that is far too high would lose digits: it is lowered.
    assert next_bounds([0.99 * 2.0**-9, 0.5], [0, 0]) == ([-4, 0], False)
    assert next_bounds([2.0**-9, 0.5], [0, 0]) == ([-3, 5], True)
    least = exact_sums.LEAST_EXPONENT
    assert next_bounds([1e-37, 0.5], [least, 0]) == ([least, 5], True)
    for bad in (math.inf, math.nan):
        assert next_bounds([9.0, bad], [0, 0]) == ([0, 0], True)
    assert exact_sums.first_exponents({"a": jnp.ones(3)}).tolist() == [least]


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_found_in_the_sums(bad):
    exponents = np.array([0, 0], np.int32)
    total = exact_sums.zeros({"a": np.zeros(2, np.float32), "b": np.zeros(1, np.float32)})
    for row in ([1.0, 0.5, 0.5], [bad, 0.25, 0.25]):
        row = np.array(row, np.float32)
        total = add(total, {"a": row[:2], "b": row[2:]}, exponents)
    assert np.isinf(total.largest[0])
    sums, _ = exact_sums.total(exact_sums.parts(total.words), total.largest, exponents)
    assert np.isnan(sums["a"]).all()
    assert sums["b"].tolist() == [0.75]
