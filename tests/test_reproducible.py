"""With `reproducible` the parameters are the same, to the bit, whatever the hardware."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

import bigbatch
from bigbatch.engine import functions as step
from bigbatch.engine.optimizer import OPTIMIZERS, Momentum, Optimizer, arguments
from bigbatch.engine.task import Task
from bigbatch.errors import UserError
from bigbatch.layout import layout
from bigbatch.training import loop as train
from bigbatch.training import updates as update_loop
from bigbatch.training.prepare import prepare
from bigbatch.training.run import Run
from bigbatch.workdir.packing import sha256
from tests import trained
from tests.hlo import collectives
from tests.test_distributed import free_port
from tests.test_noise_measurement import log_of


@pytest.fixture(autouse=True)
def _many_shapes(monkeypatch):
    """Layouts with as many shapes of microbatch as they may have."""
    monkeypatch.setattr(layout, "COMPILATION_EXAMPLES", 0)


def mesh_of(devices: int) -> Mesh:
    return step.data_mesh(jax.devices()[:devices])


def perceptron() -> Task:
    """Two layers, with a bias that starts at 0 and a loss of several sums."""

    def init(key):
        first, second = jax.random.split(key)
        params = {
            "in": jax.random.normal(first, (5, 16)),
            "bias": jnp.zeros(16),
            "out": jax.random.normal(second, (16,)),
        }
        return params, {}

    def apply(params, statistics, examples, train):
        hidden = jnp.tanh(examples["x"] @ params["in"] + params["bias"])
        return hidden @ params["out"], {}

    def loss(outputs, examples):
        weight, error = examples["weight"], outputs - examples["y"]
        return {"loss": jnp.sum(weight * error**2), "count": jnp.sum(weight)}

    return Task(init, apply, loss)


TASK = perceptron()
RNG = np.random.default_rng(0)
ARRAYS = {"x": RNG.normal(size=(1_000, 5)), "y": RNG.normal(size=1_000)}
ARRAYS = {name: array.astype(np.float32) for name, array in ARRAYS.items()}


MOMENTUM = Momentum(clip_norm=5.0, weight_decay=1e-3)


def small_run(
    mesh: Mesh,
    share: int,
    *,
    reproducible: bool = True,
    shard: str = "none",
    optimizer: Optimizer = MOMENTUM,
) -> Run:
    """Batches of 24, then 120, in units of 8. A test over processes gives its own mesh."""
    momentum = 0.9 if "momentum" in arguments(optimizer.links) else 0.0
    recipe = bigbatch.step_decay(0.02, 24, momentum, boundaries_epochs=[0.4], factor=0.2)
    plan = bigbatch.make_plan(
        bigbatch.grow_batch(recipe), train_examples=1_000, epochs=1.5, batch_multiple_examples=8
    )
    return prepare(
        TASK,
        ARRAYS,
        plan,
        optimizer,
        microbatch_examples_per_device=share,
        ghost_batch_examples=8,
        noise_small_batch_examples=8,
        reproducible=reproducible,
        shard=shard,
        mesh=mesh,
    )


def hash_of_everything(prepared: Run) -> str:
    """Of the last state and the sums of every update."""
    state, history = go_on(prepared, prepared.init_state(), 0, prepared.plan.num_updates)
    return sha256((state, history))


def go_on(prepared: Run, state, done: int, until: int):
    """The state after some updates, on the host, and the sums of each."""
    history = []
    updates = train.updates(prepared, state, done)
    for _ in range(done, until):
        _, state, sums = next(updates)
        del sums["input_wait_s"]
        history.append(jax.device_get(sums))
    state = jax.device_get(state._replace(copy=None))
    updates.close()
    return state, history


@pytest.fixture(scope="module")
def expected():
    return hash_of_everything(small_run(mesh_of(1), 8))


@pytest.mark.parametrize(
    ("devices", "shard"), [(2, "update"), (3, "none"), (6, "update"), (8, "none"), (8, "update")]
)
def test_any_devices_and_parts_give_the_same_bits(expected, devices, shard):
    """The state, the losses and the measurements of the noise, with a clip by the global norm."""
    assert hash_of_everything(small_run(mesh_of(devices), 8, shard=shard)) == expected


@pytest.mark.long
@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_a_norm_of_each_array_is_the_same_bits_too(name):
    """In these two an array's learning rate goes by its norm and that of its update."""
    optimizer = OPTIMIZERS[name](clip_norm=5.0, weight_decay=1e-3)
    found = {
        hash_of_everything(small_run(mesh_of(devices), 8, shard=shard, optimizer=optimizer))
        for devices in (1, 2, 4, 8)
        for shard in ("none", "update")
    }
    assert len(found) == 1


def test_without_it_they_do_not():
    found = {
        hash_of_everything(small_run(mesh_of(devices), 8, reproducible=False)) for devices in (1, 2)
    }
    assert len(found) > 1


def test_it_changes_no_more_than_rounding_does():
    def last(reproducible):
        prepared = small_run(mesh_of(1), 24, reproducible=reproducible)
        *_, (_, state, _) = train.updates(prepared, prepared.init_state(), 0)
        return jax.device_get(state.params)

    pairs = zip(jax.tree.leaves(last(True)), jax.tree.leaves(last(False)), strict=True)
    for ours, plain in pairs:
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)
        assert not np.array_equal(ours, np.zeros_like(ours))


def test_a_state_goes_on_on_other_devices(expected):
    """1 device, then 8, 2 and 4, the state carried over by the host."""
    history, state, done = [], None, 0
    parts = ((1, 24, 5, "none"), (8, 8, 11, "update"), (2, 40, 20, "none"), (4, 16, None, "update"))
    for devices, share, until, shard in parts:
        prepared = small_run(mesh_of(devices), share, shard=shard)
        state = prepared.init_state() if state is None else prepared.on_devices(state)
        until = until or prepared.plan.num_updates
        state, more = go_on(prepared, state, done, until)
        history, done = history + more, until
    assert sha256((state, history)) == expected


def test_every_call_computes_one_unit_however_many_would_fit():
    for devices, share in ((1, 120), (2, 40), (8, 8)):
        assert set(small_run(mesh_of(devices), share).programs.accumulate) == {8 * devices}


def test_a_bound_that_fails_is_raised_and_the_update_computed_again(monkeypatch):
    prepared = small_run(mesh_of(2), 24)
    again, original = [], update_loop._made
    monkeypatch.setattr(
        update_loop, "_made", lambda run, row: again.append(row.update) or original(run, row)
    )
    new, _ = go_on(prepared, prepared.init_state(), 0, 4)
    # Nothing is known before the first update; afterwards bounds hold.
    assert again == [0]
    spoilt = new._replace(bounds=np.full_like(new.bounds, -30))
    replicated = NamedSharding(prepared.mesh, step.REPLICATED)
    starts = [jax.device_put(start, replicated) for start in (new, spoilt)]
    results = [go_on(prepared, start, 4, 5)[0] for start in starts]
    assert again == [0, 4]
    # The bounds differ, so may the roundings; the update is the same one.
    for ours, theirs in zip(*(jax.tree.leaves(r.params) for r in results), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_not_finite_does_not_repeat_for_ever():
    prepared = small_run(mesh_of(1), 24)
    state = prepared.init_state()
    broken = jax.tree.map(lambda leaf: leaf * np.float32("nan"), state.params)
    _, (sums,) = go_on(prepared, state._replace(params=broken), 0, 1)
    assert not np.isfinite(sums["loss"])


def test_a_ghost_batch_that_devices_would_share_is_refused():
    with pytest.raises(UserError, match="microbatch_examples_per_device"):
        small_run(mesh_of(2), 4)


def test_auto_is_one_unit():
    config = trained.quick(
        reproducible=True, microbatch_examples_per_device="auto", device_memory_bytes=10**9
    )
    assert set(trained.prepared(config, 2).programs.accumulate) == {64}


def test_collectives():
    """None in accumulate; a sum and a maximum in apply_update."""
    programs = small_run(mesh_of(8), 8).programs
    for accumulate in programs.accumulate.values():
        assert collectives(accumulate) == {}
    assert collectives(programs.apply_update) == {"all-reduce": 2}
    text = programs.apply_update.as_text()
    reducers = re.findall(r"all-reduce(?:-start)?\(.*?to_apply=%?([\w.\-]+)", text)
    bodies = [re.search(rf"%?{re.escape(name)} .*?\n}}", text, re.S)[0] for name in reducers]
    assert sorted("maximum" in body for body in bodies) == [False, True]


@pytest.mark.long
def test_digits_over_a_change_of_the_batch_size(tmp_path):
    """A network with ghost norm: parameters and training log, on 1 device and on 4."""
    found = []
    for devices, share in ((1, 96), (4, 32)):
        config = trained.config(reproducible=True, microbatch_examples_per_device=share, epochs=0.7)
        result = trained.train(trained.prepared(config, devices), tmp_path / str(devices))
        losses = [r.get("train_loss") for r in log_of(tmp_path / str(devices))]
        found.append((result["params_sha256"], losses))
    assert found[0] == found[1]
    # The checkpoint of one goes on with the other.
    (tmp_path / "1" / "result.json").unlink()
    config = trained.config(reproducible=True, microbatch_examples_per_device=32, epochs=0.7)
    again = trained.train(trained.prepared(config, 4), tmp_path / "1")
    assert again["params_sha256"] == found[0][0]


def run_processes(name: str, share: int, devices: int, processes: int = 1, *flags: str):
    """What each process of a whole run printed; see `same_bits`."""
    command = [sys.executable, "-m", "tests.same_bits", name, str(share), *flags]
    coordinator = f"127.0.0.1:{free_port()}"
    started = [
        subprocess.Popen(
            command
            + (["--processes", coordinator, str(processes), str(index)] if processes > 1 else []),
            cwd=Path(__file__).parents[1],
            env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]
    texts = [process.communicate()[0] for process in started]
    assert not any(process.returncode for process in started)
    return [json.loads(text.splitlines()[-1]) for text in texts]


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "shares"), [("digits", (160, 32, 96, 32, 64)), ("wrn_16_4", (64, 16, 8, 8, 16))]
)
def test_a_whole_run_is_the_same_bits_on_any_devices_and_processes(name, shares):
    """Every stage, each run in processes of its own: the state, and the sums of every update."""
    over = [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2)]
    found = [
        report
        for share, (devices, processes) in zip(shares, over, strict=True)
        for report in run_processes(name, share, devices, processes)
    ]
    assert [(r["devices"], r["processes"]) for r in found[:4]] == over[:4]
    assert [(r["devices"], r["processes"]) for r in found[4:]] == [(4, 2)] * 2
    assert len({(r["sha256"], r["params_sha256"]) for r in found}) == 1
    assert len(found[0]["batch_sizes"]) == 3
    # And without it they are not.
    plain = [run_processes(name, shares[1], devices, 1, "--plain")[0] for devices in (1, 2, 4)]
    assert len({r["params_sha256"] for r in plain}) > 1


def test_what_cannot_be_reproducible_is_refused():
    field = "microbatch_examples_per_device"
    with pytest.raises(UserError) as error:
        trained.config(reproducible=True, **{field: 8})
    assert [(p.field, p.nearest) for p in error.value.problems] == [(field, 32)]


def test_more_addends_than_the_sums_have_room_for_are_refused():
    many = 2**21 + 2
    arrays = {"x": np.zeros((many, 5), np.float32), "y": np.zeros(many, np.float32)}
    plan = bigbatch.make_plan(bigbatch.constant(0.1, many), train_examples=many, epochs=1)
    options = {"microbatch_examples_per_device": 2**10, "mesh": mesh_of(1)}
    with pytest.raises(
        UserError, match=r"'True, and 2,097,154'; nearest: False; .* at most 1,048,576 times 2"
    ):
        prepare(
            TASK, arrays, plan, Momentum(), reproducible=True, ghost_batch_examples=2, **options
        )
