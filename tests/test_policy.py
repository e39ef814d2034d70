"""Policies against closed forms written with `math`, Optax, and the words of their errors."""

import math

import numpy as np
import optax
import pytest

from bigbatch import errors
from bigbatch.schedule import policy
from bigbatch.schedule.plan import make_plan
from bigbatch.schedule.policy import (
    POLICIES,
    batch_ramp,
    batch_stages,
    constant,
    cosine,
    exponential,
    from_optax,
    from_optax_name,
    polynomial,
    stages,
    step_decay,
    warmup,
    warmup_stable_decay,
)

EPOCHS = np.linspace(0, 100, 1001)


def linear(e):
    return 0.01 + 0.49 * (1 - min(max((e - 10) / 60, 0), 1))


CLOSED_FORMS = {
    "constant": (constant(0.5, 32, 0.9), lambda e: 0.5),
    "step_decay": (
        step_decay(0.5, 32, 0.9, boundaries_epochs=[20, 50.5], factor=0.1),
        lambda e: 0.5 if e < 20 else 0.05 if e < 50.5 else 0.005,
    ),
    "exponential": (
        exponential(0.5, 32, 0.9, factor=0.97, every_epochs=2.4),
        lambda e: 0.5 * math.exp(math.log(0.97) * e / 2.4),
    ),
    "linear": (
        polynomial(0.5, 32, 0.9, from_epoch=10, until_epoch=70, final_learning_rate=0.01),
        linear,
    ),
    "square": (
        polynomial(0.5, 32, 0.9, power=2, epochs=100),
        lambda e: 0.5 * (1 - e / 100) ** 2,
    ),
    "cosine": (
        cosine(0.5, 32, 0.9, from_epoch=5, until_epoch=90, final_learning_rate=0.1),
        lambda e: 0.1 + 0.4 * (1 + math.cos(math.pi * min(max((e - 5) / 85, 0), 1))) / 2,
    ),
    "warmup_stable_decay": (
        warmup_stable_decay(0.5, 32, 0.9, warmup_epochs=5, decay_epochs=20, epochs=100),
        lambda e: 0.5 * min(e / 5, 1, (100 - e) / 20),
    ),
    "warmup": (
        warmup(
            step_decay(0.5, 32, 0.9, boundaries_epochs=[3, 50], factor=0.5),
            warmup_epochs=5,
            initial_learning_rate=0.05,
        ),
        lambda e: 0.05 + 0.2 * e / 5 if e < 5 else 0.25 if e < 50 else 0.125,
    ),
    "stages": (
        stages("0:0.5 10_epochs:1 40_epochs:0.25", "0:32", 0.9),
        lambda e: 0.5 if e < 10 else 1.0 if e < 40 else 0.25,
    ),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_forms(name):
    made, expected = CLOSED_FORMS[name]
    settings = made.at(EPOCHS)
    rates = [expected(e) for e in EPOCHS.tolist()]
    np.testing.assert_allclose(settings.hyper["learning_rate"], rates, rtol=1e-12, atol=1e-15)
    assert settings.batch_size.tolist() == [32.0] * len(EPOCHS)
    assert settings.hyper["momentum"].tolist() == [0.9] * len(EPOCHS)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_peak_is_the_largest_learning_rate(name):
    """All peaks of these policies lie on the grid."""
    made, expected = CLOSED_FORMS[name]
    rates = [expected(e) for e in EPOCHS.tolist()]
    assert made.peak_learning_rate == pytest.approx(max(rates), rel=1e-12)
    assert made.peak_epoch == pytest.approx(EPOCHS[int(np.argmax(np.round(rates, 12)))])


def test_cosine_keeps_its_relative_precision_to_the_end():
    """(1 + cos x)/2 in double precision would be off by 1e-4 here; the series is not."""
    left = 1e-6
    rate = cosine(1.0, 32, until_epoch=1).at(1 - left).hyper["learning_rate"][0]
    assert rate == pytest.approx((math.pi * left / 2) ** 2, rel=1e-9)


OPTAX_TWINS = {
    "cosine": (
        optax.warmup_cosine_decay_schedule(0.0, 0.5, 50, 1000, 0.01),
        warmup(
            cosine(0.5, 20, from_epoch=1, until_epoch=20, final_learning_rate=0.01),
            warmup_epochs=1,
        ),
    ),
    "linear": (optax.linear_schedule(0.5, 0.0, 1000), polynomial(0.5, 20, until_epoch=20)),
    "exponential": (
        optax.exponential_decay(0.5, 100, 0.5),
        exponential(0.5, 20, factor=0.5, every_epochs=2),
    ),
    "steps": (
        optax.piecewise_constant_schedule(0.5, {200: 0.2, 600: 0.2}),
        step_decay(0.5, 20, boundaries_epochs=[4, 12], factor=0.2),
    ),
}


@pytest.mark.parametrize("name", OPTAX_TWINS)
def test_optax_schedules_are_taken_as_they_are(name):
    """At every update of its own, in double precision, and held in between."""
    schedule, twin = OPTAX_TWINS[name]
    made = from_optax(schedule, 20, train_examples=1000, epochs=20)
    positions = np.arange(0, 20_000, 20)
    rates = made.at(positions / 1000).hyper["learning_rate"]
    expected = twin.at(positions / 1000).hyper["learning_rate"]
    np.testing.assert_allclose(rates, expected, rtol=1e-12)
    held = made.at((positions + 19) / 1000).hyper["learning_rate"]
    assert held.tolist() == made.at(positions / 1000).hyper["learning_rate"].tolist()
    assert made.peak_learning_rate == 0.5


@pytest.mark.parametrize("train_examples", [7, 1437, 50_000, 1_281_167])
def test_optax_updates_are_counted_exactly(train_examples):
    """A schedule that is its own count, for positions that are no round part of an epoch."""
    made = from_optax(lambda count: count + 1.0, 7, train_examples=train_examples, epochs=3)
    positions = np.arange(0, 3 * train_examples, max(1, train_examples // 5000))
    counts = made.at(positions / train_examples).hyper["learning_rate"] - 1
    assert counts.tolist() == (positions // 7).tolist()


def test_optax_schedule_with_python_control_flow():
    made = from_optax(lambda k: 0.1 if k < 10 else 0.01, 10, train_examples=100, epochs=2)
    np.testing.assert_array_equal(made.at([0.99, 1.0]).hyper["learning_rate"], [0.1, 0.01])


def test_optax_restarts_have_several_turning_points():
    cycles = [
        {"init_value": 0.0, "peak_value": p, "warmup_steps": 5, "decay_steps": 20}
        for p in (0.1, 0.3, 0.2)
    ]
    made = from_optax_name(
        "sgdr_schedule", {"cosine_kwargs": cycles}, 10, train_examples=100, epochs=6
    )
    assert made.turning_epochs == pytest.approx((0.5, 2.5, 4.5))
    assert (made.peak_epoch, made.peak_learning_rate) == (2.5, pytest.approx(0.3))


def test_zero_epoch():
    assert cosine(0.1, 10, until_epoch=4).zero_epoch == 4
    assert cosine(0.1, 10, until_epoch=4, final_learning_rate=0.01).zero_epoch == math.inf
    assert stages("0:0.1 2_epochs:0", "0:10").zero_epoch == 2
    ending = optax.linear_schedule(0.1, 0, 30)
    assert from_optax(ending, 10, train_examples=100, epochs=3).zero_epoch == 3
    assert from_optax(ending, 10, train_examples=100, epochs=2).zero_epoch == math.inf


def test_stages_in_mixed_units():
    """250 examples, then 20 updates of 40, then from epoch 3; every start by hand."""
    made = stages(
        "0:0.1 20_updates:0.05",
        "0:10 250_examples:40 45_updates:80 3_epochs:160",
        train_examples=1000,
    )
    plan = make_plan(made, train_examples=1000, epochs=4)
    stage_rows = [(s.first_update, s.first_example, s.batch_size) for s in plan.stages]
    # 25 updates of 10 reach 250; 20 more of 40 reach 1050; 25 of 80 reach 3050.
    assert stage_rows == [(0, 0, 10), (25, 250, 40), (45, 1050, 80), (70, 3050, 160)]
    assert plan.hypers["learning_rate"][[19, 20]].tolist() == [0.1, 0.05]


def test_stages_with_thousands():
    made = stages(0.1, "0:768 250k_examples:1536 1.5M_examples:3072", train_examples=10**6)
    np.testing.assert_array_equal(
        made.at([0.249999, 0.25, 1.499999, 1.5]).batch_size, [768, 1536, 1536, 3072]
    )


def test_batch_stages_leave_the_learning_rate_alone():
    source = cosine(0.1, 10, 0.9, until_epoch=4)
    staged = batch_stages(source, "0:16 1_epochs:32")
    grid = np.linspace(0, 4, 50)
    ours, theirs = staged.at(grid).hyper, source.at(grid).hyper
    assert ours["learning_rate"].tolist() == theirs["learning_rate"].tolist()
    assert staged.at([0.5, 1.0]).batch_size.tolist() == [16, 32]


def test_batch_ramp():
    """From 32 to 128 by 32 over 300 examples: one increment every 100."""
    ramp = batch_ramp(
        constant(0.1, 128),
        initial_batch_size=32,
        increment_examples=32,
        ramp_examples=300,
        train_examples=1000,
    )
    positions = [0, 99, 100, 199, 200, 299, 300, 900]
    assert ramp.at(np.array(positions) / 1000).batch_size.tolist() == [
        32, 32, 64, 64, 96, 96, 128, 128,
    ]  # fmt: skip


MISTAKES = {
    "all at once": (
        lambda: constant(-0.1, 12.5, 1.0),
        [("learning_rate", None), ("batch_size", 12), ("momentum", 0.999)],
    ),
    "types": (
        lambda: constant("0.1", True, math.nan),
        [("learning_rate", None), ("batch_size", None), ("momentum", None)],
    ),
    "order": (
        lambda: step_decay(0.1, 8, boundaries_epochs=[60, 30], factor=0.1),
        [("boundaries_epochs", [30, 60])],
    ),
    "no list": (
        lambda: step_decay(0.1, 8, boundaries_epochs=60, factor=0.1),
        [("boundaries_epochs", None)],
    ),
    "negative boundary": (
        lambda: step_decay(0.1, 8, boundaries_epochs=[-1, 3], factor=0.1),
        [("boundaries_epochs[0]", None)],
    ),
    "factor": (
        lambda: step_decay(0.1, 8, boundaries_epochs=[3], factor=5),
        [("factor", 0.2)],
    ),
    "exponential": (
        lambda: exponential(0.1, 8, factor=1, every_epochs=0),
        [("factor", None), ("every_epochs", None)],
    ),
    "no end": (lambda: cosine(0.1, 8), [("until_epoch", None)]),
    "end before start": (
        lambda: polynomial(0.1, 8, power=0, from_epoch=5, until_epoch=5),
        [("power", None), ("until_epoch", None)],
    ),
    "final above first": (
        lambda: cosine(0.1, 8, until_epoch=5, final_learning_rate=0.2),
        [("final_learning_rate", 0.1)],
    ),
    "no room": (
        lambda: warmup_stable_decay(0.1, 8, warmup_epochs=6, decay_epochs=5, epochs=10),
        [("decay_epochs", 4)],
    ),
    "warm-up from above": (
        lambda: warmup(constant(0.1, 8), warmup_epochs=5, initial_learning_rate=0.2),
        [("initial_learning_rate", 0.1)],
    ),
    "warm-up to nothing": (
        lambda: warmup(cosine(0.1, 8, until_epoch=2), warmup_epochs=2),
        [("warmup_epochs", None)],
    ),
    "negative": (
        lambda: stages(-0.1, "0:8", momentum=1.0),
        [("learning_rate", None), ("momentum", 0.999)],
    ),
    "unit missing": (lambda: stages(0.1, "0:8 60:16"), [("batch_size", None)]),
    "no number": (lambda: stages(0.1, "0:8 1_epochs:x"), [("batch_size", None)]),
    "not from 0": (lambda: stages(0.1, "1_epochs:8"), [("batch_size", None)]),
    "stages out of order": (
        lambda: stages("0:1 3_epochs:2 2_epochs:1", "0:8"),
        [("learning_rate", None)],
    ),
    "half an example": (lambda: stages(0.1, "0:8 1_epochs:8.5"), [("batch_size", 8)]),
    "N missing": (lambda: stages(0.1, "0:8 9_updates:16"), [("train_examples", None)]),
    "ramp": (
        lambda: batch_ramp(
            constant(0.1, 128), initial_batch_size=32, increment_examples=50, ramp_epochs=0
        ),
        [("ramp_epochs", None), ("increment_examples", 48)],
    ),
    "ramp down": (
        lambda: batch_ramp(
            constant(0.1, 128), initial_batch_size=128, increment_examples=1, ramp_epochs=1
        ),
        [("initial_batch_size", None)],
    ),
    "negative schedule": (
        lambda: from_optax(lambda k: 1.0 - k, 1, train_examples=9, epochs=1),
        [("schedule", None)],
    ),
    "all zero": (
        lambda: from_optax(lambda k: 0.0 * k, 1, train_examples=9, epochs=1),
        [("schedule", None)],
    ),
    "schedule name": (
        lambda: from_optax_name("cosine_decay", {}, 8, train_examples=9, epochs=1),
        [("schedule", "cosine_decay_schedule")],
    ),
    "schedule arguments": (
        lambda: from_optax_name("constant_schedule", {"x": 1}, 8, train_examples=9, epochs=1),
        [("arguments", None)],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    make, expected = MISTAKES[name]
    with pytest.raises(errors.UserError) as caught:
        make()
    assert [(p.field, p.nearest) for p in caught.value.problems] == expected
    assert all(p.allowed for p in caught.value.problems)


def test_registry_holds_constructors_of_this_package():
    assert {f.__name__ for f in POLICIES.values()} <= set(policy.__all__)
