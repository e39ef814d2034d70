"""Sums over many microbatches and devices: as good as float64's, whole numbers exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bigbatch as bb
from bigbatch.engine import accumulator, functions
from bigbatch.engine.accumulator import Accumulator, on_host
from bigbatch.training.updates import updates

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
