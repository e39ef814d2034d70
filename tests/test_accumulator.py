"""Sums over many microbatches and devices: as good as float64's, whole numbers exact."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import bigbatch as bb
from bigbatch.engine import accumulator, functions
from bigbatch.engine.accumulator import Accumulator, on_host
from bigbatch.training.updates import updates
from bigbatch.workdir.packing import sha256

WHOLE = 2**13 + 1


def regression(dtype=jnp.float32) -> bb.Task:
    def loss(prediction, examples):
        weight = examples["weight"]
        square = jnp.sum(weight * (prediction.astype(jnp.float32) - examples["y"]) ** 2)
        return {"loss": square, "count": jnp.sum(weight), "tokens": jnp.sum(weight * WHOLE)}

    return bb.Task(
        init=lambda key: (jnp.zeros(3, dtype), {}),
        apply=lambda params, statistics, examples, train: (examples["x"] @ params, {}),
        loss=loss,
    )


def one_update(task, arrays, devices, share, **options):
    """The state after one update of everything, and its sums on the host."""
    size = len(arrays["y"])
    plan = bb.make_plan(bb.constant(0.5, size), train_examples=size, epochs=1)
    mesh = functions.data_mesh(jax.devices()[:devices])
    options = {"microbatch_examples_per_device": share, "mesh": mesh, **options}
    run = bb.prepare(task, arrays, plan, bb.Sgd(), **options)
    ((_, state, sums),) = updates(run, run.first_state(), 0)
    return jax.device_get(state), on_host(sums), run


def made(size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(size, 3)) + 0.3).astype(np.float32)
    return {"x": x, "y": (rng.normal(size=size) + 3).astype(np.float32)}


@pytest.mark.parametrize("compensated", [True, False])
def test_many_additions(compensated):
    """100,000 addends of one value, the worst case: against the product in float64."""
    addend = Accumulator(jnp.float32(0.123), {"loss": jnp.float32(0.123)}, {}, jnp.float32(1))
    kept = ("gradients", "sums") if compensated else ("sums",)
    zeros = jax.tree.map(jnp.zeros_like, addend)
    total = zeros._replace(rests={name: getattr(zeros, name) for name in kept})
    add = jax.jit(
        lambda t: jax.lax.fori_loop(0, 100_000, lambda _, t: accumulator.add(t, addend), t)
    )
    total = accumulator.in_parts(add(total))
    true = 100_000 * np.float64(np.float32(0.123))
    np.testing.assert_allclose(np.float64(total.sums["loss"]).sum(), true, rtol=1e-7)
    error = abs(float(total.gradients) / true - 1)
    assert error < 1e-7 if compensated else error > 1e-4


@pytest.mark.parametrize(
    ("share", "reproducible", "kept"), [(8, False, 2), (16, False, 1), (8, True, None)]
)
def test_many_microbatches_are_compensated(share, reproducible, kept):
    """From 257 additions a device on; the gradient against NumPy's in float64."""
    arrays, options = made(257 * 8 * 2), {"reproducible": reproducible}
    options |= {"ghost_batch_examples": 8} if reproducible else {}
    state, sums, run = one_update(regression(), arrays, 2, share, **options)
    if kept is not None:
        rests = run.programs.empty_accumulator().rests
        # There are no ghost statistics.
        assert sum(bool(jax.tree.leaves(rest)) for rest in rests.values()) == kept
    x, y = (arrays[name].astype(np.float64) for name in ("x", "y"))
    np.testing.assert_allclose(state.params, 0.5 * 2 * (y @ x) / len(y), rtol=3e-7)
    np.testing.assert_allclose(sums["loss"], y @ y, rtol=2e-7)


@pytest.mark.parametrize(
    ("devices", "reproducible"), [(1, False), (8, False), (1, True), (8, True)]
)
def test_counts_past_the_precision_of_float32_are_exact(devices, reproducible):
    """4,096 examples of 8,193 tokens: 2^25 + 2^12."""
    options = {"reproducible": reproducible, "ghost_batch_examples": 64}
    arrays = made(4096) | {"weight": np.ones(4096)}
    arrays["weight"][5] = 0
    _, sums, _ = one_update(regression(), arrays, devices, 64, **options)
    assert sums["tokens"] == 4095 * WHOLE
    assert int(np.float32(4095 * WHOLE)) != 4095 * WHOLE
    assert sums["count"] == sums["examples"] == 4095


def test_bfloat16_gradients_are_summed_in_float32():
    """512 microbatches: in bfloat16 a sum of ones stays at 256."""
    arrays = {"x": np.ones((1024, 3), np.float32), "y": np.full(1024, -0.5, np.float32)}
    _, _, run = one_update(regression(jnp.bfloat16), arrays, 1, 2)
    assert run.programs.empty_accumulator().gradients.dtype == jnp.float32
    state, _, _ = one_update(regression(jnp.bfloat16), arrays, 1, 2)
    np.testing.assert_array_equal(np.float32(state.params), -0.5)


@pytest.mark.long
@pytest.mark.parametrize("addends", [2**16, 2**20])
def test_a_whole_reproducible_update_of_many_addends(addends):
    """Each example an addend: the same bits on 1 and 2 devices, small elements within the bound."""
    arrays = made(addends)
    arrays["x"] *= np.float32([1, 1e-3, 1e-5])
    found = [many_addends(arrays, devices) for devices in (1, 2)]
    assert sha256(found[0]) == sha256(found[1])
    params, sums = found[0]
    x, y = (arrays[name].astype(np.float64) for name in ("x", "y"))
    each = 2 * y[:, None] * x
    allowed = 2**-22 * abs(each).sum(0) + addends * 2**-32 * abs(each).max()
    # The parameters begin at 0 and become the mean gradient.
    error = abs(params.astype(np.float64) * addends - each.sum(0))
    assert (error <= allowed).all(), error / allowed
    np.testing.assert_allclose(sums["loss"], y @ y, rtol=2**-21)


def many_addends(arrays, devices):
    """The parameters after one update of an example a microbatch and device, and its sums.

    The microbatches are a loop on the device: a million calls take hours.
    """
    size, task = len(arrays["y"]), regression()
    mesh = functions.data_mesh(jax.devices()[:devices])
    run = bb.prepare(
        task,
        arrays,
        bb.make_plan(bb.constant(1.0, size), train_examples=size, epochs=1),
        bb.Sgd(),
        mesh=mesh,
        microbatch_examples_per_device=1,
        ghost_batch_examples=1,
        reproducible=True,
    )
    accumulate = functools.partial(functions.accumulate, task=task, mesh=mesh, unit_examples=1)

    @functools.partial(jax.jit, donate_argnums=1)
    def all_of(state, total, microbatches):
        return jax.lax.scan(lambda t, m: (accumulate(state, t, m), None), total, microbatches)[0]

    ones = np.ones(size, np.float32)
    examples = arrays | {"weight": ones, "ghost_mask": ones}
    where = NamedSharding(mesh, PartitionSpec(None, functions.DATA_AXIS))
    microbatches = {
        name: jax.device_put(array.reshape(-1, devices, *array.shape[1:]), where)
        for name, array in examples.items()
    }
    state, sums = run.first_state(), {functions.IS_EXACT: False}
    while not sums[functions.IS_EXACT]:
        total = all_of(state, run.programs.empty_accumulator(), microbatches)
        hyper = {"learning_rate": np.float32(1)}
        state, _, sums = run.programs.apply_update(state, total, hyper)
        sums = on_host(sums)
    return jax.device_get(state.params), sums
