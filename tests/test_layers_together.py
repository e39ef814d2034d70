"""Layers that several devices compute together, each some heads and some features of a matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bigbatch
from bigbatch.commands.compile import read
from bigbatch.config.config import read_config
from bigbatch.engine import layers
from bigbatch.engine.optimizer import OPTIMIZERS
from bigbatch.engine.task import Task
from bigbatch.errors import UserError
from bigbatch.training.evaluate import evaluate
from bigbatch.training.loop import updates
from bigbatch.workdir.packing import on_host
from tests import test_language_training, test_parts
from tests import trained as configured
from tests.test_parts import prepared, trained

TOGETHER = {"layer": 4, "model": 2}
MODEL = {"name": "transformer", "vocabulary": 256, "width": 16, "heads": 4, "layers": 2}


def language(shard, devices=8, **changes):
    """A transformer over a growing batch, with clipping, averages and a mask; in float64."""
    optimizer = {"name": "adamw", "weight_decay": 0.1, "decayed": "kernels", "clip_norm": 0.5}
    model = MODEL | {"dtype": "float64", "remat": True} | changes.pop("model", {})
    tree = test_language_training.TREE | {
        "reproducible": False,
        "optimizer": optimizer | {"average_examples": 100.0},
        "model": model,
        "shard": shard,
        "microbatch_examples_per_device": 2,
        "ghost_batch_examples": 2,
    }
    return configured.prepared(read_config(tree | changes), devices)


def after(run):
    """The state at the end, every update's loss, and an evaluation."""
    done = list(updates(run, run.init_state(), 0))
    state = done[-1][1]
    losses = [float(sums["loss"]) for _, _, sums in done]
    return jax.tree.map(on_host, state._replace(copy=None)), losses, evaluate(run, state)


@pytest.mark.parametrize(
    ("shards", "model"),
    [
        ({8: [TOGETHER]}, {}),
        pytest.param(
            # Six divides no matrix of a block: all of each is on every device.
            {
                8: [{"layer": 8, "model": 2}, {"layer": 4, "model": 4}, {"layer": 2, "model": 2}],
                6: [{"layer": 6, "model": 2}],
            },
            {"tied": False, "activation": "gelu", "qk_norm": False, "remat": False},
            marks=pytest.mark.long,
        ),
    ],
)
def test_the_numbers_are_those_of_a_whole_state(shards, model):
    with jax.enable_x64(True):
        expected = after(language("none", model=model))
        for devices, shard in ((n, shard) for n in shards for shard in shards[n]):
            found = after(language(shard, devices, model=model))
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12),
                found,
                expected,
            )


def test_a_network_of_one_s_own(monkeypatch):
    """Its first matrix by columns, though it lies by rows, the second by rows."""
    shapes = {"up": (8, 4), "bias": (4,), "down": (4, 2)}

    def init(key):
        return {name: jax.random.normal(key, shape) for name, shape in shapes.items()}, {}

    def apply(params, statistics, examples, train):
        part = lambda name, axis: bigbatch.whole(params[name], shapes[name], together=axis)  # noqa: E731
        x = layers.all_examples(jnp.tile(examples["x"], 2))
        hidden = jnp.tanh(x @ part("up", -1) + part("bias", 0))
        return jnp.sum(layers.own_examples(hidden @ part("down", 0)), axis=1), {}

    monkeypatch.setattr(test_parts, "TASK", Task(init, apply, test_parts.loss))
    with jax.enable_x64(True):
        whole, *others = (
            trained(prepared(OPTIMIZERS["lamb"](clip_norm=0.1), "lamb", shard=shard))
            for shard in ("none", TOGETHER, {"layer": 4, "model": 4}, {"layer": 2, "model": 2})
        )
    for found in others:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), found, whole
        )


@pytest.mark.parametrize(
    ("begins", "ends", "words"),
    [
        (False, False, "task.apply: .*layers in parts begin with all_examples and end with own_ex"),
        (False, True, r"shard: .*begin with all_examples and end with own_examples \(ValueError"),
        (True, False, r"shard: .*begin with all_examples and end with own_examples \(TypeError"),
    ],
)
def test_a_layer_in_parts_without_its_ends_is_refused(monkeypatch, begins, ends, words):
    """With one example a device, whose numbers would be added to those of two."""
    shapes = {"up": (4, 8), "down": (8, 4)}

    def init(key):
        return {name: jnp.ones(shape) for name, shape in shapes.items()}, {}

    def apply(params, statistics, examples, train):
        x = examples["x"]
        y = layers.all_examples(x) if begins else x
        for name, axis in (("up", 1), ("down", 0)):
            y = y @ bigbatch.whole(params[name], shapes[name], together=axis)
        return jnp.sum(x + (layers.own_examples(y) if ends else y), axis=1), {}

    monkeypatch.setattr(test_parts, "TASK", Task(init, apply, test_parts.loss))
    with pytest.raises(UserError, match=words):
        prepared(OPTIMIZERS["sgd"](), "sgd", shard=TOGETHER, microbatch=1)


def test_axes_of_the_same_name_in_other_meshes_are_not_ours():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    call = functools.partial(bigbatch.whole, shape=(4, 6), together=1)
    spread = jax.shard_map(call, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)
    assert spread(jnp.ones((4, 6))).shape == (4, 6)


def test_what_moves_over_which_devices():
    """Matrices over a half of those that have one copy, activations over the other."""
    axes = {"data": 2, "fsdp": 2, "model": 2}
    run = language(TOGETHER, model={"dtype": "float32", "layers": 1})
    moved = {}
    for each in read.collectives(max(run.programs.accumulate.items())[1].as_text(), axes):
        key = each["kind"], each["over"]
        moved[key] = moved.get(key, 0) + each["bytes"]
    assert not [over for _, over in moved if "data" in over]
    # Seven matrices; those that are cut along the other axis are exchanged first.
    params = run.programs.state_shapes.params
    block = sum(leaf.size for leaf in jax.tree.leaves(params["blocks"]) if leaf.ndim == 2)
    half = 4 * block // 2
    # And again for the gradient, which the CPU's compiler finds to be the same.
    assert half <= moved["all-gather", "fsdp"] <= 2 * half
    assert moved["reduce-scatter", "fsdp"] == half // 2
    # Two examples of 16 positions from each: into and out of both halves of a block.
    activations = 4 * 2 * 2 * 16 * MODEL["width"]
    assert moved["all-gather", "model"] >= 2 * activations
    assert moved["reduce-scatter", "model"] >= 2 * activations // 2
    rest = {over for kind, over in moved if kind not in ("all-gather", "reduce-scatter")}
    assert rest <= {"model"}
    (over_data,) = (
        each
        for each in read.collectives(run.programs.apply_update.as_text(), axes)
        if each["over"] == "data" and each["bytes"] > 1000
    )
    parts = sum(4 * leaf.size for leaf in jax.tree.leaves(params) if any(leaf.sharding.spec)) // 4
    assert over_data["kind"] == "all-reduce"
    assert over_data["bytes"] == pytest.approx(parts, rel=0.05)


@pytest.mark.parametrize(
    ("shard", "changes", "words"),
    [
        ({"layer": 4, "model": 3}, {}, r"shard: given .*; beside it may be 'model', one that div"),
        ({"layer": 4, "model": "all"}, {}, r"shard: given \{'layer': 4, 'model': 'all'\}"),
        ({"model": 2}, {}, r"shard: given \{'model': 2\}"),
        ({"layer": 4, "model": True}, {}, r"shard: given \{'layer': 4, 'model': True\}"),
        ({"layer": True}, {}, r"shard: given \{'layer': True\}"),
        ({"layer": 4.5}, {}, r"shard: given \{'layer': 4.5\}; nearest: \{'layer': 4\}"),
        (
            TOGETHER,
            {"reproducible": True},
            r"shard: .*nearest: \{'layer': 4\}; .*by itself with reproducibl",
        ),
        (
            TOGETHER,
            {"noise_small_batch_examples": 2},
            "shard: .*by itself .* where the gradient noise is measured",
        ),
        (
            {"layer": 8, "model": 8},
            {},
            r"shard: given .8 devices as 'model'.; .* a divisor of 4 heads and of 48",
        ),
    ],
)
def test_what_cannot_be_is_refused(shard, changes, words):
    with pytest.raises(UserError, match=words):
        language(shard, model={"dtype": "float32"}, **changes)


def test_a_network_without_such_layers_is_refused():
    with pytest.raises(UserError, match=r"shard: .*whose layers several devices compute together"):
        prepared(OPTIMIZERS["sgd"](), "sgd", shard=TOGETHER)
