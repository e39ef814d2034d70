"""Diagnostics against numbers worked out by hand, for the paper's runs."""

import types

import numpy as np
import pytest

from bigbatch.layout.layout import idle_share, make_layout
from bigbatch.schedule.adaptive.gradient_noise import best_learning_rate
from bigbatch.schedule.diagnostics import diagnose, linear_scaling, momentum_lags_epochs
from bigbatch.schedule.plan import make_plan
from bigbatch.schedule.policy import constant, cosine, stages, step_decay, warmup
from bigbatch.schedule.transform import grow_batch, raise_momentum, scale, with_rule

PAPER = step_decay(0.1, 128, 0.9, boundaries_epochs=[60, 120, 160], factor=0.2)


def plan_of(policy):
    return make_plan(policy, train_examples=50_000, epochs=200)


def found(policy, source=PAPER):
    return {d.name: d for d in diagnose(plan_of(policy), plan_of(source))}


def test_the_original_recipe_is_not_warned_of():
    for diagnostic in found(PAPER).values():
        assert diagnostic.warning is None
        assert diagnostic.value <= diagnostic.limit


def test_momentum_lags():
    """B / (N (1 - m)): 3200 and 5120 at 0.98."""
    policy = grow_batch(raise_momentum(scale(PAPER, 5), 0.98), 5120)
    np.testing.assert_allclose(momentum_lags_epochs(plan_of(policy)), [3.2, 5.12])
    lag = found(policy)["momentum_lag"]
    # The first 938 updates of 3200 end at epoch 60.032.
    assert lag.value == pytest.approx(3.2 / 60.032)
    assert "3.2 epochs" in lag.warning
    assert "lower the momentum" in lag.warning
    # Two thirds of a percent: five times the batch size at 0.9 is no reason to warn.
    assert found(scale(PAPER, 5))["momentum_lag"].warning is None


def test_momentum_lag_where_every_update_has_its_own_size():
    """The time near one size is when it is within a factor 1.5, not one update."""
    growing = grow_batch(cosine(0.1, 128, 0.9, until_epoch=200, final_learning_rate=0.01))
    plan = plan_of(growing)
    lag = found(growing)["momentum_lag"]
    shares = []
    starts = np.array([stage.first_example for stage in plan.stages])
    ends = np.r_[starts[1:], plan.num_examples]
    for stage in plan.stages:
        near = [
            other.batch_size / stage.batch_size < 1.5 and stage.batch_size / other.batch_size < 1.5
            for other in plan.stages
        ]
        examples = ends[near].max() - starts[near].min()
        shares.append(stage.batch_size / 0.1 / examples)
    assert lag.value == pytest.approx(max(shares))


def test_noise_error_and_batch_share():
    """32 % at 16,000 of 50,000; the exact rule has no error but the same share."""
    uncapped = found(grow_batch(PAPER))
    assert uncapped["noise_error"].value == pytest.approx(0.32)
    assert "linear_exact" in uncapped["noise_error"].warning
    assert uncapped["batch_share"].value == pytest.approx(0.32)
    assert "5,000" in uncapped["batch_share"].warning
    exact = with_rule(PAPER, "linear_exact", train_examples=50_000)
    assert "noise_error" not in found(grow_batch(exact, 16_000))


def test_effective_learning_rate():
    """0.5/(1-0.98) is 25 times 0.1/(1-0.9); a warm-up is the way out that the warning names."""
    raised = raise_momentum(scale(PAPER, 5), 0.98)
    diagnostic = found(raised)["effective_learning_rate"]
    assert diagnostic.value == pytest.approx(25)
    assert "warmup" in diagnostic.warning
    assert found(warmup(raised, warmup_epochs=5))["effective_learning_rate"].warning is None
    assert found(scale(PAPER, 5))["effective_learning_rate"].warning is None


@pytest.mark.parametrize(("share", "warns"), [(0.6, True), (0.4, False)])
def test_a_plan_that_rises_from_half_its_peak_is_no_warm_up(share, warns):
    rising = stages(f"0:{share:g} 5_epochs:1.0", "0:128", 0.9)
    assert bool(found(rising)["effective_learning_rate"].warning) == warns


def test_masked_share():
    layout = make_layout(
        [128], ghost_batch_examples=128, devices=8, microbatch_examples_per_device=128
    )
    diagnostic = idle_share(plan_of(constant(0.1, 128, 0.9)), layout)
    assert diagnostic.value == 7 / 8
    assert "8 devices" in diagnostic.warning
    idle = types.SimpleNamespace(masked_share=lambda plan: 0.05, shapes=(128,), devices=1)
    assert idle_share(plan_of(PAPER), idle).warning is None


def test_linear_scaling_stops_at_the_measured_noise_scale():
    """Twice the best learning rate at B = B_noise, as the formula has it, and a warning beyond."""
    plan = plan_of(grow_batch(PAPER, 5120))
    at = linear_scaling(plan, 5120)
    assert (at.value, at.warning) == (1.0, None)
    beyond = linear_scaling(plan, 1280)
    assert beyond.value == 4.0
    # A learning rate per example as in the limit of small batches, against the best one.
    linear = best_learning_rate(1e-6, 1280, largest=1.0) / 1e-6 * 5120
    ratio = linear / best_learning_rate(5120, 1280, largest=1.0)
    assert ratio == pytest.approx(5.0, rel=1e-6)
    assert f"{ratio:.2g} times the best" in beyond.warning
