"""Optimizers of anyone's own against the same ones in plain Optax, and every mistake in one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from bigbatch.engine import transformations
from bigbatch.engine.optimizer import Adam, Sgd
from bigbatch.engine.update_rule import Rule
from bigbatch.errors import UserError
from tests.optimizers import (
    EXAMPLES,
    OWN,
    PARAMS,
    PLAN,
    SHAPES,
    UPDATES,
    assert_close,
    by_optax,
    jit,
    rule_of,
    trained,
)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", OWN)
def test_an_optimizer_of_ones_own_gives_what_optax_gives(name):
    plan, optimizer, plain = OWN[name]
    rule = rule_of(optimizer, plan)
    state, _ = trained(rule, plan)
    evaluated = jit(rule.evaluation_params)(state.optimizer, state.params)
    params, plain_state = by_optax(plain, plan)
    assert_close(state.params, params)
    if "schedule_free" in name:
        params = contrib.schedule_free_eval_params(plain_state, params)
        assert np.max(np.abs(params["kernel"] - state.params["kernel"])) > 1e-3
    assert_close(evaluated, params)
    moved = np.abs(np.asarray(state.params["kernel"]) - PARAMS["kernel"])
    assert np.max(moved) > 1e-3


def test_a_signature_says_which_columns_are_followed():
    assert rule_of(optax.adamw).hyper_names == ("learning_rate",)
    with_adam = PLAN | {"b1": np.full(UPDATES, 0.7), "eps": np.full(UPDATES, 1e-3)}
    rule = rule_of(optax.adamw, with_adam)
    assert rule.hyper_names == ("learning_rate", "b1", "eps")
    assert "adamw" in rule.name
    assert "ScaleByAdamState" in rule.name
    state, _ = trained(rule_of(optax.adamw, with_adam), with_adam)
    plain = lambda h: optax.adamw(h["learning_rate"], b1=0.7, eps=1e-3)  # noqa: E731
    assert_close(state.params, by_optax(plain, PLAN)[0])


def test_equal_rules_share_their_programs():
    adam = [Rule(Adam(weight_decay=0.1), ("learning_rate",), name=name) for name in "ab"]
    assert adam[0] == adam[1]
    assert hash(adam[0]) == hash(adam[1])
    assert adam[0] != Rule(Adam(weight_decay=0.2), ("learning_rate",))
    assert rule_of(optax.lion) == rule_of(optax.lion)
    assert rule_of(optax.lion) != rule_of(optax.adam)


def test_only_hyperparameters_are_set_and_not_state_of_the_same_name():
    """Adam's state has a `mu`, which a plan's column `mu` must leave alone."""

    def noisy(learning_rate, mu):
        return optax.chain(
            optax.scale_by_adam(), optax.add_decayed_weights(mu), optax.scale(-learning_rate)
        )

    plan = PLAN | {"mu": np.full(UPDATES, 0.1)}
    state, _ = trained(rule_of(noisy, plan), plan)
    assert_close(state.params, by_optax(lambda h: noisy(h["learning_rate"], 0.1), PLAN)[0])


def test_schedule_free_in_a_group_evaluates_its_own_parameters():
    def grouped(learning_rate):
        groups = {
            "free": contrib.schedule_free_sgd(learning_rate),
            "plain": optax.sgd(learning_rate),
        }
        return optax.multi_transform(
            groups, {n: "free" if n == "kernel" else "plain" for n in SHAPES}
        )

    rule = rule_of(grouped)
    state, _ = trained(rule)
    evaluated = rule.evaluation_params(state.optimizer, state.params)
    _, plain_state = by_optax(lambda h: grouped(h["learning_rate"]), PLAN)
    free = plain_state.inner_states["free"].inner_state
    free = free._replace(z=free.z["kernel"])
    expected = contrib.schedule_free_eval_params(free, state.params["kernel"])
    np.testing.assert_allclose(evaluated.pop("kernel"), expected, atol=1e-10)
    assert np.max(np.abs(expected - state.params["kernel"])) > 1e-3
    assert_close(evaluated, {n: v for n, v in state.params.items() if n != "kernel"})


def test_evaluation_parameters_may_be_given():
    half = lambda state, params: jax.tree.map(lambda leaf: leaf / 2, params)  # noqa: E731
    for optimizer in (Sgd(), optax.sgd):
        rule = rule_of(optimizer, evaluation_params=half)
        evaluated = rule.evaluation_params(rule.init(PARAMS), PARAMS)
        assert_close(evaluated, jax.tree.map(lambda leaf: leaf / 2, PARAMS))


def test_bfloat16_parameters_have_a_state_in_float32():
    """As in a loop that keeps float32 moments and rounds nothing but the parameters."""
    adam = Adam(average_examples=30.0)
    rule = rule_of(adam, dtype=jnp.bfloat16)
    state, _ = trained(rule, dtype=jnp.bfloat16)
    floats = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.dtype != jnp.int32]
    assert {str(leaf.dtype) for leaf in floats} == {"float32"}
    assert state.optimizer.hyperparams["b2"] == np.float32(0.999)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state.params)} == {"bfloat16"}
    evaluated = jax.eval_shape(rule.evaluation_params, state.optimizer, state.params)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(evaluated)} == {"bfloat16"}

    params = {name: jnp.asarray(value, jnp.bfloat16) for name, value in PARAMS.items()}
    gradients = [
        {name: jnp.full(shape, 0.3 + update, jnp.bfloat16) for name, shape in SHAPES.items()}
        for update in range(3)
    ]
    plain = optax.adam(0.05)
    wide = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)  # noqa: E731
    by_hand, hand_state, plain_update = params, plain.init(wide(params)), jit(plain.update)
    ours, our_state, update = params, rule.init(params), jit(rule.update)
    for gradient in gradients:
        changes, hand_state = plain_update(wide(gradient), hand_state, wide(by_hand))
        by_hand = jax.tree.map(lambda p, c: (wide(p) + c).astype(p.dtype), by_hand, changes)
        hyper = {"learning_rate": np.float32(0.05)}
        changes, our_state = update(gradient, our_state, ours, hyper, EXAMPLES)
        ours = optax.apply_updates(ours, changes)
    assert_close(wide(ours), wide(by_hand), tolerance=0)


def positional(learning_rate, missing):
    return optax.sgd(learning_rate)


def open_ended(learning_rate, **others):
    return optax.sgd(learning_rate, **others)


def untraceable(learning_rate):
    return optax.sgd(learning_rate if learning_rate > 0 else 0.0)


def widening(learning_rate):
    def update(updates, state, params=None):
        return updates, jnp.concatenate([state, state])

    return optax.chain(
        optax.sgd(learning_rate), optax.GradientTransformation(lambda params: jnp.zeros(2), update)
    )


def free_and_averaged(learning_rate):
    return optax.chain(
        contrib.schedule_free_sgd(learning_rate), transformations.average_parameters(10.0)
    )


SCHEDULE = optax.linear_schedule(0.1, 0.01, 10)
NESTED = optax.chain(optax.inject_hyperparams(optax.sgd)(learning_rate=SCHEDULE))
WITH_B1 = PLAN | {"b1": np.full(UPDATES, 0.9)}
WITH_MOMENTUM = PLAN | {"momentum": np.full(UPDATES, 0.9)}

# (optimizer, plan, evaluation_params) -> the field, and words of the message.
MISTAKES = {
    "no optimizer": (3, PLAN, None, "optimizer", ["a function of hyperparameters"]),
    "no default": (positional, PLAN, None, "optimizer", ["missing", "learning_rate, momentum"]),
    "open ended": (open_ended, PLAN, None, "optimizer", ["others"]),
    "not traced": (untraceable, PLAN, None, "optimizer", ["TracerBoolConversionError"]),
    "returns nothing": (lambda learning_rate: None, PLAN, None, "optimizer", ["AttributeError"]),
    "another state": (widening, PLAN, None, "optimizer", ["shapes"]),
    "nothing followed": (optax.sgd(0.1), PLAN, None, "optimizer", ["learning_rate", "none"]),
    "no rate": (lambda b1=0.9: optax.adam(0.1, b1), PLAN, None, "optimizer", ["learning_rate"]),
    "schedule": (NESTED, PLAN, None, "optimizer", ["schedule", "learning_rate"]),
    "momentum": (optax.lion, WITH_MOMENTUM, None, "policy.momentum", ["lion"]),
    "b1": (lambda learning_rate: optax.sgd(learning_rate), WITH_B1, None, "optimizer", ["b1"]),
    "bundled b1": (Sgd(), WITH_B1, None, "optimizer.name", ["b1", "adam"]),
    "two averages": (free_and_averaged, PLAN, None, "evaluation_params", ["two kinds"]),
    "evaluation": (
        *(optax.sgd, PLAN, lambda state, params: {**params, "kernel": params["bias"]}),
        *("evaluation_params", ["shapes"]),
    ),
    "evaluation of no such state": (
        *(Sgd(), PLAN, lambda state, params: state.average),
        *("evaluation_params", ["AttributeError"]),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_is_one_sentence(mistake):
    optimizer, plan, evaluation_params, field, words = MISTAKES[mistake]
    with pytest.raises(UserError) as error:
        rule_of(optimizer, plan, evaluation_params=evaluation_params)
    (problem,) = error.value.problems
    assert problem.field == field
    for word in words:
        assert word in str(problem)
    assert "\n" not in str(problem)
