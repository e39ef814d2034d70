"""Fifty updates of each optimizer against Optax by hand, and the published rules in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigbatch.engine import functions as step
from bigbatch.engine import optimizer, transformations
from bigbatch.engine.task import Task
from bigbatch.engine.update_rule import resolve
from bigbatch.workdir.checkpoint import Checkpoints
from tests.optimizers import empty_accumulator

UPDATES = 50
EXAMPLES = 6
DECAY = 0.02
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(UPDATES, EXAMPLES, 4))
TARGETS = RNG.normal(size=(UPDATES, EXAMPLES, 3))
KERNEL = RNG.normal(size=(4, 3))
BIAS = RNG.normal(size=3)
# Learning rate and momentum change in the middle of the run, as a plan may have it.
RATES = np.where(np.arange(UPDATES) < 20, 0.1, 0.03)
MOMENTA = np.where(np.arange(UPDATES) < 30, 0.9, 0.95)
NO_MOMENTUM = np.zeros(UPDATES)


def tiny_task():
    def apply(params, running, examples, train):
        return jnp.tanh(examples["x"] @ params["kernel"] + params["bias"]), {}

    def loss(outputs, examples):
        per_example = jnp.sum(jnp.square(outputs - examples["y"]), axis=1)
        weight = examples["weight"]
        return {"loss": jnp.sum(weight * per_example), "count": jnp.sum(weight)}

    params = {"bias": BIAS, "kernel": KERNEL}
    return Task(lambda key: (jax.tree.map(jnp.asarray, params), {}), apply, loss)


def gradient(params, update):
    """Of the mean loss, by hand."""
    out = np.tanh(INPUTS[update] @ params["kernel"] + params["bias"])
    slope = 2 * (out - TARGETS[update]) * (1 - out**2) / EXAMPLES
    return {"bias": slope.sum(axis=0), "kernel": INPUTS[update].T @ slope}


def hyper_at(update, momenta=NO_MOMENTUM, **more):
    return {"learning_rate": RATES[update], "momentum": momenta[update]} | {
        name: values[update] for name, values in more.items()
    }


def rule_of(chosen, hypers):
    names = chosen.hyper_names(hypers[0])
    columns = {name: np.array([hyper[name] for hyper in hypers]) for name in names}
    return resolve(chosen, columns, {"bias": BIAS, "kernel": KERNEL})


def train(chosen, hypers):
    """Trajectory [updates] of parameters and optimizer states under the two compiled functions."""
    task, mesh, rule = tiny_task(), step.data_mesh(jax.devices()[:1]), rule_of(chosen, hypers)
    state = step.init_state(task, rule, jax.random.key(0))
    accumulate = jax.jit(functools.partial(step.accumulate, task=task, mesh=mesh))
    apply_update = jax.jit(
        functools.partial(step.apply_update, task=task, optimizer=rule, mesh=mesh)
    )
    trajectory, accumulator = [], None
    for update in range(UPDATES):
        examples = {
            "x": INPUTS[update],
            "y": TARGETS[update],
            "weight": np.ones(EXAMPLES),
            "ghost_mask": np.ones(1),
        }
        if accumulator is None:
            accumulator = empty_accumulator(task, state, examples, mesh)
        accumulator = accumulate(state, accumulator, examples)
        hyper = {name: np.asarray(hypers[update][name]) for name in rule.hyper_names}
        state, accumulator, _ = apply_update(state, accumulator, hyper)
        trajectory.append(state)
    assert apply_update._cache_size() <= 2  # Committed or not; never once per value.
    return trajectory


def by_optax(make, hypers):
    """Trajectory of the chain `make(**hyper)`, made anew for every update."""
    params, state, trajectory = {"bias": BIAS, "kernel": KERNEL}, None, []
    for update in range(UPDATES):
        chain = make(hypers[update])
        state = chain.init(params) if state is None else state
        changes, state = chain.update(gradient(params, update), state, params)
        params = optax.apply_updates(params, changes)
        trajectory.append(params)
    return trajectory


def by_numpy(rule, hypers):
    """Trajectory of a rule (name, w, g, slots, hyper, t) -> w that keeps its arrays in `slots`."""
    params, trajectory = {"bias": BIAS, "kernel": KERNEL}, []
    slots = {name: {} for name in params}
    for update in range(UPDATES):
        gradients = gradient(params, update)
        params = {
            name: rule(name, params[name], gradients[name], slots[name], hypers[update], update + 1)
            for name in params
        }
        trajectory.append(params)
    return trajectory


def assert_equal(states, *others):
    assert len(states) == UPDATES
    for other in others:
        for state, params in zip(states, other, strict=True):
            for name, expected in params.items():
                np.testing.assert_allclose(
                    state.params[name], expected, rtol=1e-10, atol=1e-13, err_msg=name
                )


def with_decay(name, w, kernels_only):
    return DECAY * w if name == "kernel" or not kernels_only else 0 * w


def sgd(name, w, g, slots, hyper, t):
    return w - hyper["learning_rate"] * (g + DECAY * w)


def momentum(name, w, g, slots, hyper, t):
    slots["v"] = hyper["momentum"] * slots.get("v", 0) + g + DECAY * w
    return w - hyper["learning_rate"] * slots["v"]


def nesterov(name, w, g, slots, hyper, t):
    slots["v"] = hyper["momentum"] * slots.get("v", 0) + g + DECAY * w
    return w - hyper["learning_rate"] * (g + DECAY * w + hyper["momentum"] * slots["v"])


def adam_direction(g, slots, t, b1=0.9, b2=0.999, eps=1e-8):
    slots["m"] = b1 * slots.get("m", 0) + (1 - b1) * g
    slots["v"] = b2 * slots.get("v", 0) + (1 - b2) * g**2
    return (slots["m"] / (1 - b1**t)) / (np.sqrt(slots["v"] / (1 - b2**t)) + eps)


def adam(name, w, g, slots, hyper, t):
    return w - hyper["learning_rate"] * adam_direction(g + DECAY * w, slots, t)


def adamw(name, w, g, slots, hyper, t):
    decay = with_decay(name, w, kernels_only=True)
    return w - hyper["learning_rate"] * (adam_direction(g, slots, t) + decay)


def lars(name, w, g, slots, hyper, t):
    """With lr inside of the velocity, as published, and Goyal's correction where lr changes."""
    rate, local = hyper["learning_rate"], 1.0
    if name == "kernel":
        norms = np.linalg.norm(w), np.linalg.norm(g)
        local = 0.01 * norms[0] / (norms[1] + DECAY * norms[0])
        g = g + DECAY * w
    corrected = slots.get("v", 0) * rate / slots.get("rate", rate)
    slots["v"] = hyper["momentum"] * corrected + rate * local * g
    slots["rate"] = rate
    return w - slots["v"]


def lamb(name, w, g, slots, hyper, t):
    direction = adam_direction(g, slots, t, eps=1e-6) + with_decay(name, w, kernels_only=True)
    return w - hyper["learning_rate"] * np.linalg.norm(w) / np.linalg.norm(direction) * direction


def l2(make):
    return lambda hyper: optax.chain(optax.add_decayed_weights(DECAY), make(hyper))


def kernels_mask(params):
    return {"bias": False, "kernel": True}


# Name -> (optimizer, the rule in NumPy, the chain in Optax).
CASES = {
    "sgd": (
        optimizer.Sgd(weight_decay=DECAY),
        sgd,
        l2(lambda h: optax.sgd(h["learning_rate"])),
    ),
    "momentum": (
        optimizer.Momentum(weight_decay=DECAY),
        momentum,
        l2(lambda h: optax.sgd(h["learning_rate"], h["momentum"])),
    ),
    "nesterov": (
        optimizer.Nesterov(weight_decay=DECAY),
        nesterov,
        l2(lambda h: optax.sgd(h["learning_rate"], h["momentum"], nesterov=True)),
    ),
    "adam": (
        optimizer.Adam(weight_decay=DECAY),
        adam,
        l2(lambda h: optax.adam(h["learning_rate"])),
    ),
    "adamw": (
        optimizer.AdamW(weight_decay=DECAY, decayed="kernels"),
        adamw,
        lambda h: optax.adamw(h["learning_rate"], weight_decay=DECAY, mask=kernels_mask),
    ),
    # Optax's LARS has another denominator and no correction: the next test has what they share.
    "lars": (optimizer.Lars(weight_decay=DECAY, trust_coefficient=0.01), lars, None),
    "lamb": (
        optimizer.Lamb(weight_decay=DECAY),
        lamb,
        lambda h: optax.lamb(h["learning_rate"], weight_decay=DECAY, mask=kernels_mask),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_fifty_updates_follow_optax_by_hand_and_the_published_rule(name):
    chosen, rule, chain = CASES[name]
    assert optimizer.OPTIMIZERS[name] is type(chosen)
    hypers = [hyper_at(update, MOMENTA) for update in range(UPDATES)]
    with jax.enable_x64(True):
        others = [by_numpy(rule, hypers)] + ([by_optax(chain, hypers)] if chain else [])
        assert_equal(train(chosen, hypers), *others)


def test_lars_without_decay_at_a_constant_rate_is_optax_lars():
    hypers = [{"learning_rate": 0.1, "momentum": 0.9}] * UPDATES
    chain = lambda h: optax.lars(  # noqa: E731
        h["learning_rate"],
        momentum=h["momentum"],
        trust_coefficient=0.01,
        trust_ratio_mask=kernels_mask,
    )
    with jax.enable_x64(True):
        states = train(optimizer.Lars(trust_coefficient=0.01), hypers)
        assert_equal(states, by_optax(chain, hypers))


def test_lars_leaves_arrays_of_norm_zero_finite():
    with jax.enable_x64(True):
        params = {"kernel": jnp.zeros((2, 2))}
        transformation = optimizer.Lars(weight_decay=0.1).transformation()
        gradients = {"kernel": jnp.full((2, 2), 3.0)}
        state = transformation.init(params)
        state.hyperparams["learning_rate"] = jnp.asarray(0.5)
        changes, _ = transformation.update(gradients, state, params)
    np.testing.assert_allclose(changes["kernel"], -1.5)


def test_the_policy_may_move_b1_b2_and_eps():
    moved = {
        "b1": np.where(np.arange(UPDATES) < 20, 0.9, 0.8),
        "b2": np.where(np.arange(UPDATES) < 20, 0.99, 0.98),
        "eps": np.where(np.arange(UPDATES) < 20, 1e-3, 7e-4),
    }
    hypers = [hyper_at(update, **moved) for update in range(UPDATES)]

    def rule(name, w, g, slots, hyper, t):
        settings = {column: hyper[column] for column in moved}
        return w - hyper["learning_rate"] * adam_direction(g, slots, t, **settings)

    with jax.enable_x64(True):
        assert_equal(train(optimizer.Adam(), hypers), by_numpy(rule, hypers))


def test_clipping_bounds_the_mean_gradient_and_not_the_decay():
    hypers = [hyper_at(update, MOMENTA) for update in range(UPDATES)]
    norms = []

    def clipped(params, update, limit=1.2):
        g = gradient(params, update)
        norms.append(np.sqrt(sum(np.sum(leaf**2) for leaf in g.values())))
        return {name: leaf * min(1, limit / norms[-1]) for name, leaf in g.items()}

    params, velocity, trajectory = {"bias": BIAS, "kernel": KERNEL}, {"bias": 0, "kernel": 0}, []
    for update in range(UPDATES):
        g, h = clipped(params, update), hypers[update]
        velocity = {n: h["momentum"] * velocity[n] + g[n] + DECAY * params[n] for n in params}
        params = {n: params[n] - h["learning_rate"] * velocity[n] for n in params}
        trajectory.append(params)
    assert min(norms) < 1.2 < max(norms)
    with jax.enable_x64(True):
        chosen = optimizer.Momentum(weight_decay=DECAY, clip_norm=1.2)
        assert_equal(train(chosen, hypers), trajectory)


def test_the_average_is_the_weighted_mean_over_examples():
    hypers = [hyper_at(update) for update in range(UPDATES)]
    with jax.enable_x64(True):
        states = train(optimizer.Sgd(average_examples=40.0), hypers)
        averages = [transformations.evaluation_params(s.optimizer, s.params) for s in states]
    for update in (0, 1, 10, UPDATES - 1):
        ages = EXAMPLES * np.arange(update, -1, -1)
        weights = np.exp(-ages / 40.0) / np.exp(-ages / 40.0).sum()
        for name in ("bias", "kernel"):
            history = np.stack([np.asarray(s.params[name]) for s in states[: update + 1]])
            expected = np.tensordot(weights, history, 1)
            np.testing.assert_allclose(averages[update][name], expected, rtol=1e-12)


def test_an_average_over_updates_of_two_sizes_forgets_by_examples():
    """Two updates of 8 and one of 16 examples forget the past alike."""
    with jax.enable_x64(True):
        average = transformations.average_parameters(20.0)
        params, zero = {"w": jnp.asarray(1.0)}, {"w": jnp.asarray(0.0)}
        many = few = average.update(zero, average.init(params), params, num_examples=8)[1]
        moved = {"w": jnp.asarray(5.0)}
        for _ in range(2):
            many = average.update(zero, many, moved, num_examples=8)[1]
        few = average.update(zero, few, moved, num_examples=16)[1]
    np.testing.assert_allclose(many.average["w"], few.average["w"], rtol=1e-14)
    np.testing.assert_allclose(many.weight, -np.expm1(-24 / 20), rtol=1e-14)


def test_evaluation_uses_the_average():
    with jax.enable_x64(True):
        chosen = optimizer.Momentum(average_examples=40.0)
        state = train(chosen, [hyper_at(update, MOMENTA) for update in range(UPDATES)])[-1]
        average = jax.device_get(transformations.evaluation_params(state.optimizer, state.params))
        mesh = step.data_mesh(jax.devices()[:1])
        examples = {"x": INPUTS[0], "y": TARGETS[0], "weight": np.ones(EXAMPLES)}
        rule = rule_of(chosen, [hyper_at(0, MOMENTA)])
        sums = step.evaluate(state, examples, task=tiny_task(), optimizer=rule, mesh=mesh)
    out = np.tanh(INPUTS[0] @ average["kernel"] + average["bias"])
    np.testing.assert_allclose(sums["loss"], [np.sum((out - TARGETS[0]) ** 2)], rtol=1e-12)
    assert np.abs(average["kernel"] - np.asarray(state.params["kernel"])).max() > 1e-3


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_every_state_survives_a_checkpoint(name, tmp_path):
    chosen = optimizer.OPTIMIZERS[name](weight_decay=0.1, clip_norm=1.0, average_examples=9.0)
    transformation = chosen.transformation()
    params = {"bias": jnp.zeros(3), "kernel": jnp.ones((4, 3))}

    def state_after(gradient_scale):
        state = transformation.init(params)
        gradients = jax.tree.map(lambda leaf: gradient_scale * jnp.ones_like(leaf), params)
        _, state = transformation.update(gradients, state, params, num_examples=4.0)
        return step.State(params, {}, state)

    saved, target = state_after(1.0), state_after(-0.5)
    saved.optimizer.hyperparams["learning_rate"] += 0.25
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, saved, {"run": "this one"})
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(target).state
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    jax.tree.map(np.testing.assert_array_equal, restored, saved)
