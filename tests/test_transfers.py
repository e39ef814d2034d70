"""What moves between the host and the devices while a run trains, and that it is no more."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from bigbatch.engine import functions as step
from bigbatch.training import loop as train
from bigbatch.training import microbatches
from tests import trained


@pytest.mark.parametrize("devices", [1, 2])
def test_the_updates_move_only_their_examples_and_their_hyperparameters(devices):
    run = trained.prepared(trained.quick(noise_small_batch_examples=32), devices=devices)
    hypers = []
    sharding = NamedSharding(run.mesh, step.SHARDED)

    def microbatch(request):
        # A guard holds for one thread; puts that are written down are allowed.
        with jax.transfer_guard("disallow"):
            size, examples = run.microbatch(request)
        # To a single device they go by the call itself.
        return size, jax.device_put(examples, sharding)

    def apply_update(state, accumulator, hyper):
        hypers.append(hyper)
        on_devices = jax.device_put(hyper, NamedSharding(run.mesh, step.REPLICATED))
        return run.programs.apply_update(state, accumulator, on_devices)

    programs = dataclasses.replace(run.programs, apply_update=apply_update)
    guarded = dataclasses.replace(run, microbatch=microbatch, programs=programs)
    state = run.init_state()
    with jax.transfer_guard("disallow"):
        done = sum(1 for _ in train.updates(guarded, state, 0))
    assert done == run.plan.num_updates == len(hypers)
    for name, column in run.plan.hypers.items():
        assert [float(hyper[name]) for hyper in hypers] == column.astype(np.float32).tolist()
        assert {hyper[name].nbytes for hyper in hypers} == {4}
        # To a single device they go by the call itself; to several, each value once.
        assert {isinstance(hyper[name], np.ndarray) for hyper in hypers} == {devices == 1}
        assert len({id(hyper[name]) for hyper in hypers}) == len(set(column.tolist()))


def test_the_sums_of_an_update_are_asked_for_before_the_first_is_waited_for(tmp_path, monkeypatch):
    run = trained.prepared(trained.quick(evaluate_every_epochs=100))
    happened = []
    of_arrays = type(jax.numpy.zeros(()))
    ask = of_arrays.copy_to_host_async

    def asked(array):
        happened.append("asked")
        ask(array)

    def read(sums):
        arrays = [leaf for leaf in jax.tree.leaves(sums) if isinstance(leaf, jax.Array)]
        happened.extend(["read"] * len(arrays) + ["end"])
        return on_host(sums)

    on_host = train.accumulator.on_host
    monkeypatch.setattr(of_arrays, "copy_to_host_async", asked)
    monkeypatch.setattr(train.accumulator, "on_host", read)
    trained.train(run, tmp_path)
    # Loss, correct, count, examples and what a float does not hold of each; whether gradient and
    # parameters are finite. A checkpoint may have asked before.
    groups = re.findall("(?:asked )+(?:(?:read ){10}end )+", " ".join([*happened, ""]))
    assert sum(group.count("end") for group in groups) == run.plan.num_updates
    assert sum(group.count("read") for group in groups) == happened.count("read")
    assert all(group.count("asked") >= group.count("read") for group in groups)


def test_what_is_small_goes_to_a_single_device_with_the_call():
    def source(first: int, count: int) -> dict[str, np.ndarray]:
        return {"x": np.arange(first, first + count, dtype=np.float32)}

    for devices, size, is_put in ((1, 16_384, False), (1, 16_385, True), (2, 16, True)):
        mesh = step.data_mesh(jax.devices()[:devices])
        placed = microbatches.place(source, 3, size - 1, size, None, mesh)
        assert isinstance(placed["x"], jax.Array if is_put else np.ndarray)
        np.testing.assert_array_equal(placed["x"], [*range(3, size + 2), 0])
        assert float(np.sum(placed["weight"])) == size - 1


def test_a_process_whose_share_is_masked_asks_for_one_example(monkeypatch):
    """The microbatch's first, which is there."""
    asked = []

    def source(first_example, count):
        asked.append((first_example, count))
        return {"x": np.ones((count, 2), np.float32)}

    monkeypatch.setattr(microbatches, "_own_range", lambda mesh, size: (4, 8))
    mesh = step.data_mesh(jax.devices()[:1])
    placed = microbatches.place(source, 0, 2, 8, None, mesh)
    assert asked == [(0, 1)]
    assert not np.any(placed["x"])
