"""Times in other units are the same policy, and mistakes are told in the unit that was given."""

import inspect
import typing

import numpy as np
import pytest

from bigbatch import errors
from bigbatch.schedule.durations import first_example_from
from bigbatch.schedule.policy import (
    constant,
    cosine,
    exponential,
    stages,
    step_decay,
    warmup,
    warmup_stable_decay,
)
from bigbatch.schedule.transform import grow_batch

N = 1437
POSITIONS = np.arange(0, 30 * N, 17)
# 1437 examples an epoch, 16 a update: no round number anywhere.
PAIRS = {
    "boundaries_examples": (
        lambda: step_decay(
            0.1, 16, boundaries_examples=[9001, 20_003], factor=0.2, train_examples=N
        ),
        lambda p: 0.1 if p < 9001 else 0.02 if p < 20_003 else 0.004,
    ),
    "boundaries_updates": (
        lambda: step_decay(0.1, 16, boundaries_updates=(777,), factor=0.2, train_examples=N),
        lambda p: 0.1 if p < 777 * 16 else 0.02,
    ),
    "every_updates": (
        lambda: exponential(0.1, 16, factor=0.5, every_updates=100, train_examples=N),
        lambda p: 0.1 * 0.5 ** (p / 1600),
    ),
    "until_update": (
        lambda: cosine(0.1, 16, from_example=160, until_update=1000, train_examples=N),
        lambda p: 0.05 + 0.05 * np.cos(np.pi * np.clip((p - 160) / (16_000 - 160), 0, 1)),
    ),
    "warmup_updates of a policy": (
        lambda: warmup(constant(0.1, 16), warmup_updates=100, train_examples=N),
        lambda p: 0.1 * min(p / 1600, 1),
    ),
    "warmup_updates of a constructor": (
        lambda: warmup_stable_decay(
            0.1, 16, warmup_updates=100, decay_examples=1000, epochs=10, train_examples=N
        ),
        lambda p: 0.1 * max(0, min(p / 1600, 1, (10 * N - p) / 1000)),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_units(name):
    make, expected = PAIRS[name]
    rates = make().at(POSITIONS / N).hyper["learning_rate"]
    np.testing.assert_allclose(
        rates, [expected(p) for p in POSITIONS.tolist()], rtol=1e-11, atol=1e-15
    )


def test_growth_from_an_example():
    decay = step_decay(0.1, 16, boundaries_examples=[5000, 9000], factor=0.5, train_examples=N)
    grown = grow_batch(decay, from_example=9000, train_examples=N)
    assert grown.at(np.array([4999, 5000, 8999, 9000]) / N).batch_size.tolist() == [16, 16, 16, 32]


@pytest.mark.parametrize("boundary", [1, 17, 1436, 1437, 9001, 43_109])
def test_a_boundary_in_examples_falls_on_that_example(boundary):
    """The float that a boundary becomes is the float that its position becomes."""
    made = step_decay(1.0, 16, boundaries_examples=[boundary], factor=0.5, train_examples=N)
    rates = made.at(np.array([boundary - 1, boundary]) / N).hyper["learning_rate"]
    assert rates.tolist() == [1.0, 0.5]


def test_signature_shows_every_unit():
    """A config is bound by signature and annotations."""
    parameters = inspect.signature(step_decay).parameters
    hints = typing.get_type_hints(step_decay)
    for unit in ("epochs", "examples", "updates"):
        assert parameters[f"boundaries_{unit}"].default is None
        assert hints[f"boundaries_{unit}"] == hints["boundaries_epochs"]
    assert "train_examples" in parameters
    assert "until_update" not in inspect.signature(grow_batch).parameters


MISTAKES = {
    "two units": (
        lambda: step_decay(
            0.1, 8, boundaries_epochs=[1], boundaries_updates=[9], factor=0.5, train_examples=99
        ),
        [("boundaries_epochs", ["boundaries_epochs", "boundaries_updates"], None)],
    ),
    "no unit": (
        lambda: step_decay(0.1, 8, factor=0.5),
        [("boundaries_epochs", "nothing", None)],
    ),
    "N missing": (
        lambda: warmup(constant(0.1, 8), warmup_examples=100),
        [("train_examples", "nothing", None)],
    ),
    "told in the unit that was given": (
        lambda: step_decay(0.1, 8, boundaries_updates=[500, 100], factor=0.5, train_examples=1437),
        [("boundaries_updates", [500, 100], [100, 500])],
    ),
    "no number": (
        lambda: exponential(0.1, 8, factor=0.5, every_examples="5", train_examples=1437),
        [("every_examples", "5", None)],
    ),
    "out of range": (
        lambda: warmup(constant(0.1, 8), warmup_updates=-3, train_examples=1437),
        [("warmup_updates", -3, 0)],
    ),
    "the batch size changes": (
        lambda: warmup(stages(0.1, "0:8 1_epochs:16"), warmup_updates=200, train_examples=1437),
        [("warmup_updates", 200, None)],
    ),
    "batch size is wrong too": (
        lambda: exponential(0.1, "8", factor=0.5, every_updates=5, train_examples=1437),
        [("batch_size", "8", None)],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    make, expected = MISTAKES[name]
    with pytest.raises(errors.UserError) as caught:
        make()
    assert [(p.field, p.given, p.nearest) for p in caught.value.problems] == expected


def test_an_unknown_argument_is_a_bug_of_the_caller():
    with pytest.raises(TypeError, match="boundaries_steps"):
        step_decay(0.1, 8, boundaries_steps=[1], factor=0.5)


def test_first_example_from():
    assert first_example_from(0.1 * 3, 10) == 3
    assert first_example_from(0.31, 10) == 4
    assert first_example_from(90, 1_281_167) == 90 * 1_281_167
