"""What moves between the host and the devices while a run trains, and that it is no more."""

import dataclasses

import jax
import numpy as np
from jax.sharding import NamedSharding

from bigbatch import step, train
from tests import trained


def test_the_updates_move_only_their_examples_and_their_hyperparameters():
    run = trained.prepared(trained.config(noise_small_batch_examples=32), devices=2)
    hypers = []

    def microbatch(request):
        # A guard holds for one thread; puts that are written down are allowed.
        with jax.transfer_guard("disallow"):
            return run.microbatch(request)

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
    # These scalars alone go to the devices by the call itself.
    for hyper in hypers:
        assert {type(value) for value in hyper.values()} == {np.ndarray}
        assert sum(value.nbytes for value in hyper.values()) == 8


def test_the_sums_of_an_update_are_read_at_once(tmp_path, monkeypatch):
    run = trained.prepared(trained.config(evaluate_every_epochs=100))
    reads, device_get = [], jax.device_get

    def counted(tree):
        reads.append(tree)
        return device_get(tree)

    monkeypatch.setattr(jax, "device_get", counted)
    train.train(run, tmp_path)
    of_updates = [tree for tree in reads if isinstance(tree, dict) and "loss" in tree]
    assert len(of_updates) == run.plan.num_updates
