"""The divided optimizer state: the numbers of the undivided one, its collectives, its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bigbatch
from bigbatch.engine import functions as step
from bigbatch.engine.optimizer import OPTIMIZERS, arguments
from bigbatch.engine.sharded_optimizer import Parts
from bigbatch.engine.task import Task
from bigbatch.schedule.adaptive.gradient_noise import BIG_SQUARE, SMALL_SQUARES
from bigbatch.training.loop import updates
from bigbatch.training.prepare import prepare
from tests import optimizers
from tests.hlo import collectives

DEVICES = 8
EXAMPLES = 96
# Arrays of several ranks, none but one of a length that 8 divides.
SHAPES = {"kernel": (3, 7), "bias": (7,), "square": (8, 8), "scalar": ()}


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


def apply(params, statistics, examples, train):
    hidden = jnp.tanh(examples["x"] @ params["kernel"] + params["bias"])
    hidden = jnp.pad(hidden, ((0, 0), (0, 1))) @ params["square"]
    return jnp.sum(hidden, axis=1) * params["scalar"], {}


def loss(outputs, examples):
    weight = examples["weight"].astype(outputs.dtype)
    return {"loss": weight @ (outputs - examples["y"]) ** 2, "count": jnp.sum(weight)}


TASK = Task(init=init, apply=apply, loss=loss)


def prepared(optimizer, name, *, shard_optimizer, devices=DEVICES, microbatch=2, **options):
    generator = np.random.default_rng(0)
    # The threads that make microbatches know nothing of this one's 64-bit mode.
    x = generator.normal(size=(EXAMPLES, 3)).astype(np.float32)
    arrays = {"x": x, "y": generator.normal(size=EXAMPLES).astype(np.float32)}
    return prepare(
        TASK,
        arrays,
        plan(name),
        optimizer,
        microbatch_examples_per_device=microbatch,
        shard_optimizer=shard_optimizer,
        mesh=step.data_mesh(jax.devices()[:devices]),
        **options,
    )


def trained(run):
    """Parameters and optimizer state at the end, in their own shapes, and what was measured."""
    names, done = (SMALL_SQUARES, BIG_SQUARE, "loss"), list(updates(run, run.init_state(), 0))
    history = [[float(sums[name]) for name in names if name in sums] for _, _, sums in done]
    return jax.tree.map(np.asarray, run.programs.unite(done[-1][1])), history


def held_bytes_per_device(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


OWN_LION = optimizers.OWN["lion"][1]

# What these three do is part of what the others do.
SIMPLER = ("sgd", "momentum", "adam")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long if n in SIMPLER else ()) for n in OPTIMIZERS]
)
def test_the_divided_optimizer_gives_the_numbers_of_the_undivided_one(name):
    in_twos = {"ghost_batch_examples": 2, "noise_small_batch_examples": 2}
    with jax.enable_x64(True):
        optimizer = OPTIMIZERS[name](
            weight_decay=0.01, decayed="kernels", clip_norm=0.5, average_examples=100.0
        )
        (expected, measured), (found, history) = (
            trained(prepared(optimizer, name, shard_optimizer=divided, **in_twos))
            for divided in (False, True)
        )
        start = prepared(optimizer, name, shard_optimizer=False).init_state()
    np.testing.assert_allclose(history, measured, rtol=1e-10)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        other = dict(jax.tree_util.tree_leaves_with_path(found))[path]
        np.testing.assert_allclose(other, leaf, rtol=0, atol=1e-10, err_msg=str(path))
    assert np.max(np.abs(expected.params["kernel"] - np.asarray(start.params["kernel"]))) > 1e-3


@pytest.mark.parametrize("name", optimizers.OWN)
def test_any_optimizer_divided_gives_its_numbers(name):
    """Matrix products and factored moments among them; the state's arrays lie in parts."""
    plan, optimizer, _ = optimizers.OWN[name]
    with jax.enable_x64(True):
        rule = optimizers.rule_of(optimizer, plan)
        expected, expected_sums = optimizers.trained(rule, plan)
        devices = 2 if name == "muon" else 4
        found, sums = optimizers.trained(rule, plan, devices=devices, parts=Parts)
        large = [leaf for leaf in jax.tree.leaves(found.optimizer) if leaf.size > 1]
        assert all(leaf.addressable_shards[0].data.size * devices == leaf.size for leaf in large)
        evaluated = optimizers.jit(rule.evaluation_params)(found.optimizer, found.params)
        united = optimizers.jit(Parts(rule, step.data_mesh(jax.devices()[:devices])).unite)(found)
        optimizers.assert_close(united, expected)
        optimizers.assert_close(sums, expected_sums)
        whole = rule.evaluation_params(expected.optimizer, expected.params)
        optimizers.assert_close(evaluated, whole)


def test_a_sign_of_a_gradient_that_is_not_finite_is_noticed(monkeypatch):
    """Lion's step is finite even then, and so are the new parameters."""
    monkeypatch.setattr(optimizers, "TARGETS", np.full_like(optimizers.TARGETS, np.inf))
    with jax.enable_x64(True):
        rule = optimizers.rule_of(OWN_LION)
        for parts in (None, Parts):
            devices = 1 if parts is None else 2
            _, sums = optimizers.trained(rule, devices=devices, parts=parts, updates=1)
            assert sums["gradient_is_finite"] == 0


def test_parameters_that_are_single_numbers_are_not_divided():
    with jax.enable_x64(True):
        parts = Parts(optimizers.rule_of(OWN_LION), step.data_mesh(jax.devices()[:2]))
    (problem,) = parts.problems({"scale": jnp.ones(())})
    assert problem.field == "shard_optimizer"
    assert parts.problems({"scale": jnp.ones(()), "bias": jnp.ones(3)}) == []


def test_one_reduce_scatter_and_one_all_gather_carry_all_arrays():
    plain = prepared(OPTIMIZERS["adam"](), "adam", shard_optimizer=True)
    clipped = prepared(OPTIMIZERS["adam"](clip_norm=1.0), "adam", shard_optimizer=True)
    expected = {"reduce-scatter": 1, "all-gather": 1, "all-reduce": 1}
    assert collectives(plain.programs.apply_update) == expected
    assert all(collectives(program) == {} for program in plain.programs.accumulate.values())
    # The global norm, a single number.
    assert collectives(clipped.programs.apply_update) == expected | {"all-reduce": 2}


def test_a_device_holds_its_part_of_the_state_only():
    with jax.enable_x64(True):
        run = prepared(OPTIMIZERS["adam"](average_examples=9.0), "adam", shard_optimizer=True)
        divided = run.init_state()
        whole = run.programs.unite(divided)
    params = sum(int(np.prod(shape)) for shape in SHAPES.values())
    parts = sum(-(-int(np.prod(shape)) // DEVICES) for shape in SHAPES.values())
    saved = held_bytes_per_device(whole.optimizer) - held_bytes_per_device(divided.optimizer)
    # Adam's two averages and that of the parameters.
    assert saved == 3 * 8 * (params - parts)


def test_a_state_goes_to_another_number_of_devices():
    """As in a checkpoint: after some updates on 8 devices to 4, and on to the end."""
    with jax.enable_x64(True):
        optimizer = OPTIMIZERS["lamb"](weight_decay=0.01, average_examples=50.0)
        eight, four = (
            prepared(optimizer, "lamb", shard_optimizer=True, devices=devices) for devices in (8, 4)
        )
        expected, _ = trained(eight)
        remaining = updates(eight, eight.init_state(), 0)
        state = next(state for row, state, _ in remaining if row.update == 6)
        saved = jax.tree.map(np.asarray, eight.programs.unite(state))
        remaining.close()
        replicated = jax.NamedSharding(four.mesh, step.REPLICATED)
        moved = four.programs.divide(jax.device_put(saved, replicated))
        *_, (_, state, _) = updates(four, moved, 7)
        found = jax.tree.map(np.asarray, four.programs.unite(state))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)
