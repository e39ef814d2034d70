"""Parameters that are whole only while a layer computes: the numbers, the bits, what is refused."""

import functools
import itertools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bigbatch
from bigbatch.commands.compile import read
from bigbatch.config.config import read_config
from bigbatch.engine.optimizer import OPTIMIZERS
from bigbatch.engine.parts import Layers
from bigbatch.engine.task import Task
from bigbatch.errors import UserError
from bigbatch.training import prepare as preparing
from bigbatch.training.evaluate import evaluate
from bigbatch.training.fitting import shard_that_fits
from bigbatch.training.loop import updates
from bigbatch.training.programs import held_bytes as held_bytes_of
from bigbatch.training.progress import memory_line
from bigbatch.workdir.packing import on_host, sha256
from tests import optimizers, test_language_training, test_parts
from tests import trained as configured
from tests.own import layers
from tests.test_distributed import ended, free_port, start
from tests.test_parts import SHAPES, held_bytes, prepared, trained

SMALL_BATCHES = {"ghost_batch_examples": 2, "noise_small_batch_examples": 2}
LAYERS = [{"layer": devices} for devices in (2, 4, 8)]


def optimizer(name):
    return OPTIMIZERS[name](
        weight_decay=0.01, decayed="kernels", clip_norm=0.5, average_examples=100.0
    )


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long if n != "lamb" else ()) for n in OPTIMIZERS]
)
def test_an_optimizer_gives_the_numbers_of_a_whole_state(name):
    """With clipping, averages, a mask and the noise, over a growing batch."""
    with jax.enable_x64(True):
        expected, measured = trained(prepared(optimizer(name), name, shard="none", **SMALL_BATCHES))
        for shard in LAYERS:
            run = prepared(optimizer(name), name, shard=shard, **SMALL_BATCHES)
            found, history = trained(run)
            np.testing.assert_allclose(history, measured, rtol=1e-10)
            optimizers.assert_close(found, expected)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.long if n != "muon" else ()) for n in optimizers.OWN],
)
def test_any_optimizer_gives_its_numbers(name):
    plan, own, _ = optimizers.OWN[name]
    with jax.enable_x64(True):
        rule = optimizers.rule_of(own, plan)
        expected, expected_sums = optimizers.trained(rule, plan)
        found, sums = optimizers.trained(rule, plan, devices=4, shard=Layers(2))
        optimizers.assert_close(found, expected)
        optimizers.assert_close(sums, expected_sums)


@pytest.mark.parametrize("noise", [None, 2])
def test_many_units_of_a_call_and_what_rounding_leaves(noise, monkeypatch):
    """A loop over units of which a device may have none, while others wait for it."""
    monkeypatch.setattr(preparing, "_COMPENSATED_ADDENDS", 1)
    options = {"microbatch": 20, "ghost_batch_examples": 2, "noise_small_batch_examples": noise}
    with jax.enable_x64(True):
        (expected, measured), (found, history) = (
            trained(prepared(optimizer("adam"), "adam", shard=shard, devices=4, **options))
            for shard in ("none", {"layer": 2})
        )
    np.testing.assert_allclose(history, measured, rtol=1e-10)
    optimizers.assert_close(found, expected)


def language(shard, devices):
    """A transformer in bfloat16 whose layers are computed twice, with exact sums."""
    tree = dict(test_language_training.TREE, shard=shard, noise_small_batch_examples=8)
    kinds = {"dtype": "bfloat16", "remat": True, "width": 16}
    return configured.prepared(read_config(tree | {"model": tree["model"] | kinds}), devices)


def bits(run, state, first_update=0, num_updates=None):
    """The state after some more updates, and a hash of it with what was measured."""
    done = updates(run, run.on_devices(state) if first_update else run.init_state(), first_update)
    done = list(itertools.islice(done, num_updates))
    saved = jax.tree.map(np.asarray, done[-1][1]._replace(copy=None))
    measured = [{n: v for n, v in sums.items() if n != "input_wait_s"} for _, _, sums in done]
    evaluated = evaluate(run, done[-1][1]) if run.data.test_examples else {}
    return saved, sha256((saved, measured)), evaluated


@pytest.mark.parametrize(
    ("shard", "devices"), [({"layer": 4}, 8), pytest.param({"layer": 2}, 2, marks=pytest.mark.long)]
)
def test_exact_sums_give_the_same_bits(shard, devices):
    options = SMALL_BATCHES | {"reproducible": True}
    (expected, measured), (found, history) = (
        trained(prepared(optimizer("adamw"), "adamw", shard=shard, devices=devices, **options))
        for shard, devices in (("none", 1), (shard, devices))
    )
    assert (sha256(found), history) == (sha256(expected), measured)


@pytest.mark.long
def test_a_transformer_has_the_same_bits_on_any_mesh_and_over_resumes():
    whole, expected, evaluated = bits(language("none", 1), None)
    begun, _, _ = bits(language("none", 1), None, num_updates=7)
    layered = [({"layer": size}, devices) for size, devices in [(8, 8), (2, 4), (2, 8), (4, 8)]]
    for number, (shard, devices) in enumerate([*layered, ("update", 4), ("none", 8)]):
        run = language(shard, devices)
        if number % 2:
            saved, _, found = bits(run, begun, 7)
            assert sha256(saved) == sha256(whole)
        else:
            _, digest, found = bits(run, None)
            assert digest == expected
        assert found.keys() == evaluated.keys()
        # Of other numbers of examples at a time, in bfloat16.
        np.testing.assert_allclose(list(found.values()), list(evaluated.values()), rtol=1e-4)


def test_what_the_network_of_the_guide_sends_over_the_devices_and_its_bits():
    """A parameter is gathered at most twice and scattered once, in a group; sums go over groups."""
    exact = {"reproducible": True, "microbatch_examples_per_device": 1}
    run = layers.prepare(**exact)
    hashes = {bits(each, None)[1] for each in (run, layers.prepare(**exact, shard="none"))}
    assert len(hashes) == 1
    params = run.programs.state_shapes.params
    cut = [leaf for leaf in jax.tree.leaves(params) if any(leaf.sharding.spec)]
    elements = sum(leaf.size for leaf in cut)
    matrices = sum(leaf.size for leaf in cut if leaf.ndim > 1)
    (accumulate,) = run.programs.accumulate.values()
    axes = {"data": 2, "fsdp": 4}
    moved = {}
    for each in read.collectives(accumulate.as_text(), axes):
        assert each["over"] == "fsdp"
        moved[each["kind"]] = moved.get(each["kind"], 0) + each["bytes"]
    assert moved.keys() == {"all-gather", "reduce-scatter"}
    # Three digits of four bytes, a quarter of each on a device.
    assert moved["reduce-scatter"] == 3 * 4 * elements // 4
    # On a CPU bfloat16 may travel as float32.
    assert 2 * matrices < moved["all-gather"] <= 2 * 4 * elements
    over = {}
    for each in read.collectives(run.programs.apply_update.as_text(), axes):
        assert each["kind"] == "all-reduce"
        over[each["over"]] = over.get(each["over"], 0) + each["bytes"]
    # Three parts too; beside them norms, counts, and what is whole on each device.
    summed = over.pop("data")
    assert 3 * 4 * elements // 4 <= summed < 1.05 * 3 * 4 * elements // 4
    assert sum(over.values()) < 0.1 * summed
    assert {each["over"] for each in read.collectives(run.programs.evaluate.as_text(), axes)} == {
        "fsdp"
    }


def test_a_device_holds_its_parts_only():
    with jax.enable_x64(True):
        run = prepared(OPTIMIZERS["adam"](), "adam", shard={"layer": 4})
        state, accumulator = run.init_state(), run.programs.empty_accumulator()
        shapes = run.programs.state_shapes
        told = held_bytes_of(run.task, run.optimizer, shapes[:2], run.mesh, False, Layers(4))
    assert state.copy is None
    parts = 28 // 4 + 7 + 64 // 4 + 1
    assert held_bytes(state.params) == held_bytes(accumulator.gradients) == 8 * parts
    # What is told before anything is compiled.
    assert told["params"] == told["sums of gradients"] == 8 * parts
    assert told["optimizer"] == held_bytes(state.optimizer)
    assert sum(told.values()) < held_bytes(state) + held_bytes(accumulator)


@pytest.mark.parametrize(
    ("held", "chosen"),
    [
        ({"none": 50, "update": 20, Layers(2): 30, Layers(4): 15}, "none"),
        ({"none": 51, "update": 50, Layers(2): 30, Layers(4): 15}, "update"),
        ({"none": 80, "update": 60, Layers(2): 51, Layers(4): 49}, Layers(4)),
        ({"none": 80, "update": 60, Layers(2): 70}, "update"),
    ],
)
def test_auto_takes_the_first_that_leaves_half_of_the_memory(held, chosen):
    mesh, asked = jax.make_mesh((1,), ("data",)), []

    def told(shard):
        asked.append(shard)
        return held[shard] * 2**20

    others = [shard for shard in held if shard != "none"]
    assert shard_that_fits(told, others, mesh, 100 * 2**20) == chosen
    assert asked == list(held)[: len(asked)]
    # Of a CPU nothing is known.
    assert shard_that_fits(told, others, mesh, None) == "none"


def test_auto_is_chosen_before_anything_is_compiled():
    """Adam's state and sums are four arrays like each parameter; F copies of it, one on eight."""
    with jax.enable_x64(True):
        elements = {size: 28 // size + 7 + 64 // size + 1 for size in (1, 4)}
        whole, in_parts = (4 * 8 * elements[size] for size in (1, 4))
        for memory, shard in ((2 * whole + 1000, "none"), (2 * in_parts + 500, Layers(4))):
            run = prepared(OPTIMIZERS["adam"](), "adam", shard="auto", device_memory_bytes=memory)
            assert run.programs.shard == shard
    assert "device, state in parts (shard {'layer': 4}); " in memory_line(run)


def on_host_after(shard, **options):
    """The state at the end of a run over all processes, and the last update's loss."""
    run = prepared(optimizer("lamb"), "lamb", shard=shard, **SMALL_BATCHES, **options)
    *_, (_, state, sums) = updates(run, run.init_state(), 0)
    return jax.tree.map(on_host, state._replace(copy=None)), float(sums["loss"])


@pytest.mark.long
@pytest.mark.parametrize("shard", ["update", *LAYERS], ids=str)
def test_two_processes_of_four_devices_train_what_one_does(shard, tmp_path):
    """A copy of eight parts lies on both."""
    address = f"localhost:{free_port()}"
    outs = [tmp_path / str(process) for process in range(2)]
    commands = [
        ["tests.layer_process", str(out), json.dumps(shard), address, "2", out.name] for out in outs
    ]
    for status, text in ended([start(command, 4) for command in commands], 900):
        assert status == 0, text
    with jax.enable_x64(True):
        state, loss = on_host_after("none")
        exact, exact_loss = on_host_after("none", reproducible=True)
    for out in outs:
        found = np.load(out.with_suffix(".npz"))
        for one, other in zip(
            found.values(), [loss, exact_loss, *jax.tree.leaves(state)], strict=True
        ):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-10)
        assert out.with_suffix(".txt").read_text() == sha256(exact)


class Wholes(nn.Module):
    """A Linen network whose layers get their parameters whole."""

    @nn.compact
    def __call__(self, x):
        for shapes in ({"kernel": (4, 8), "bias": (8,)}, {"kernel": (8, 4), "bias": (4,)}):
            made_whole = lambda tree, shapes=shapes: {  # noqa: E731
                "params": {
                    name: bigbatch.whole(part, shapes[name])
                    for name, part in tree.get("params", {}).items()
                }
            }
            dense = nn.map_variables(nn.Dense, "params", made_whole, init=self.is_initializing())
            x = jnp.tanh(dense(shapes["bias"][0])(x))
        return jnp.sum(x, axis=1)


def test_a_linen_network(monkeypatch):
    with jax.enable_x64(True):
        task = Task.from_linen(Wholes(), test_parts.loss)
        monkeypatch.setattr(test_parts, "TASK", task)
        (expected, _), (found, _) = (
            trained(prepared(OPTIMIZERS["sgd"](), "sgd", shard=shard, devices=4))
            for shard in ("none", {"layer": 2})
        )
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def as_parts(params):
    return params


def twice(params):
    return {
        n: bigbatch.whole(v, SHAPES[n]) + 0 * bigbatch.whole(v, SHAPES[n])
        for n, v in params.items()
    }


def also_as_parts(params):
    wholes = {name: bigbatch.whole(param, SHAPES[name]) for name, param in params.items()}
    return wholes | {"scalar": wholes["scalar"] + 0 * jnp.sum(params["square"])}


def of_other_shapes(params):
    return {name: bigbatch.whole(param, (16, *SHAPES[name][1:])) for name, param in params.items()}


@pytest.mark.parametrize(
    ("read_by", "words"),
    [
        (as_parts, r"shard: .*'update'; allowed: a network that calls .*whole once .*\(TypeError"),
        (twice, r"whole and whole of params\['kernel'\]"),
        (also_as_parts, r"whole and reduce_sum of params\['square'\]"),
        (of_other_shapes, r"an array of shape \(.*\(16,"),
    ],
)
def test_a_network_that_reads_parts_otherwise_is_refused(read_by, words, monkeypatch):
    def apply(params, statistics, examples, train):
        return test_parts.outputs(read_by(params), examples["x"]), {}

    monkeypatch.setattr(test_parts, "TASK", Task(test_parts.init, apply, test_parts.loss))
    with pytest.raises(UserError, match=words):
        prepared(OPTIMIZERS["sgd"](), "sgd", shard={"layer": 4})


def scanned(params, x):
    """As many layers as a part has rows where noise is measured, in two arrays."""
    shape = params["kernel"].shape[-1:] * 2
    call = lambda x, kernel: (jnp.tanh(x @ bigbatch.whole(kernel, shape)), None)  # noqa: E731
    return jax.lax.scan(call, x, params["kernel"])[0]


def mapped(params, x):
    shape = (8, 8)
    call = lambda kernel: jnp.tanh(x @ bigbatch.whole(kernel, shape))  # noqa: E731
    return jnp.sum(jax.vmap(call)(params["kernel"]), axis=0)


@pytest.mark.parametrize("network", [scanned, mapped])
def test_layers_in_a_scan_or_a_vmap(network, monkeypatch):
    """They are computed; where they would take the rows beside a part for layers they are not."""

    def init(key):
        return {"kernel": jax.random.normal(key, (2, 8, 8))}, {}

    def apply(params, statistics, examples, train):
        x = jnp.tile(examples["x"], 2).astype(params["kernel"].dtype)
        return jnp.sum(network(params, x), axis=1), {}

    monkeypatch.setattr(test_parts, "TASK", Task(init, apply, test_parts.loss))
    run = functools.partial(prepared, OPTIMIZERS["sgd"](), "sgd", devices=4)
    with jax.enable_x64(True):
        (expected, _), (found, _) = (trained(run(shard=s)) for s in ("none", {"layer": 4}))
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-10)
    for option in ({"noise_small_batch_examples": 2}, {"reproducible": True}):
        words = r"whole of params\['kernel'\].*; allowed: .* in no scan or vmap with reproducible"
        with pytest.raises(UserError, match=words):
            run(shard={"layer": 4}, **option)


@pytest.mark.parametrize(
    ("shard", "words"),
    [
        (
            {"layer": 3},
            r"shard: given \{'layer': 3\}; nearest: \{'layer': 2\}; .*divides the 8 devices",
        ),
        ({"layers": 4}, r"shard: given \{'layers': 4\}"),
        ({"layer": "all"}, r"shard: given \{'layer': 'all'\}"),
        ("layer", r"shard: given 'layer'; .*allowed: 'auto', 'none', 'update', .* or"),
    ],
)
def test_other_shards_are_refused(shard, words):
    with pytest.raises(UserError, match=words):
        prepared(OPTIMIZERS["sgd"](), "sgd", shard=shard)


def test_parameters_of_less_than_float32_are_refused(monkeypatch):
    def init(key):
        params, statistics = test_parts.init(key)
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), statistics

    monkeypatch.setattr(test_parts, "TASK", Task(init, test_parts.apply, test_parts.loss))
    for masters in (False, True):
        with pytest.raises(UserError, match=r"shard: .*parameters in float32"):
            prepared(OPTIMIZERS["sgd"](), "sgd", shard={"layer": 2}, float32_masters=masters)
