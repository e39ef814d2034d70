"""Microbatches that find their size, and those that turn out not to fit."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.engine import functions as step
from bigbatch.errors import RunError, UserError
from bigbatch.layout import layout, memory
from bigbatch.training import loop as train
from bigbatch.training.fitting import Fitting
from bigbatch.training.updates import fit
from tests import trained
from tests.test_parts import OPTIMIZERS, prepared
from tests.test_reproducible import small_run
from tests.trained import failing


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
    path = tmp_path / "microbatch.json"

    def fitting(devices=2, asked=96, device_memory_bytes=None, path=path):
        mesh = step.data_mesh(jax.devices()[:devices])
        return Fitting(path, asked, device_memory_bytes, mesh)

    def chosen(**changes):
        settings = {"unit": 32, "most": 96, "reproducible": False}
        return fitting(**changes).examples_per_device(None, None, **settings)

    assert chosen() == 96
    fitting().keep(64)
    assert chosen() == 64
    for changes in ({"devices": 4}, {"device_memory_bytes": 10**9}, {"path": None}):
        assert chosen(**changes) == 96
    assert chosen(asked=32) == 32


def test_out_of_memory_halves_the_microbatch_once_and_changes_no_number():
    with jax.enable_x64(True):
        optimizer = OPTIMIZERS["nesterov"](clip_norm=0.5)
        make = lambda most: prepared(  # noqa: E731
            optimizer, "nesterov", shard="none", devices=2, microbatch=most
        )
        expected = fit(make(8))
        calls, used = [], []

        def fails(size):
            """The largest, in the middle of the fourth update."""
            calls.append(size)
            return size > 16 and len(calls) > 6

        run = failing(make(24), fails)
        use = lambda smaller, state: used.append(smaller)  # noqa: E731
        *_, (_, state, _) = train.updates(run, run.init_state(), 0, use=use)
        largest = [max(r.programs.accumulate) for r in (run, *used)]
    assert largest == [24, 12]
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)


def test_out_of_memory_again_and_again_halves_down_to_one_unit(monkeypatch):
    # As many shapes of microbatch as there may be.
    monkeypatch.setattr(layout, "COMPILATION_EXAMPLES", 0)
    with jax.enable_x64(True):
        optimizer, used = OPTIMIZERS["sgd"](clip_norm=0.5), []
        options = {"shard": "none", "devices": 2}
        run = prepared(optimizer, "sgd", microbatch=12, **options)
        use = lambda smaller, state: used.append(smaller)  # noqa: E731
        found = train.updates(failing(run, lambda size: size > 2), run.init_state(), 0, use=use)
        *_, (_, state, _) = found
        expected = fit(prepared(optimizer, "sgd", microbatch=4, **options))
    # Of two devices, whose unit is one example.
    assert [max(r.programs.accumulate) for r in (run, *used)] == [24, 12, 6, 2]
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)


# Of an update's three microbatches, in each of its two attempts: the first bounds always fail.
@pytest.mark.parametrize("number", [1, 3, 4, 6])
def test_out_of_memory_with_reproducible_sums_ends_the_run_with_words(number):
    """A call computes one unit already."""
    calls = []

    def fails(size):
        calls.append(size)
        return len(calls) == number

    run = failing(small_run(step.data_mesh(jax.devices()[:1]), 16), fails)
    with pytest.raises(RunError, match="one ghost"):
        fit(run)


def test_an_update_or_evaluation_that_does_not_fit_ends_the_run_with_words(tmp_path):
    def out_of_memory(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory (injected).")

    run = trained.prepared(trained.quick(epochs=0.1))
    for name, words in (("apply_update", "shard"), ("evaluate", "evaluation_batch")):
        programs = dataclasses.replace(run.programs, **{name: out_of_memory})
        with pytest.raises(RunError, match=words):
            trained.train(dataclasses.replace(run, programs=programs), tmp_path)
        assert not (tmp_path / "result.json").exists()


def test_what_does_not_fit_at_all_ends_the_run_with_words():
    with jax.enable_x64(True):
        run = prepared(OPTIMIZERS["sgd"](), "sgd", shard="none", devices=2)
        with pytest.raises(RunError, match="one ghost"):
            fit(failing(run, lambda size: True))


def test_another_error_of_the_runtime_is_left_alone():
    other = jax.errors.JaxRuntimeError("INTERNAL: something else")
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        memory.exhausted(other, "it", "smaller")
    assert raised.value is other
    run = trained.prepared(trained.quick())

    def fails(*arguments):
        raise other

    programs = dataclasses.replace(run.programs, apply_update=fails)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        fit(dataclasses.replace(run, programs=programs))


def test_auto_takes_what_fits_and_a_second_start_the_same(tmp_path, monkeypatch):
    path = tmp_path / "microbatch.json"
    changes = {"microbatch_examples_per_device": "auto", "epochs": 0.5}
    config = trained.quick(**changes)
    with pytest.raises(UserError, match="device_memory_bytes"):
        trained.prepared(config)
    small = trained.prepared(trained.quick(epochs=0.5)).programs.device_bytes
    limit = int(1.6 * (small["accumulate"] + small["state"]) / memory.USED_SHARE)
    config = trained.quick(device_memory_bytes=limit, **changes)
    run = trained.prepared(config, kept=path)
    chosen = json.loads(path.read_text())["chosen_examples_per_device"]
    assert chosen in (32, 64, 96, 128)
    asked = trained.quick(**{**changes, "microbatch_examples_per_device": chosen})
    assert run.layout == asked.layout(run.plan, 1)
    needs = run.programs.device_bytes
    assert needs["accumulate"] + needs["state"] <= limit * memory.USED_SHARE
    monkeypatch.setattr(memory, "largest_that_fits", None)
    again = trained.prepared(config, kept=path)
    assert again.layout == run.layout
