"""Microbatches that find their size, and those that turn out not to fit."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch import memory, step, train
from bigbatch.config import read_config
from bigbatch.errors import RunError, UserError
from bigbatch.own_task import fit
from bigbatch.run import prepare
from tests import trained
from tests.test_sharded_optimizer import OPTIMIZERS, prepared


@given(
    fixed=st.integers(0, 10**9),
    each=st.integers(0, 10**6),
    bend=st.integers(0, 1_000),
    unit=st.integers(1, 256),
    most=st.integers(1, 20_000),
    limit=st.integers(1, 10**10),
)
def test_the_largest_that_fits_fits_and_a_sixteenth_more_does_not(
    fixed, each, bend, unit, most, limit
):
    """Against a search of all multiples, for memory that grows at least in proportion."""
    tried = []

    def needed(examples):
        assert examples % unit == 0
        tried.append(examples)
        return fixed + each * examples + bend * examples**2

    allowed = int(limit * memory.USED_SHARE)
    if needed(unit) > allowed:
        with pytest.raises(UserError, match="device_memory_bytes"):
            memory.largest_that_fits(needed, unit=unit, most=most, limit_bytes=limit)
        return
    tried.clear()
    found = memory.largest_that_fits(needed, unit=unit, most=most, limit_bytes=limit)
    assert max(tried) <= max(unit, most // unit * unit)
    assert needed(found) <= allowed
    more = found + max(unit, -(-found // (16 * unit)) * unit)
    assert needed(more) > allowed or more > most


def test_half_a_microbatch_is_of_whole_units_and_one_unit_is_not_cut():
    assert memory.smaller(96, unit=32) == 32
    assert memory.smaller(640, unit=32) == 320
    with pytest.raises(RunError, match="one ghost"):
        memory.smaller(32, unit=32)


def test_the_kept_microbatch_is_taken_for_the_same_wish_and_devices_only(tmp_path):
    path, key = tmp_path / "microbatch.json", {"asked": "auto", "devices": 2}
    assert memory.kept(path, key) is None
    memory.keep(path, key, 64)
    assert memory.kept(path, key) == 64
    assert memory.kept(path, key | {"devices": 4}) is None
    assert memory.kept(None, key) is None


def failing(run, fails):
    """The run, its `accumulate` out of memory where `fails(examples)` says so."""

    def program(size, compiled):
        def call(*arguments):
            if fails(size):
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory (injected).")
            return compiled(*arguments)

        return call

    compiled = run.programs.accumulate
    accumulate = {size: program(size, compiled[size]) for size in compiled}
    return dataclasses.replace(
        run,
        programs=dataclasses.replace(run.programs, accumulate=accumulate),
        smaller=lambda: failing(run.smaller(), fails),
    )


def test_out_of_memory_halves_the_microbatch_once_and_changes_no_number():
    with jax.enable_x64(True):
        optimizer = OPTIMIZERS["nesterov"]()
        make = lambda most: prepared(  # noqa: E731
            optimizer, "nesterov", shard_optimizer=False, devices=2, microbatch=most
        )
        expected = fit(make(8))
        calls, used = [], []

        def fails(size):
            """The largest, in the middle of the fourth update."""
            calls.append(size)
            return size > 16 and len(calls) > 6

        run = failing(make(24), fails)
        *_, (_, state, _) = train.updates(run, run.init_state(), 0, use=used.append)
        largest = [max(r.programs.accumulate) for r in (run, *used)]
    assert largest == [24, 12]
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)


def test_what_does_not_fit_at_all_ends_the_run_with_words():
    with jax.enable_x64(True):
        run = prepared(OPTIMIZERS["sgd"](), "sgd", shard_optimizer=False, devices=2)
        with pytest.raises(RunError, match="one ghost"):
            fit(failing(run, lambda size: True))


def test_another_error_of_the_runtime_is_left_alone():
    with pytest.raises(jax.errors.JaxRuntimeError), memory.noticed():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_auto_takes_what_fits_and_a_second_start_the_same(tmp_path, monkeypatch):
    path = tmp_path / "microbatch.json"
    mesh = step.data_mesh(jax.devices()[:1])
    changes = {"microbatch_examples_per_device": "auto", "epochs": 0.5}
    config = trained.config(**changes)
    with pytest.raises(UserError, match="device_memory_bytes"):
        prepare(config, config.plan, mesh)
    small = trained.prepared(trained.config(epochs=0.5)).programs.device_bytes
    limit = int(1.6 * (small["accumulate"] + small["state"]) / memory.USED_SHARE)
    config = trained.config(device_memory_bytes=limit, **changes)
    run = prepare(config, config.plan, mesh, kept=path)
    chosen = run.config.microbatch_examples_per_device
    assert chosen in (32, 64, 96, 128)
    assert json.loads(path.read_text())["chosen_examples_per_device"] == chosen
    needs = run.programs.device_bytes
    assert needs["accumulate"] + needs["state"] <= limit * memory.USED_SHARE
    monkeypatch.setattr(memory, "largest_that_fits", None)
    again = prepare(config, config.plan, mesh, kept=path)
    assert again.layout == run.layout


def test_auto_is_refused_where_a_microbatch_is_a_whole_batch():
    with pytest.raises(UserError, match="full_batch_norm"):
        read_config(trained.tree(microbatch_examples_per_device="auto", full_batch_norm=True))
