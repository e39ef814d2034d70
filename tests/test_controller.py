"""The controller's decisions, on measurements whose noise is known."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.errors import UserError
from bigbatch.schedule.adaptive.controller import DELAY_UPDATES, Controller, Decisions
from bigbatch.schedule.adaptive.course import Course
from bigbatch.schedule.adaptive.gradient_noise import Measurement, Smoothed
from bigbatch.schedule.plan import Plan
from bigbatch.schedule.policy import step_decay
from bigbatch.schedule.transform import adam, grow_batch, with_rule


def controller(**changes):
    fields = {
        "learning_rate": 0.1,
        "batch_size": 32,
        "momentum": 0.9,
        "max_batch_size": 256,
        "multiple": 1.0,
        "cooldown_epochs": 0,
        "train_examples": 1_000,
        "epochs": 20,
        "batch_multiple_examples": 16,
        "small_batch_examples": 16,
    }
    return Controller(**(fields | changes))


def measured(batch_size, gradient_square, variance, random=None, small=16):
    """An update whose unbiased estimates are as given, or spread around them."""
    count = batch_size // small
    if random is not None:
        # What Gaussian noise in 20 directions gives.
        variance *= random.chisquare(20 * (count - 1)) / (20 * (count - 1))
        gradient_square += variance / batch_size * (random.chisquare(20) / 20 - 1)
    big = gradient_square + variance / batch_size
    return Measurement((count - 1) * variance + batch_size * big, big, count, batch_size)


def rolled_out(controller, gradient_square_of, seed=None, variance=1.0):
    """The realised plan and all states, where |G|^2 is a function of the level's noise."""
    random = None if seed is None else np.random.default_rng(seed)
    state, states = Decisions(), []
    while True:
        plan = controller.plan(state)
        states.append(state)
        if state.updates == plan.num_updates:
            return plan, states
        row = plan.row(state.updates)
        square = gradient_square_of(row)
        state = controller.observe(state, measured(row.batch_size, square, variance, random))


def test_the_memory_is_a_share_of_what_was_seen():
    c, state, weight = controller(smoothing=0.5), Decisions(), 0.0
    for update in range(40):
        state = c.observe(state, measured(32, 1.0, 1e-6))
        # Of all updates so far, this one's examples are 1 in update + 1.
        fresh = min(1 - math.exp(-1 / (0.5 * (update + 1))), 0.1)
        weight += fresh * (1 - weight)
        assert state.smoothed.weight == pytest.approx(weight, rel=1e-9)
    assert state.growths == ()


def hovering(ratio):
    """|G|^2 where training hovers: B_noise is a multiple of the batch that makes the noise."""
    return lambda row: 1 / (ratio * row.batch_size * 0.1 / row.hyper["learning_rate"])


def test_the_ladder_keeps_the_noise_when_the_learning_rate_takes_over():
    c = controller(max_batch_size=100, growth_factor=1.7)
    for index in range(9):
        size, rate = c.level(index)
        assert size % 16 == 0
        assert size == min(32 * 1.7**index // 16 * 16, 96)
        assert rate / size == pytest.approx(0.1 / 32 / 1.7**index, rel=1e-12)
    sizes = [level.batch_size for level in c.ladder]
    assert sizes == [32, 48, 80, 96]
    assert set(c.likely_batch_sizes) == set(sizes)


@pytest.mark.parametrize("rule", ["linear", "square_root", "seesaw"])
def test_a_level_of_any_rule_is_the_decay_that_it_stands_for(rule):
    """As the transformation of a hand-made decay has it, below the cap and past it."""
    adams = {"b1": 0.99, "eps": 1e-6} if rule == "square_root" else {}
    c = controller(momentum=0.0, rule=rule, growth_factor=4.0, max_batch_size=512, **adams)
    for index in range(5):
        decayed = step_decay(
            0.1, 32, boundaries_epochs=[1], factor=1 / c.decay(index) if index else 0.5
        )
        source = with_rule(adam(decayed, 0.99, 0.999, 1e-6), rule)
        size, hyper = grow_batch(source, 512).at(1.0 if index else 0.0)
        plan = c.plan(Decisions(growths=tuple(range(1, index + 1))))
        assert plan.batch_sizes[index] == c.level(index).batch_size == pytest.approx(size[0])
        assert set(plan.hypers) == {"learning_rate", "momentum"} | (
            {"b1", "b2", "eps"} if rule == "square_root" else set()
        )
        for name, column in plan.hypers.items():
            np.testing.assert_allclose(column[index], hyper[name][0], rtol=1e-9)
        kept = plan.noise_scales[index] / plan.noise_scales[0]
        assert kept == pytest.approx(1 / c.decay(index))


def test_the_square_root_rule_has_its_caps_here_too():
    adam = controller(momentum=0.0, rule="square_root", b1=0.9, b2=0.99, max_batch_size=512)
    hypers = adam.fewest_updates().hypers
    assert set(hypers["b1"]) == {0.9}
    np.testing.assert_allclose(np.unique(hypers["b2"]), [0.95, 0.96, 0.98, 0.99])


def test_rules_that_are_no_rules_here():
    with pytest.raises(UserError, match="rule: given 'linear_exact'"):
        controller(rule="linear_exact")
    with pytest.raises(UserError, match="rule: given 'sqrt'"):
        controller(rule="sqrt")
    with pytest.raises(UserError, match=r"b2: given .* but with the rule square_root"):
        controller(rule="seesaw", momentum=0.0, b2=0.95)


def test_a_noise_scale_below_the_next_level_grows_nothing():
    plan, _ = rolled_out(controller(), lambda row: 1 / 63, seed=0)
    assert set(plan.batch_sizes) == {32}
    assert plan.diff(controller().plan()) is None


@pytest.mark.parametrize("noise_scale", [50, 100, 300, 700, 1_100, 5_000, 20_000])
@pytest.mark.parametrize("multiple", [0.5, 1, 3])
def test_the_batch_ends_on_the_rung_nearest_to_the_root(noise_scale, multiple):
    c = controller(multiple=multiple, max_batch_size=4_096)
    plan, _ = rolled_out(c, lambda row: 1 / noise_scale)
    rungs = 32 * 2.0 ** np.arange(8)
    root = max(32, math.sqrt(32 * multiple * noise_scale))
    assert plan.batch_sizes[-1] == rungs[np.argmin(np.abs(np.log(rungs / root)))]


def test_past_the_cap_the_learning_rate_follows_the_noise_scale():
    plan, _ = rolled_out(controller(), lambda row: 1 / 70_000)
    assert plan.batch_sizes[-1] == 256
    assert plan.hypers["learning_rate"][-1] == pytest.approx(0.1 / 8)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("ratio", "multiple", "level"), [(1.9, 1, 0), (6, 1, 2), (6, 2, 3)])
def test_where_training_hovers_the_batch_comes_to_rest(seed, ratio, multiple, level):
    """V = multiple k B_0, the next rung below."""
    c = controller(multiple=multiple, train_examples=20_000, max_batch_size=10_000)
    plan, states = rolled_out(c, hovering(ratio), seed=seed)
    assert plan.batch_sizes[-1] == 32 * 2**level
    assert max((0, *states[-1].growths)) < plan.num_updates / 2


@pytest.mark.parametrize("seed", range(20))
def test_noise_alone_never_raises_the_batch_where_the_signal_is_clear(seed):
    """B_noise is 40; the next level would need 64."""
    plan, _ = rolled_out(controller(epochs=100), lambda row: 1 / 40, seed=seed)
    assert set(plan.batch_sizes) == {32}


@pytest.mark.parametrize("square", [-0.01, 0.0, math.nan])
def test_estimates_that_are_not_positive_raise_nothing(square):
    plan, _ = rolled_out(controller(), lambda row: square)
    assert set(plan.batch_sizes) == {32}


def test_a_decision_is_for_the_update_after_the_next():
    c, state = controller(), Decisions()
    while not state.growths:
        before = state
        state = c.observe(state, measured(32, 1e-6, 1.0))
    assert before.updates >= 5 - 1
    assert state.growths == (before.updates + DELAY_UPDATES,)
    # Updates on the lower level that were on their way already count for nothing.
    assert c.observe(state, measured(32, 1e-9, 1.0)).smoothed == state.smoothed
    # The next growth needs as many measurements of its own.
    assert state.smoothed == Smoothed()
    first = before.updates + 1
    while len(state.growths) == 1:
        state = c.observe(state, measured(64, 1e-6, 1.0))
    assert state.updates - state.growths[0] - DELAY_UPDATES >= first - DELAY_UPDATES


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 1000),
    ratio=st.floats(0.5, 100),
    factor=st.floats(1.1, 5),
    cap=st.integers(32, 2_000),
    cooldown=st.sampled_from([0, None, 4.3, 6]),
)
def test_what_is_known_never_changes_and_only_grows(seed, ratio, factor, cap, cooldown):
    c = controller(growth_factor=factor, max_batch_size=cap, cooldown_epochs=cooldown, epochs=6)
    final, states = rolled_out(c, hovering(ratio), seed)
    assert (np.diff(final.batch_sizes) >= 0).all()
    assert (np.diff(final.noise_scales) <= 1e-12 * final.noise_scales[0]).all()
    assert (final.batch_sizes % 16 == 0).all()
    assert final.batch_sizes.max() <= cap
    assert final.first_examples[-1] < 6_000 <= final.num_examples
    assert set(final.batch_sizes) <= set(c.likely_batch_sizes)
    for state in states:
        plan = c.plan(state)
        known = min(c.known_updates(state), plan.num_updates)
        assert (plan.batch_sizes[:known] == final.batch_sizes[:known]).all()
        rates = plan.hypers["learning_rate"][:known]
        assert (rates == final.hypers["learning_rate"][:known]).all()
        assert (known == plan.num_updates) <= (plan.num_updates == final.num_updates)
    assert c.fewest_updates().num_updates <= final.num_updates <= c.most_updates().num_updates
    assert c.most_updates().num_updates <= c.plan().num_updates


@pytest.mark.parametrize(("noise_scale", "level"), [(63, 0), (300, 2)])
@pytest.mark.parametrize("cap", [64, 1_000])
def test_the_cooldown_holds_the_noise_just_above_a_line_to_zero(noise_scale, level, cap):
    """Whatever was measured, and whether the batch can still grow or the learning rate falls."""
    c = controller(cooldown_epochs=5, max_batch_size=cap, train_examples=3_000)
    plan, _ = rolled_out(c, lambda row: 1 / noise_scale)
    noise = plan.noise_scales / plan.noise_scales[0]
    epoch = plan.first_examples / 3_000
    before = epoch < 15
    assert noise[before][-1] == pytest.approx(2.0**-level)
    line = 2.0**-level * (20 - epoch[~before]) / 5
    # A rung is below twice the line. A rise waits until an update on its level has been measured.
    late = 1 + 4 * plan.batch_sizes[~before] / (3_000 * (20 - epoch[~before]))
    assert (noise[~before] >= line * (1 - 1e-12)).all()
    assert (noise[~before] <= 2 * line * late * (1 + 1e-12)).all()
    assert noise[-1] <= 2.0 ** -(level + 3) * (1 + 1e-12)


@pytest.mark.parametrize(("past", "grown"), [(2_000, False), (3_000, True)])
def test_a_growth_at_the_cooldowns_start_is_one_of_the_cooldowns_own(past, grown):
    """At half of it one level is due, at three quarters the second."""
    c = controller(cooldown_epochs=4)
    growth = 16_000 // 32
    updates = growth + math.ceil(past / 64) - DELAY_UPDATES
    decisions = Decisions(updates, (growth,))
    found = c.observe(decisions, measured(64, 1.0, 1e-6))
    assert (len(found.growths) == 2) == grown


def test_the_cooldown_is_a_fifth_of_the_run_unless_told():
    quiet = [controller(cooldown_epochs=c).most_updates() for c in (None, 4, 4.1)]
    assert quiet[0].diff(quiet[1]) is None
    assert quiet[0].diff(quiet[2]) is not None
    assert (quiet[0].batch_sizes[: 18_000 // 32] == 32).all()
    assert controller().most_updates().diff(controller().plan()) is None


@pytest.mark.parametrize("stop", [0, 1, 7, 30])
def test_a_state_that_went_through_json_decides_the_same(stop):
    c = controller()
    _, states = rolled_out(c, hovering(10), seed=3)
    state = Decisions.from_json(json.loads(json.dumps(states[stop].to_json())))
    assert state == states[stop]
    row = c.plan(state).row(state.updates)
    measurement = measured(row.batch_size, hovering(10)(row), 1.0, np.random.default_rng(0))
    assert c.observe(state, measurement) == c.observe(states[stop], measurement)


def test_a_course_knows_a_plan_at_once_and_an_adaptive_run_two_updates_ahead():
    planned = Course(controller().plan())
    assert planned.known_updates == planned.plan.num_updates
    planned.observe(None)
    assert planned.saved is None
    adaptive = Course(planned.plan, controller())
    assert adaptive.known_updates == DELAY_UPDATES
    adaptive.observe(measured(32, 0.1, 1.0))
    assert adaptive.known_updates == DELAY_UPDATES + 1
    again = Course(planned.plan, controller(), json.loads(json.dumps(adaptive.saved)))
    assert again.saved == adaptive.saved
    text = again.to_json()
    assert json.loads(text)["decided_updates"] == DELAY_UPDATES + 1
    assert Plan.from_json(text).diff(again.plan) is None


def test_bad_arguments_are_told_together():
    with pytest.raises(UserError) as caught:
        controller(
            max_batch_size=16,
            multiple=0,
            growth_factor=1,
            smoothing=-1,
            momentum=1,
            cooldown_epochs=20.5,
        )
    nearest = {problem.field: problem.nearest for problem in caught.value.problems}
    assert nearest == {
        "max_batch_size": 32,
        "multiple": None,
        "growth_factor": None,
        "smoothing": None,
        "momentum": 0.999,
        "cooldown_epochs": 20,
    }
    for size, instead in [(16, 32), (40, 32), (72, 64)]:
        with pytest.raises(UserError) as caught:
            controller(batch_size=size)
        assert [p.nearest for p in caught.value.problems if p.field == "batch_size"] == [instead]
