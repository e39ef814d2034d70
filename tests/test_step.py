"""The compiled functions: their collectives, their independence of the hardware, their numbers."""

import decimal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigbatch.data import stream
from bigbatch.engine import functions as step
from bigbatch.layout import layout
from bigbatch.training import loop as train
from bigbatch.training.microbatches import place
from tests import trained
from tests.hlo import collectives

NUM_UPDATES = 20


@pytest.mark.parametrize("devices", [2, 8])
def test_accumulate_has_no_collective_and_apply_update_one_all_reduce(devices):
    programs = trained.prepared(trained.config(), devices).programs
    for accumulate in programs.accumulate.values():
        assert collectives(accumulate) == {}
    assert collectives(programs.apply_update) == {"all-reduce": 1}
    assert collectives(programs.evaluate) == {}


def test_the_count_of_collectives_can_fail():
    mesh = step.data_mesh(jax.devices()[:2])
    summed = jax.shard_map(
        lambda x: (jax.lax.psum(x, "data"), jax.lax.psum(jnp.sum(x * x), "data")),
        mesh=mesh,
        in_specs=jax.P("data"),
        out_specs=jax.P(),
    )
    assert collectives(jax.jit(summed).lower(jnp.ones(4)).compile()).total() >= 1


def run_float64(devices: int, microbatch: int):
    """A run of 20 updates, over a change from 32 to 160: its parameters and running statistics."""
    with jax.enable_x64(True):
        config = trained.quick("float64", microbatch_examples_per_device=microbatch)
        run = trained.prepared(config, devices)
        assert run.plan.num_updates == NUM_UPDATES
        assert set(run.plan.batch_sizes.tolist()) == {32, 160}
        *_, (_, state, _) = train.updates(run, run.init_state(), 0)
        return run, jax.tree.map(np.asarray, (state.params, state.running_statistics))


@pytest.fixture(scope="module")
def reference():
    return run_float64(devices=1, microbatch=32)


def assert_trees_close(a, b, tolerance):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    assert max(float(np.max(np.abs(x - y))) for x, y in leaves) < tolerance


@pytest.mark.parametrize(
    ("devices", "microbatch", "shapes"),
    [
        (1, 96, (96, 64, 32)),
        (1, 160, (160, 32)),
        (2, 96, (96, 32)),
        (4, 64, (64, 32)),
        (8, 32, (32,)),
        *(pytest.param(n, 32, (32,), marks=pytest.mark.long) for n in (3, 5, 6, 7)),
    ],
)
def test_devices_and_microbatches_change_nothing(
    reference, monkeypatch, devices, microbatch, shapes
):
    monkeypatch.setattr(layout, "COMPILATION_EXAMPLES", 0)
    _, expected = reference
    run, result = run_float64(devices, microbatch)
    assert run.layout.shapes == shapes
    assert jax.tree.leaves(result)[0].dtype == np.float64
    assert_trees_close(result, expected, 1e-10)


def test_updates_equal_a_plain_loop_over_ghost_batches(reference):
    """Another way: the mean over the whole update of losses by ghost batch, heavy ball by hand."""
    run, expected = reference
    with jax.enable_x64(True):
        data = run.data
        module = run.config.model.module(num_classes=10, ghost_batch_examples=32)
        state = run.init_state()
        params, running = jax.tree.map(jnp.asarray, (state.params, state.running_statistics))
        velocity = jax.tree.map(jnp.zeros_like, params)

        @jax.jit
        def ghost_loss(params, images, labels):
            scaled = (images.astype(jnp.float64) - data.mean[0]) / data.std[0]
            logits, new = module.apply(
                {"params": params, "running_statistics": running},
                scaled,
                train=True,
                mutable=["ghost_statistics"],
            )
            one_hot = jax.nn.one_hot(labels, 10)
            return -jnp.mean(jnp.sum(one_hot * jax.nn.log_softmax(logits), -1)), new

        gradient = jax.jit(jax.grad(ghost_loss, has_aux=True))
        for update in range(NUM_UPDATES):
            row = run.plan.row(update)
            batch = stream.examples(data.train, run.config.seed, row.first_example, row.batch_size)
            ghosts = [slice(j, j + 32) for j in range(0, row.batch_size, 32)]
            results = [gradient(params, batch["image"][g], batch["label"][g]) for g in ghosts]
            mean = jax.tree.map(lambda *leaves: sum(leaves) / len(ghosts), *[r[0] for r in results])
            lr, m = row.hyper["learning_rate"], row.hyper["momentum"]
            velocity = jax.tree.map(lambda v, g, w: m * v + g + 5e-4 * w, velocity, mean, params)
            params = jax.tree.map(lambda w, v: w - lr * v, params, velocity)
            statistics = [r[1]["ghost_statistics"] for r in results]
            ghost_mean = jax.tree.map(lambda *s: sum(s)[0] / len(ghosts), *statistics)
            kept = 0.9 ** len(ghosts)
            running = jax.tree.map(lambda r, s: kept * r + (1 - kept) * s, running, ghost_mean)
        result = jax.tree.map(np.asarray, (params, running))
    assert_trees_close(result, expected, 1e-10)


def test_a_masked_ghost_batch_adds_exactly_nothing(monkeypatch):
    monkeypatch.setattr(layout, "COMPILATION_EXAMPLES", 0)
    run = trained.prepared(trained.quick(microbatch_examples_per_device=160))
    state, programs = run.init_state(), run.programs
    examples = stream.examples(run.data.train, 0, 0, 32)

    def total(share: int, present: int):
        def source(first: int, number: int):
            return {name: array[first : first + number] for name, array in examples.items()}

        microbatch = place(source, 0, present, share, 32, run.mesh)
        accumulator = programs.accumulate[share](
            state, programs.empty_accumulator(), microbatch, run.frozen
        )
        return jax.tree.map(np.asarray, accumulator)

    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(total(160, 0)))
    alone, among_masked = total(32, 32), total(160, 32)
    assert float(alone.ghost_batches[0]) == float(among_masked.ghost_batches[0]) == 1.0
    assert float(alone.sums["count"][0]) == float(among_masked.sums["count"][0]) == 32.0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), alone, among_masked
    )


@pytest.mark.parametrize("ghost_batches", [1, 3, 50])
def test_running_statistics_go_as_far_as_single_steps_would(ghost_batches):
    single = np.float64(2.0)
    for _ in range(ghost_batches):
        single = 0.9 * single + 0.1 * 5.0
    got = step.advance_running_statistics(
        {"mean": jnp.float32(2.0)},
        {"mean": jnp.float32(5.0 * ghost_batches)},
        jnp.float32(ghost_batches),
        decay=0.9,
    )
    np.testing.assert_allclose(got["mean"], single, rtol=1e-6)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999, 0.9999, 0.9999999])
@pytest.mark.parametrize("ghost_batches", [1, 7, 2048, 65_536])
def test_running_statistics_fade_as_exactly_near_a_decay_of_1(decay, ghost_batches):
    """Against decimals of 50 digits; float32's 0.9999^2048 is off by 1.4e-4."""
    with decimal.localcontext(prec=50):
        kept = decimal.Decimal(decay) ** ghost_batches
        expected = {"old": float(kept), "new": float(1 - kept)}
    got = step.advance_running_statistics(
        {"old": jnp.float32(1), "new": jnp.float32(0)},
        {"old": jnp.float32(0), "new": jnp.float32(ghost_batches)},
        jnp.float32(ghost_batches),
        decay=decay,
    )
    np.testing.assert_allclose(got["new"], expected["new"], rtol=5e-7)
    np.testing.assert_allclose(got["old"], expected["old"], rtol=0, atol=2e-7)


def test_sums_are_the_loss_of_the_whole_update():
    run = trained.prepared(trained.quick(), devices=4)
    state = run.init_state()
    params, running = jax.tree.map(np.asarray, (state.params, state.running_statistics))
    row, _, sums = next(train.updates(run, state, 0))
    examples = stream.examples(run.data.train, 0, 0, row.batch_size)

    @jax.jit
    def mean_loss(images, labels):
        module = run.config.model.module(num_classes=10, ghost_batch_examples=32)
        variables = {"params": params, "running_statistics": running}
        scaled = (images.astype(jnp.float32) - run.data.mean[0]) / run.data.std[0]
        logits, _ = module.apply(variables, scaled, train=True, mutable=["ghost_statistics"])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    expected = mean_loss(examples["image"], examples["label"])
    np.testing.assert_allclose(sums["loss"] / sums["count"], expected, rtol=1e-5)
    assert float(sums["count"]) == row.batch_size
