"""The layout against its definition, and its covers against a search over all of them."""

import itertools
import math
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch import errors
from bigbatch.layout import layout
from bigbatch.layout.layout import Layout, make_layout


def dealt_out(cut: Layout, batch_size: int) -> list[int]:
    """Every ghost batch that the devices compute, in order, -1 where it is masked."""
    ghost = cut.ghost_batch_examples
    dealt = []
    for microbatch in cut.microbatches(batch_size):
        first = microbatch.offset_examples // ghost
        held = microbatch.num_examples // ghost
        computed = cut.devices * microbatch.examples_per_device // ghost
        assert microbatch.num_examples % ghost == microbatch.examples_per_device % ghost == 0
        dealt += [first + i if i < held else -1 for i in range(computed)]
    return dealt


@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=30),
    ghost=st.sampled_from([1, 16, 128]),
    devices=st.integers(1, 9),
    limit=st.integers(1, 40),
)
def test_every_ghost_batch_once_and_in_order(sizes, ghost, devices, limit):
    batch_sizes = [size * ghost for size in sizes]
    cut = make_layout(
        batch_sizes,
        ghost_batch_examples=ghost,
        devices=devices,
        microbatch_examples_per_device=limit * ghost,
    )
    assert 1 <= len(cut.shapes) <= 3
    assert max(cut.shapes) <= limit * ghost
    masked = computed = 0
    for batch_size in batch_sizes:
        dealt = dealt_out(cut, batch_size)
        count = batch_size // ghost
        assert dealt[:count] == list(range(count))
        assert set(dealt[count:]) <= {-1}
        assert all(m.examples_per_device in cut.shapes for m in cut.microbatches(batch_size))
        assert all(m.num_examples > 0 for m in cut.microbatches(batch_size))
        masked += len(dealt) - count
        computed += len(dealt)
    assert cut.masked_share(batch_sizes) == pytest.approx(masked / computed, abs=1e-12)
    plan = types.SimpleNamespace(batch_sizes=np.array(batch_sizes))
    assert cut.masked_share(plan) == cut.masked_share(batch_sizes)


@given(
    load=st.integers(1, 24),
    shapes=st.sets(st.integers(1, 9), min_size=1, max_size=3),
    call_cost=st.sampled_from([0.125, 1.0, 16.0]),
)
def test_cover_is_the_cheapest(load, shapes, call_cost):
    """Against all multisets of microbatches of up to four times the largest shape."""
    descending = tuple(sorted(shapes, reverse=True))
    full, rest = layout.cover(load, descending, call_cost)
    found = descending[:1] * full + rest
    assert sum(found) >= load
    if load > 4 * descending[0]:
        return
    cheapest = min(
        sum(chosen) + call_cost * calls
        for calls in range(1, math.ceil(load / min(shapes)) + 1)
        for chosen in itertools.combinations_with_replacement(descending, calls)
        if sum(chosen) >= load
    )
    assert sum(found) + call_cost * len(found) == pytest.approx(cheapest)


def test_idle_devices_compute_a_masked_ghost_batch():
    cut = make_layout([128], ghost_batch_examples=32, devices=8, microbatch_examples_per_device=256)
    assert cut.microbatches(128) == (layout.Microbatch(0, 128, 32),)
    assert cut.masked_share([128]) == 0.5


def test_a_shape_must_earn_its_compilation():
    few, many = [64, 320], [64] * 100_000 + [320] * 100_000
    arguments = {
        "ghost_batch_examples": 64,
        "devices": 1,
        "microbatch_examples_per_device": 320,
    }
    assert make_layout(few, **arguments).shapes == (64,)
    assert make_layout(many, **arguments).shapes == (320, 64)


def test_thousands_of_sizes_mask_little():
    sizes = np.arange(32, 32 * 2000, 32)
    cut = make_layout(
        sizes, ghost_batch_examples=32, devices=4, microbatch_examples_per_device=1024
    )
    assert len(cut.shapes) <= 3
    assert cut.masked_share(sizes) < 0.02


def test_mistakes():
    with pytest.raises(errors.UserError) as caught:
        make_layout([128], ghost_batch_examples=32, devices=0, microbatch_examples_per_device=40)
    assert [(p.field, p.nearest) for p in caught.value.problems] == [
        ("devices", 1),
        ("microbatch_examples_per_device", 32),
    ]
    with pytest.raises(errors.UserError, match=r"batch_size: given 100; nearest: 96; "):
        make_layout([100], ghost_batch_examples=32, devices=1, microbatch_examples_per_device=32)
