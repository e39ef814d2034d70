"""Ghost batch norm against a plain loop over ghost batches, alone and across devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigbatch.engine.functions import DATA_AXIS, REPLICATED, SHARDED, data_mesh
from bigbatch.engine.ghost_batches import devices_per_ghost_batch
from bigbatch.errors import UserError
from bigbatch.models.ghost_norm import GHOST_STATISTICS, RUNNING_STATISTICS, GhostNorm

GHOST = 8
SHAPE = (3, 2, 5)
RNG = np.random.default_rng(1)
PARAMS = {"scale": RNG.normal(size=5), "bias": RNG.normal(size=5)}
RUNNING = {"mean": RNG.normal(size=5), "variance": RNG.uniform(0.5, 2, size=5)}


def loop(x, cotangent, ghost, epsilon=1e-5):
    """Outputs, statistics and gradients, one ghost batch after the other, in NumPy.

    The gradient is that of batch norm in Ioffe and Szegedy 2015, section 3.
    """
    outputs, statistics, gradients = [], [], []
    in_params = {"scale": np.zeros(5), "bias": np.zeros(5)}
    for first in range(0, len(x), ghost):
        part = x[first : first + ghost].reshape(-1, 5)
        upstream = cotangent[first : first + ghost].reshape(-1, 5)
        mean, variance = part.mean(axis=0), part.var(axis=0)
        normal = (part - mean) / np.sqrt(variance + epsilon)
        outputs.append((normal * PARAMS["scale"] + PARAMS["bias"]).reshape(-1, *x.shape[1:]))
        statistics.append((mean, variance))
        in_params["scale"] += (upstream * normal).sum(axis=0)
        in_params["bias"] += upstream.sum(axis=0)
        in_normal = upstream * PARAMS["scale"]
        in_part = in_normal - in_normal.mean(axis=0) - normal * (in_normal * normal).mean(axis=0)
        gradients.append((in_part / np.sqrt(variance + epsilon)).reshape(-1, *x.shape[1:]))
    means, variances = map(np.stack, zip(*statistics, strict=True))
    return np.concatenate(outputs), means, variances, np.concatenate(gradients), in_params


def examples(num_examples):
    x = 3 + RNG.normal(size=(num_examples, *SHAPE))
    return x, RNG.normal(size=x.shape)


def apply(module, params, x):
    variables = {"params": params, RUNNING_STATISTICS: RUNNING}
    y, updated = module.apply(variables, x, train=True, mutable=[GHOST_STATISTICS])
    return y, updated[GHOST_STATISTICS]


def on_devices(module, devices, x, cotangent, params=PARAMS):
    """Outputs, each device's statistics, gradients of x and parameters, under `shard_map`."""

    def on_device(params, x, cotangent):
        params = jax.lax.pcast(params, DATA_AXIS, to="varying")

        def objective(params, x):
            y, statistics = apply(module, params, x)
            return jnp.sum(y * cotangent), (y, statistics)

        gradients, (y, statistics) = jax.grad(objective, (0, 1), has_aux=True)(params, x)
        return y, statistics, gradients[1], jax.lax.psum(gradients[0], DATA_AXIS)

    compiled = jax.jit(
        jax.shard_map(
            on_device,
            mesh=data_mesh(jax.devices()[:devices]),
            in_specs=(REPLICATED, SHARDED, SHARDED),
            out_specs=(SHARDED, SHARDED, SHARDED, REPLICATED),
        )
    )
    return jax.block_until_ready(compiled(params, x, cotangent))


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("devices", "share"), [(1, 16), (2, 8), (2, 4), (4, 4), (8, 4), (8, 2), (8, 1)]
)
def test_equals_a_loop_over_ghost_batches_however_the_devices_share_them(devices, share):
    sharing = max(1, GHOST // share)
    with jax.enable_x64(True):
        x, cotangent = examples(devices * share)
        module = GhostNorm(GHOST, axis_name=DATA_AXIS)
        y, statistics, in_x, in_params = on_devices(module, devices, x, cotangent)
        expected = loop(x, cotangent, GHOST)
        assert_close(y, expected[0])
        # Every device that shares a ghost batch holds the whole one's statistics.
        assert_close(statistics["mean"], np.repeat(expected[1], sharing, axis=0))
        assert_close(statistics["variance"], np.repeat(expected[2], sharing, axis=0))
        assert_close(in_x, expected[3])
        jax.tree.map(assert_close, in_params, expected[4])


def test_all_who_share_a_ghost_batch_hold_the_same_bits():
    with jax.enable_x64(False):
        x, cotangent = (a.astype(np.float32) for a in examples(16))
        module = GhostNorm(GHOST, axis_name=DATA_AXIS)
        statistics = on_devices(module, 8, x, cotangent)[1]
        means = np.asarray(statistics["mean"]).reshape(2, 4, 5)
    np.testing.assert_array_equal(means, np.broadcast_to(means[:, :1], means.shape))


@pytest.mark.parametrize("devices", [1, 4])
def test_the_full_batch_mode_takes_all_examples_of_all_devices(devices):
    with jax.enable_x64(True):
        x, cotangent = examples(24)
        y, _, in_x, in_params = on_devices(GhostNorm(None, DATA_AXIS), devices, x, cotangent)
        expected = loop(x, cotangent, ghost=24)
        assert_close(y, expected[0])
        assert_close(in_x, expected[3])
        jax.tree.map(assert_close, in_params, expected[4])


def far(num_examples, kind):
    """Float32s of deviation 1 about 1,000, or of which a ghost batch's middle is 1,000 off."""
    x = RNG.normal(size=(num_examples, *SHAPE)).reshape(-1, GHOST, *SHAPE)
    x[:, 3:6] += 1000 if kind == "middle" else 0
    x += 1000 if kind == "all" else 0
    x = x.reshape(-1, *SHAPE).astype(np.float32)
    return x, RNG.normal(size=x.shape).astype(np.float32)


@pytest.mark.parametrize("kind", ["all", "middle"])
@pytest.mark.parametrize(("devices", "share"), [(1, 16), (8, 2)])
def test_float32_keeps_its_digits_however_far_the_mean_is(devices, share, kind):
    """Mean of the squares minus square of the mean would leave one digit of the variance.

    The mean is right to two last places of 1,000, all else to those of deviations.
    """
    x, cotangent = far(devices * share, kind)
    with jax.enable_x64(False):
        params = jax.tree.map(np.float32, PARAMS)
        module = GhostNorm(GHOST, DATA_AXIS)
        y, statistics, in_x, in_params = on_devices(module, devices, x, cotangent, params)
    expected = loop(*(a.astype(np.float64) for a in (x, cotangent)), GHOST)
    sharing = GHOST // min(share, GHOST)
    means, variances = (np.repeat(a, sharing, axis=0) for a in expected[1:3])
    np.testing.assert_allclose(statistics["mean"], means, atol=2 * np.spacing(np.float32(1000)))
    np.testing.assert_allclose(statistics["variance"], variances, rtol=3e-6)
    np.testing.assert_allclose(y, expected[0], atol=2e-5)
    np.testing.assert_allclose(in_x, expected[3], atol=2e-5)
    for name, gradient in expected[4].items():
        np.testing.assert_allclose(in_params[name], gradient, atol=1e-4)


def test_no_sum_over_a_ghost_batch_waits_for_another():
    """So that one pass over the activations makes all of them, forward and backward."""
    x, cotangent = (a.astype(np.float32) for a in examples(GHOST))
    params = jax.tree.map(np.float32, PARAMS)

    def pull_back(params, x, cotangent):
        return jax.vjp(lambda *inputs: apply(GhostNorm(GHOST), *inputs)[0], params, x)[1](cotangent)

    jaxpr = jax.make_jaxpr(pull_back)(params, x, cotangent).jaxpr
    waits, sums = {}, 0
    for equation in jaxpr.eqns:
        is_sum = equation.primitive.name == "reduce_sum" and equation.invars[0].aval.size == x.size
        sums += is_sum
        before = max((waits.get(id(value), 0) for value in equation.invars), default=0)
        waits |= {id(value): before + is_sum for value in equation.outvars}
    assert sums >= 4
    assert max(waits.values()) == 1


def test_evaluation_uses_the_running_statistics_of_any_number_of_examples():
    with jax.enable_x64(True):
        x, _ = examples(3)
        variables = {"params": PARAMS, RUNNING_STATISTICS: RUNNING}
        y = GhostNorm(GHOST).apply(variables, x, train=False)
    normal = (x - RUNNING["mean"]) / np.sqrt(RUNNING["variance"] + 1e-5)
    np.testing.assert_allclose(y, normal * PARAMS["scale"] + PARAMS["bias"], rtol=1e-12)


def test_constant_channels_and_zero_cotangents_give_no_nan():
    """A masked ghost batch is images of one value, with a loss of weight 0."""
    x = np.concatenate([np.zeros((GHOST, *SHAPE)), examples(GHOST)[0]]).astype(np.float32)
    cotangent = np.concatenate([np.zeros((GHOST, *SHAPE)), np.ones((GHOST, *SHAPE))])
    outputs = on_devices(GhostNorm(GHOST, DATA_AXIS), 4, x, cotangent.astype(np.float32))
    for leaf in jax.tree.leaves(outputs):
        assert np.isfinite(leaf).all()
    np.testing.assert_array_equal(outputs[2][:GHOST], 0)


def test_bfloat16_keeps_statistics_in_float32():
    x = jnp.asarray(100 + examples(GHOST)[0], jnp.bfloat16)
    module = GhostNorm(GHOST)
    variables = module.init(jax.random.key(0), x, train=True)
    y, updated = module.apply(variables, x, train=True, mutable=[GHOST_STATISTICS])
    leaves = jax.tree.leaves((variables, updated))
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}
    exact = np.asarray(x, np.float64)
    statistics = updated[GHOST_STATISTICS]
    np.testing.assert_allclose(statistics["mean"][0], exact.mean(axis=(0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(statistics["variance"][0], exact.var(axis=(0, 1, 2)), rtol=1e-6)


@pytest.mark.parametrize(
    ("share", "devices", "nearest"),
    [(5, 8, 4), (12, 8, 8), (4, 1, 8), (2, 2, 4), (1, 6, 4), (20, 3, 16)],
)
def test_shares_that_form_no_ghost_batch_are_refused_with_the_nearest(share, devices, nearest):
    with pytest.raises(UserError) as error:
        devices_per_ghost_batch(GHOST, share, devices)
    (problem,) = error.value.problems
    assert problem.nearest == nearest
    assert devices_per_ghost_batch(GHOST, nearest, devices) >= 1


def test_examples_that_form_no_ghost_batch_are_refused_by_the_layer_too():
    x = jnp.zeros((12, 5))
    with pytest.raises(UserError, match="12"):
        GhostNorm(GHOST).init(jax.random.key(0), x, train=True)
