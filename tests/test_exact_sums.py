"""Sums in any order and grouping: the same bits; and how near they are to the true sum."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.engine import exact_sums
from bigbatch.engine.exact_sums import Bins

ELEMENTS = 6


@functools.partial(jax.jit, static_argnums=2)
def shifters_of(exponents, addends, dtype):
    return exact_sums.shifters(exponents, addends, dtype)


add = jax.jit(exact_sums.add)


def exponents_of(rows) -> np.ndarray:
    """A bound for each of the two leaves that `as_tree` makes of a row."""
    largest = [max(np.abs(rows[:, :2]).max(), 1e-9), max(np.abs(rows[:, 2:]).max(), 1e-9)]
    return np.array([math.frexp(value)[1] for value in largest], np.int32)


def as_tree(row):
    return {"a": row[:2], "b": row[2:].reshape(2, 2)}


def binned(rows, exponents, addends) -> Bins:
    """The bins of some of the addends, one after another."""
    bins = jax.device_get(exact_sums.zeros(as_tree(rows[0])))
    shifters = shifters_of(exponents, np.int32(addends), jnp.dtype(rows.dtype))
    for row in rows:
        bins = add(bins, as_tree(row), shifters)
    return jax.device_get(bins)


def in_groups(rows, exponents, order, cuts):
    """The total over groups of the addends in some order, the groups added from the last one on."""
    parts = [part for part in np.split(np.array(order), sorted(cuts)) if len(part)]
    bins = [binned(rows[part], exponents, len(rows)).slices for part in reversed(parts)]
    summed = jax.tree.map(lambda *leaves: functools.reduce(np.add, leaves), *bins)
    return jax.tree.map(np.asarray, exact_sums.total(summed))


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
    expected = in_groups(rows, exponents, range(count), [])
    order = data.draw(st.permutations(range(count)))
    cuts = data.draw(st.lists(st.integers(0, count), max_size=5))
    found = in_groups(rows, exponents, order, cuts)
    for name, leaf in expected.items():
        assert leaf.tobytes() == found[name].tobytes()
        exact = [math.fsum(column) for column in rows.astype(float).T]
        np.testing.assert_allclose(
            leaf.ravel(), exact[:2] if name == "a" else exact[2:], rtol=3e-7, atol=1e-11
        )


def test_plain_sums_do_depend_on_the_order():
    rows = np.random.default_rng(0).normal(size=(64, ELEMENTS)).astype(np.float32)
    forwards = functools.reduce(np.add, rows)
    assert forwards.tobytes() != functools.reduce(np.add, rows[::-1]).tobytes()
    exponents = exponents_of(rows)
    pair = [in_groups(rows, exponents, order, []) for order in (range(64), range(63, -1, -1))]
    assert pair[0]["b"].tobytes() == pair[1]["b"].tobytes()


@pytest.mark.parametrize("addends", [7, 1024])
def test_small_elements_keep_their_digits(addends):
    """Elements down to 2^-30 of the tensor's largest, against sums in float64."""
    rng = np.random.default_rng(1)
    scales = 2.0 ** -np.arange(0.0, 31.0, 5.0)
    rows = (rng.normal(size=(addends, len(scales))) * scales).astype(np.float32)
    exponent = math.frexp(np.abs(rows).max())[1]
    exponents = np.array([exponent], np.int32)
    shifters = shifters_of(exponents, np.int32(addends), jnp.dtype("float32"))
    bins = jax.device_get(exact_sums.zeros(rows[0]))
    for row in rows:
        bins = add(bins, row, shifters)
    true = rows.astype(np.float64).sum(0)
    error = np.abs(np.float64(exact_sums.total(bins.slices)) - true)
    dropped = addends * exact_sums.dropped_at_most(2.0**exponent, addends)
    assert np.all(error <= dropped + 2**-23 * np.abs(true))
    # No worse than a float32 sum in order, even 2^-15 below the largest.
    plain = np.abs(np.float64(functools.reduce(np.add, rows)) - true)
    middle = scales >= 2.0**-15
    assert np.linalg.norm((error / scales)[middle]) <= np.linalg.norm((plain / scales)[middle])


def test_shifters_are_exact_powers_and_no_constants():
    """1.5 * 2^(k + L), each bin L - 24 below the one before; L as small as may be."""
    for addends, spread in ((1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (2**18, 18), (2**18 - 1, 18)):
        found = shifters_of(np.array([-40, 5], np.int32), np.int32(addends), jnp.dtype("float32"))
        for exponent, row in zip((-40, 5), found.tolist(), strict=True):
            assert row == [1.5 * 2.0 ** (exponent + spread + i * (spread - 24)) for i in range(3)]
    program = add.lower(
        exact_sums.zeros(jnp.ones(4)), jnp.ones(4), jnp.ones((1, 3), jnp.float32)
    ).compile()
    # Three roundings, each an addition and a subtraction, and two rests.
    text = program.as_text()
    assert text.count("subtract(") >= 5
    assert text.count(" add(") >= 3


def test_bounds_that_fail_are_raised_and_those_that_hold_follow():
    tree = {"a": jnp.ones(3)}
    exponents = jnp.array([0, 0], jnp.int32)
    total = {"a": jnp.ones(3), "b": jnp.ones(())}
    bounds, ok = exact_sums.next_bounds(total, jnp.array([0.25, 0.0]), exponents)
    # 0.25 < 2^-1, and room of 2^5; a leaf of zeros says nothing.
    assert (bounds.tolist(), bool(ok)) == ([4, 0], True)
    bounds, ok = exact_sums.next_bounds(total, jnp.array([1.0, 0.5]), exponents)
    assert bool(ok)
    bounds, ok = exact_sums.next_bounds(total, jnp.array([1.5, 1e-20]), exponents)
    assert (bounds.tolist(), bool(ok)) == ([6, 0], False)
    for bad in (jnp.inf, jnp.nan):
        broken = total | {"b": jnp.asarray(bad)}
        bounds, ok = exact_sums.next_bounds(broken, jnp.array([9.0, bad]), exponents)
        assert (bounds.tolist(), bool(ok)) == ([0, 0], True)
    first = exact_sums.first_exponents(tree)
    assert first.tolist() == [exact_sums.LEAST_EXPONENT]


def test_what_is_not_finite_is_found_in_the_sums():
    shifters = shifters_of(np.array([0], np.int32), np.int32(4), jnp.dtype("float32"))
    for bad in (np.inf, -np.inf, np.nan):
        bins = exact_sums.zeros(np.zeros(2, np.float32))
        for row in ([1.0, 0.5], [bad, 0.25]):
            bins = add(bins, np.array(row, np.float32), shifters)
        total = np.asarray(exact_sums.total(bins.slices))
        assert not np.isfinite(total[0])
        assert total[1] == 0.75
