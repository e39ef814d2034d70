"""Every comparison of a position with a time, against exact fractions.

Times are given as they are written: decimals, quotients, and products of floats, each beside the
fraction that it stands for. Positions are those next to it.
"""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from bigbatch.commands.critical.branches import constant_plan
from bigbatch.errors import UserError
from bigbatch.schedule.adaptive.controller import DELAY_UPDATES, Controller, Decisions
from bigbatch.schedule.adaptive.gradient_noise import Measurement
from bigbatch.schedule.durations import first_example_from, num_reached
from bigbatch.schedule.from_file import plan_file
from bigbatch.schedule.plan import make_plan
from bigbatch.schedule.policy import (
    batch_ramp,
    batch_stages,
    constant,
    from_optax,
    polynomial,
    stages,
    step_decay,
    warmup,
)
from bigbatch.schedule.transform import grow_batch

SIZES = st.one_of(
    st.integers(1, 2_000_000), st.sampled_from([1_437, 50_000, 60_000, 1_281_167, 10**9 + 7])
)
COUNTS = st.integers(1, 20_000)
WRITTEN = st.one_of(
    st.builds(
        lambda n, digits: (n / 10**digits, Fraction(n, 10**digits)), COUNTS, st.integers(0, 4)
    ),
    st.builds(lambda n, d: (n / d, Fraction(n, d)), COUNTS, st.integers(1, 999)),
    st.builds(lambda n, d: (n * (1 / d), Fraction(n, d)), COUNTS, st.integers(1, 100)),
)


@given(WRITTEN, SIZES)
@example((3 * 0.1, Fraction(3, 10)), 10)
@example((90.0000001, Fraction(900000001, 10**7)), 10**10)
def test_a_position_has_reached_a_time(written, train_examples):
    time, exact = written
    first = math.ceil(exact * train_examples)
    assert first_example_from(time, train_examples) == first
    positions = np.arange(max(0, first - 2), first + 3)
    reached = [int(p >= exact * train_examples) for p in positions.tolist()]
    assert num_reached([time], positions / train_examples).tolist() == reached


@example([(3 * 0.1, Fraction(3, 10)), (7 * 0.1, Fraction(7, 10))], 10)
@given(
    times=st.lists(WRITTEN, min_size=1, max_size=5, unique_by=lambda written: written[1]),
    train_examples=SIZES,
)
def test_policies_change_with_the_position_that_reaches_the_boundary(times, train_examples):
    """All that jump, on both sides of each of their boundaries."""
    times.sort(key=lambda written: written[1])
    assume(all(b[1] - a[1] > 1e-6 for a, b in itertools.pairwise(times)))
    n = len(times)
    near = {math.ceil(exact * train_examples) + d for _, exact in times for d in (-2, -1, 0, 1)}
    positions = sorted(p for p in near if p >= 0)
    reached = np.array([sum(p >= t * train_examples for _, t in times) for p in positions])
    epochs = np.array(positions) / train_examples

    decay = step_decay(1.0, 8, boundaries_epochs=[time for time, _ in times], factor=0.5)
    np.testing.assert_array_equal(decay.at(epochs).hyper["learning_rate"], 0.5**reached)
    np.testing.assert_array_equal(grow_batch(decay).at(epochs).batch_size, 8 * 2.0**reached)
    # One of the drops becomes growth.
    for at in range(n):
        until = times[at + 1][0] if at + 1 < n else math.inf
        hybrid = grow_batch(decay, from_epoch=times[at][0], until_epoch=until).at(epochs)
        np.testing.assert_array_equal(hybrid.batch_size, 8 * 2.0 ** (reached > at))
    sizes = " ".join(f"{time!r}_epochs:{2 ** (i + 4)}" for i, (time, _) in enumerate(times))
    staged = (stages(0.1, f"0:8 {sizes}"), batch_stages(constant(0.1, 1), f"0:8 {sizes}"))
    for policy in staged:
        np.testing.assert_array_equal(policy.at(epochs).batch_size, 8 * 2.0**reached)
    rates = stages(f"0:1 {sizes}", "0:8").at(epochs).hyper["learning_rate"]
    np.testing.assert_array_equal(rates, np.where(reached, 8 * 2.0**reached, 1))


@given(
    unit=st.sampled_from(["epochs", "examples", "updates"]),
    gaps=st.lists(st.integers(1, 400), min_size=1, max_size=4),
    values=st.lists(st.integers(1, 90), min_size=5, max_size=5, unique=True),
    train_examples=st.integers(50, 2_000),
)
def test_stages_in_every_unit_against_a_loop(unit, gaps, values, train_examples):
    starts = [Fraction(n, 100) if unit == "epochs" else n for n in itertools.accumulate(gaps)]
    written = [str(float(s)) if unit == "epochs" else str(s) for s in starts]
    parts = [f"{start}_{unit}:{v}" for start, v in zip(written, values[1:], strict=False)]
    policy = stages(0.1, " ".join([f"0:{values[0]}", *parts]), train_examples=train_examples)
    plan = make_plan(policy, train_examples=train_examples, epochs=5)
    position, sizes = 0, []
    while position < 5 * train_examples:
        clock = {
            "epochs": Fraction(position, train_examples),
            "examples": position,
            "updates": len(sizes),
        }
        sizes.append(values[sum(clock[unit] >= start for start in starts)])
        position += sizes[-1]
    assert plan.batch_sizes.tolist() == sizes


def test_a_start_in_thousands_is_exact():
    """2.007 * 10**3 is 2006.9999999999998, and 1.001k updates of 10 are 10,010 examples."""
    policy = stages(0.1, "0:10 1.001k_updates:1000 2.007k_updates:7", train_examples=10**6)
    plan = make_plan(policy, train_examples=10**6, epochs=1.1)
    assert [stage.first_update for stage in plan.stages] == [0, 1001, 2007]
    with pytest.raises(UserError, match="whole number of examples"):
        stages(0.1, "0:" + "9" * 400)


@given(
    train_examples=SIZES,
    first=st.integers(1, 64),
    increment=st.integers(1, 64),
    steps=st.integers(1, 31),
    share=st.integers(1, 40),
    in_epochs=st.booleans(),
)
@example(1_437, 16, 16, 7, 7 * 16, False)
@example(50_000, 32, 32, 31, 31 * 32, True)
def test_a_ramp_is_that_of_megatron(train_examples, first, increment, steps, share, in_epochs):
    """B = first + increment floor(p n / ramp), with every boundary on a multiple of the first."""
    ramp, final = first * steps * share, first + increment * steps
    given_as = {"ramp_examples": ramp, "train_examples": train_examples}
    policy = batch_ramp(
        constant(0.1, final),
        initial_batch_size=first,
        increment_examples=increment,
        **({"ramp_epochs": ramp / train_examples} if in_epochs else given_as),
    )
    # The end in examples, so that the plan has no more updates than the ramp and one.
    plan = make_plan(policy, train_examples=train_examples, epochs=(ramp + 1) / train_examples)
    position, sizes = 0, []
    while position < ramp + 1:
        sizes.append(min(first + increment * (position * steps // ramp), final))
        position += sizes[-1]
    assert plan.batch_sizes.tolist() == sizes


@settings(max_examples=30, deadline=None)
@given(train_examples=SIZES, batch_size=st.integers(1, 9_000), updates=st.integers(1, 3_000))
def test_a_schedule_of_optax_counts_updates_exactly(train_examples, batch_size, updates):
    epochs = updates * batch_size / train_examples
    policy = from_optax(
        lambda count: count + 1.0, batch_size, train_examples=train_examples, epochs=epochs
    )
    starts = np.arange(updates) * batch_size
    positions = np.r_[starts, starts + batch_size - 1]
    counts = policy.at(positions / train_examples).hyper["learning_rate"] - 1
    assert counts.tolist() == (positions // batch_size).tolist()
    plan = make_plan(policy, train_examples=train_examples, epochs=epochs)
    assert plan.hypers["learning_rate"].tolist() == list(range(1, updates + 1))


def test_a_schedule_of_optax_is_not_asked_past_the_run():
    """0.07 * 50,000 is 3500.0000000000005; the 36th learning rate would be negative."""
    context = {"train_examples": 50_000, "epochs": 0.07}
    policy = from_optax(lambda count: 34.5 - count, 100, **context)
    plan = make_plan(policy, **context)
    assert plan.num_updates == 35
    assert constant_plan(plan, plan.row(0), 100, 0.1, epochs=0.07).num_updates == 35


@given(
    updates=st.integers(1, 60),
    batch_size=st.integers(1, 90),
    more=st.integers(-1, 1),
    train_examples=SIZES,
)
@example(3, 7, 1, 50_000)
def test_a_time_in_updates_is_refused_where_the_batch_size_has_changed_before_it(
    updates, batch_size, more, train_examples
):
    text = f"0:{batch_size} {updates}_updates:{batch_size + 1}"
    policy = stages(0.1, text, train_examples=train_examples)
    end = {"warmup_updates": updates + more, "train_examples": train_examples}
    if more <= 0:
        warmup(policy, **end)
    else:
        with pytest.raises(UserError, match="warmup_updates"):
            warmup(policy, **end)


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=40), train_examples=st.integers(1, 999)
)
def test_a_plan_s_file_has_the_settings_of_each_position(sizes, train_examples, tmp_path_factory):
    starts = [0, *itertools.accumulate(sizes)]
    text = " ".join(
        f"{start}_examples:{size}" if start else f"0:{size}"
        for start, size in zip(starts, sizes, strict=False)
    )
    epochs = starts[-1] / train_examples
    policy = stages(0.1, text, train_examples=train_examples)
    plan = make_plan(policy, train_examples=train_examples, epochs=epochs)
    assert plan.batch_sizes.tolist() == sizes
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    path.write_text(plan.to_json())
    context = {"train_examples": train_examples, "epochs": epochs}
    read = plan_file(str(path), **context, batch_multiple_examples=1)
    positions = np.arange(starts[-1])
    expected = np.repeat(sizes, sizes)
    assert read.at(positions / train_examples).batch_size.tolist() == expected.tolist()


@settings(max_examples=20, deadline=None)
@given(
    factor=st.sampled_from([("1.1", 11), ("1.2", 6), ("1.5", 3), ("2", 2), ("3", 3)]),
    powers=st.integers(1, 3),
    share=st.integers(1, 4),
    before=st.integers(0, 30),
    train_examples=st.sampled_from([1_000, 1_437, 50_000]),
)
def test_a_cooldown_rises_where_its_clock_says(factor, powers, share, before, train_examples):
    """The line is crossed at ends of updates, by which the length is chosen."""
    (text, numerator), size = factor, 32
    growth = Fraction(text)
    length = size * share * numerator**powers
    end = size * before + length
    c = Controller(
        0.1, size, 0.0, max_batch_size=size, batch_multiple_examples=1, small_batch_examples=16,
        growth_factor=float(text), cooldown_epochs=length / train_examples,
        train_examples=train_examples, epochs=end / train_examples,
    )  # fmt: skip
    growths, update = [], 0
    while size * (update + DELAY_UPDATES) < end:
        position = size * (update + DELAY_UPDATES)
        crossed = 0
        while growth ** (crossed + 1) * (end - position) <= length:
            crossed += 1
        # What was decided last must have begun before the next is.
        if position >= end - length and update >= max((0, *growths)) and len(growths) < crossed:
            growths.append(update + DELAY_UPDATES)
        update += 1
    # The batch size is at its cap, so the learning rate tells the level.
    rates = c.most_updates().hypers["learning_rate"]
    levels = [sum(u >= g for g in growths) for u in range(len(rates))]
    np.testing.assert_allclose(rates, 0.1 / np.float64(text) ** levels, rtol=1e-12)


def test_a_level_that_begins_with_the_cooldown_is_not_one_that_it_found():
    """1.1 - 0.2 is 0.9000000000000001, whose position is 2880 all the same."""
    c = Controller(
        0.1, 32, 0.0, max_batch_size=64, batch_multiple_examples=16, small_batch_examples=16,
        cooldown_epochs=0.2, train_examples=3_200, epochs=1.1,
    )  # fmt: skip
    assert c.plan(Decisions(growths=(90,))).first_examples[90] == 2_880
    # Half of the cooldown is over with update 95: the first level of its own has begun by then.
    assert c.observe(Decisions(93, (90,)), Measurement(4.0, 1.0, 4, 64)).growths == (90,)


def test_how_exactly_a_recipe_s_own_noise_is_known():
    """To 2^-51 / (1 - t) where a decay to 0 is done to a share t, with growth and without."""
    train_examples, epochs = 1_281_167, 90
    decay = polynomial(0.1, 256, 0.9, until_epoch=epochs)
    left = np.arange(1, 3000) * 256
    for policy in (decay, grow_batch(decay, 512)):
        batch_size, hyper = policy.at((train_examples * epochs - left) / train_examples)
        exact = 0.1 * left / (train_examples * epochs)
        off = np.abs(hyper["learning_rate"] * 256 / batch_size / exact - 1)
        assert np.all(off <= 2.0**-51 * train_examples * epochs / left)
        assert off.max() > 1e-12
