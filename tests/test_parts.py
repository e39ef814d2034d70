"""Arrays in parts: the numbers of whole ones, their collectives, their memory."""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bigbatch
from bigbatch.engine import functions as step
from bigbatch.engine.optimizer import OPTIMIZERS, arguments
from bigbatch.engine.parts import Parts
from bigbatch.engine.task import Task
from bigbatch.errors import UserError
from bigbatch.schedule.adaptive.gradient_noise import BIG_SQUARE, SMALL_SQUARES
from bigbatch.training.loop import updates
from bigbatch.training.prepare import prepare
from tests import optimizers
from tests.hlo import collectives, moved
from tests.trained import config

DEVICES = 8
EXAMPLES = 96
# In 8 parts, in 4, and whole on each device.
SHAPES = {"kernel": (4, 7), "bias": (7,), "square": (8, 8), "scalar": ()}


def plan(name):
    """Updates of 16 and then of 48, with momentum where the optimizer has one."""
    momentum = 0.9 if "momentum" in arguments(OPTIMIZERS[name].links) else 0.0
    recipe = bigbatch.step_decay(0.05, 16, momentum, boundaries_epochs=[1], factor=1 / 3)
    growing = bigbatch.grow_batch(recipe, max_batch_size=48)
    return bigbatch.make_plan(growing, train_examples=EXAMPLES, epochs=3)


def init(key):
    keys = jax.random.split(key, len(SHAPES))
    named = zip(keys, SHAPES.items(), strict=True)
    return {name: jax.random.normal(k, shape) for k, (name, shape) in named}, {}


def outputs(params, x):
    hidden = jnp.tanh(x @ params["kernel"] + params["bias"])
    hidden = jnp.pad(hidden, ((0, 0), (0, 1))) @ params["square"]
    return jnp.sum(hidden, axis=1) * params["scalar"]


def apply(params, statistics, examples, train):
    params = {name: bigbatch.whole(param, SHAPES[name]) for name, param in params.items()}
    return outputs(params, examples["x"]), {}


def loss(outputs, examples):
    weight = examples["weight"].astype(outputs.dtype)
    return {"loss": weight @ (outputs - examples["y"]) ** 2, "count": jnp.sum(weight)}


TASK = Task(init=init, apply=apply, loss=loss)


def prepared(optimizer, name, *, shard, devices=DEVICES, microbatch=2, **options):
    generator = np.random.default_rng(0)
    # The threads that make microbatches know nothing of this one's 64-bit mode.
    x = generator.normal(size=(EXAMPLES, 4)).astype(np.float32)
    arrays = {"x": x, "y": generator.normal(size=EXAMPLES).astype(np.float32)}
    return prepare(
        TASK,
        arrays,
        plan(name),
        optimizer,
        microbatch_examples_per_device=microbatch,
        shard=shard,
        mesh=step.data_mesh(jax.devices()[:devices]),
        **options,
    )


def trained(run):
    """Parameters and optimizer state at the end, in their own shapes, and what was measured."""
    names, done = (SMALL_SQUARES, BIG_SQUARE, "loss"), list(updates(run, run.init_state(), 0))
    history = [[float(sums[name]) for name in names if name in sums] for _, _, sums in done]
    return jax.tree.map(np.asarray, done[-1][1]._replace(copy=None)), history


def held_bytes(tree):
    """Of a device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


OWN_LION = optimizers.OWN["lion"][1]

# What these three do is part of what the others do.
SIMPLER = ("sgd", "momentum", "adam")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long if n in SIMPLER else ()) for n in OPTIMIZERS]
)
def test_an_optimizer_in_parts_gives_the_numbers_of_a_whole_one(name):
    in_twos = {"ghost_batch_examples": 2, "noise_small_batch_examples": 2}
    with jax.enable_x64(True):
        optimizer = OPTIMIZERS[name](
            weight_decay=0.01, decayed="kernels", clip_norm=0.5, average_examples=100.0
        )
        (expected, measured), (found, history) = (
            trained(prepared(optimizer, name, shard=shard, **in_twos))
            for shard in ("none", "update")
        )
        start = prepared(optimizer, name, shard="none").init_state()
    np.testing.assert_allclose(history, measured, rtol=1e-10)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        other = dict(jax.tree_util.tree_leaves_with_path(found))[path]
        np.testing.assert_allclose(other, leaf, rtol=0, atol=1e-10, err_msg=str(path))
    assert np.max(np.abs(expected.params["kernel"] - np.asarray(start.params["kernel"]))) > 1e-3


@pytest.mark.parametrize("name", optimizers.OWN)
def test_any_optimizer_in_parts_gives_its_numbers(name):
    """Matrix products and factored moments among them."""
    plan, optimizer, _ = optimizers.OWN[name]
    with jax.enable_x64(True):
        rule = optimizers.rule_of(optimizer, plan)
        expected, expected_sums = optimizers.trained(rule, plan)
        devices = 2 if name == "muon" else 4
        found, sums = optimizers.trained(rule, plan, devices=devices, shard="update")
        squares = [
            leaf for leaf in jax.tree.leaves(found._replace(copy=())) if leaf.shape == (8, 8)
        ]
        assert len(squares) > 0
        assert all(held_bytes(leaf) * devices == leaf.nbytes for leaf in squares)
        optimizers.assert_close(found.copy, expected.params)
        optimizers.assert_close(found._replace(copy=None), expected)
        optimizers.assert_close(sums, expected_sums)
        evaluated = optimizers.jit(rule.evaluation_params)(found.optimizer, found.params)
        whole = rule.evaluation_params(expected.optimizer, expected.params)
        optimizers.assert_close(evaluated, whole)


def test_a_sign_of_a_gradient_that_is_not_finite_is_noticed(monkeypatch):
    """Lion's step is finite even then, and so are the new parameters."""
    monkeypatch.setattr(optimizers, "TARGETS", np.full_like(optimizers.TARGETS, np.inf))
    with jax.enable_x64(True):
        rule = optimizers.rule_of(OWN_LION)
        for devices, shard in ((1, "none"), (2, "update")):
            _, sums = optimizers.trained(rule, devices=devices, shard=shard, updates=1)
            assert sums["gradient_is_finite"] == 0


@given(shape=st.lists(st.integers(0, 48), max_size=4), devices=st.integers(1, DEVICES))
def test_an_array_is_cut_along_the_largest_axis_that_the_devices_divide(shape, devices):
    parts = Parts(step.data_mesh(jax.devices()[:devices]), "update")
    sharding = jax.NamedSharding(parts.mesh, parts.spec(tuple(shape)))
    part = sharding.shard_shape(tuple(shape))
    cuts = [size // max(own, 1) for size, own in zip(shape, part, strict=True) if size != own]
    assert cuts == [] or math.prod(part) > 1
    whole = [size for size in shape if size % devices == 0]
    if whole and 1 < devices < math.prod(shape):
        assert cuts == [devices]
        assert max(whole) in [s for s, own in zip(shape, part, strict=True) if s != own]
    else:
        # Each prime factor of the devices cuts an axis that it divides, while there is one.
        assert devices % math.prod(cuts) == 0
        left = devices // math.prod(cuts)
        for factor in (2, 3, 5, 7):
            fits = math.prod(part) > factor and any(own % factor == 0 for own in part)
            assert left % factor or not fits
    assert Parts(parts.devices).spec(tuple(shape)) == step.REPLICATED


def test_each_sum_is_scattered_once_and_each_parameter_gathered_once():
    clipped = prepared(OPTIMIZERS["adam"](clip_norm=1.0), "adam", shard="update")
    assert all(collectives(program) == {} for program in clipped.programs.accumulate.values())
    assert collectives(clipped.programs.evaluate) == {}
    found = moved(clipped.programs.apply_update)
    # The square in 8 parts, the kernel in 4.
    assert found["reduce-scatter"] == 4 * (64 + 28)
    assert found["all-gather"] == 4 * (64 + 28)
    # A quarter of the kernel, the bias, the scalar, sums in two parts, norms.
    assert found["all-reduce"] < 4 * (7 + 7 + 24)


def test_the_old_name_is_refused_with_the_new_one():
    with pytest.raises(UserError, match=r"shard_optimizer: given True; nearest: 'shard'"):
        config(shard_optimizer=True)


def test_planted_faults_are_found():
    """A sum in accumulate; a gather too many."""
    add = step.add

    def waits(total, addend):
        return add(total, addend._replace(ghost_batches=jax.lax.psum(addend.ghost_batches, "data")))

    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        patch.setattr(step, "add", waits)
        run = prepared(OPTIMIZERS["sgd"](), "sgd", shard="update", batch_sizes=[16])
    (accumulate,) = run.programs.accumulate.values()
    assert set(collectives(accumulate)) == {"all-reduce"}

    def whole_velocity(learning_rate):
        whole = jax.NamedSharding(run.mesh, step.REPLICATED)
        spread = lambda tree: jax.lax.with_sharding_constraint(tree, whole)  # noqa: E731
        gathers = optax.stateless(lambda updates, params: spread(updates))
        return optax.chain(gathers, optax.sgd(learning_rate))

    with jax.enable_x64(True):
        faulty = prepared(whole_velocity, "sgd", shard="update", batch_sizes=[16])
    twice = moved(faulty.programs.apply_update)["all-gather"]
    assert twice == 2 * moved(run.programs.apply_update)["all-gather"]


def test_a_device_holds_its_parts_and_the_copy_that_it_computes_with():
    with jax.enable_x64(True):
        run = prepared(OPTIMIZERS["adam"](average_examples=9.0), "adam", shard="update")
        state = run.init_state()
    elements = {name: int(np.prod(shape)) for name, shape in SHAPES.items()}
    parts = 28 // 4 + 7 + 64 // 8 + 1
    # Adam's two averages and that of the parameters; its count, the average's weight, the rates.
    small = sum(leaf.nbytes for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim == 0)
    small -= 3 * 8
    assert held_bytes(state.params) == 8 * parts
    assert held_bytes(state.copy) == 8 * sum(elements.values())
    assert held_bytes(state.optimizer) == 3 * 8 * parts + small


def test_a_state_goes_to_another_number_of_devices():
    """As in a checkpoint: after some updates on 8 devices in parts to 4, and on to the end."""
    with jax.enable_x64(True):
        optimizer = OPTIMIZERS["lamb"](weight_decay=0.01, average_examples=50.0)
        runs = [
            prepared(optimizer, "lamb", shard=shard, devices=devices)
            for devices, shard in ((8, "update"), (4, "update"), (4, "none"))
        ]
        expected, _ = trained(runs[0])
        remaining = updates(runs[0], runs[0].init_state(), 0)
        state = next(state for row, state, _ in remaining if row.update == 6)
        saved = jax.tree.map(np.asarray, state._replace(copy=None))
        remaining.close()
        for run in runs[1:]:
            *_, (_, state, _) = updates(run, run.on_devices(saved), 7)
            optimizers.assert_close(state._replace(copy=None), expected)


def test_clipped_updates_of_a_matrix_in_parts_are_the_same_bits(monkeypatch):
    """Fused, one of two products is rounded before they are added, by the length of the array."""

    def init(key):
        return {"kernel": jax.random.normal(key, (16, 32)) / 4, "out": jnp.ones(32) / 6}, {}

    def apply(params, statistics, examples, train):
        return jnp.tanh(jnp.tile(examples["x"], 4) @ params["kernel"]) @ params["out"], {}

    monkeypatch.setattr(sys.modules[__name__], "TASK", Task(init, apply, loss))
    (whole, _), (parts, _) = (
        trained(prepared(OPTIMIZERS["adamw"](clip_norm=1.0), "adamw", shard=s, reproducible=True))
        for s in ("none", "update")
    )
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
