"""The watchdog names what a stalled run waits for; a diverged run says where and under what."""

import dataclasses
import threading
import time

import jax
import numpy as np
import pytest

from bigbatch.errors import RunError
from bigbatch.schedule import divergence
from bigbatch.training import loop as train
from bigbatch.training.updates import waits_for
from bigbatch.training.watch import PHASES, Watchdog
from tests import trained


def heard_within(heard: list[str], event: threading.Event) -> str:
    assert event.wait(30)
    return heard[0]


@pytest.mark.parametrize("name", PHASES)
def test_a_phase_that_lasts_is_named(name):
    heard, event = [], threading.Event()

    def say(text: str) -> None:
        heard.append(text)
        event.set()

    with Watchdog(say, stall_s=0.05) as watchdog:
        watchdog.moved("update 7")
        with watchdog.phase(name):
            text = heard_within(heard, event)
    assert "update 7" in text
    assert text.endswith(f"waiting for {PHASES[name]}")


def test_nothing_is_said_while_phases_end():
    heard = []
    with Watchdog(heard.append, stall_s=30.0) as watchdog:
        for _ in range(100):
            with watchdog.phase("input"), watchdog.phase("device"):
                pass
        # Between phases the host computes, and waits for nobody.
        time.sleep(0.01)
    assert heard == []


def stalled(run, monkeypatch, where: str, event: threading.Event):
    """A run in which one phase waits until the watchdog has spoken."""

    def after_a_word(function):
        def wrapped(*arguments):
            assert event.wait(60)
            return function(*arguments)

        return wrapped

    if where == "input":
        return dataclasses.replace(run, microbatch=after_a_word(run.microbatch))
    if where == "evaluation":
        monkeypatch.setattr(train, "evaluate", after_a_word(train.evaluate))
    elif where == "checkpoint":
        save = after_a_word(train.Checkpoints.save)
        monkeypatch.setattr(train.Checkpoints, "save", save)
    return run


@pytest.mark.parametrize("where", ["input", "evaluation", "checkpoint"])
def test_a_stalled_run_names_its_phase(tmp_path, monkeypatch, capsys, where):
    run = trained.prepared(trained.quick(epochs=0.1))
    event, heard = threading.Event(), []

    def watchdog(say, stall_s):
        def heard_too(text: str) -> None:
            heard.append(text)
            say(text)
            event.set()

        return Watchdog(heard_too, stall_s)

    monkeypatch.setattr(train, "Watchdog", watchdog)
    trained.train(stalled(run, monkeypatch, where, event), tmp_path, stall_s=0.3)
    assert PHASES[where] in heard[0]
    assert PHASES[where] in capsys.readouterr().err


def test_the_diagnosis_has_the_settings_and_their_arithmetic():
    plan = trained.quick().plan
    row = plan.row(15)
    text = divergence.diagnosis(plan, row, "the training loss is nan", 0.25)
    rate, size = row.hyper["learning_rate"], row.batch_size
    assert "updates 14 to 15" in text
    assert f"lr/(1-m) {rate / 0.1:.3g}," in text
    assert f"batch size {size}," in text
    assert f"noise scale {rate * 1437 / (size * 0.1):.4g}," in text
    assert f"momentum lag {size / 143.7:.2g} epochs" in text
    assert "lower momentum or max_batch_size" in text
    assert ("lower policy.learning_rate" in text) == (rate / 0.1 > 1)
    hyper = row.hyper | {"learning_rate": 0.2}
    text = divergence.diagnosis(plan, row._replace(hyper=hyper), "the training loss is nan", 0.25)
    assert "lower policy.learning_rate" in text


def test_a_gradient_that_is_not_finite_stops_the_run_before_its_state_is_saved(tmp_path):
    run = trained.prepared(trained.quick(checkpoint_every_updates=1))
    apply_update, calls = run.programs.apply_update, []

    def broken(state, accumulator, hyper):
        calls.append(hyper)
        if len(calls) == 4:
            spoilt = accumulator.gradients["logits"]["bias"].at[0, 0].set(np.inf)
            logits = accumulator.gradients["logits"] | {"bias": spoilt}
            accumulator = accumulator._replace(gradients=accumulator.gradients | {"logits": logits})
        return apply_update(state, accumulator, hyper)

    programs = dataclasses.replace(run.programs, apply_update=broken)
    with pytest.raises(RunError, match="the gradient is not finite in update 3"):
        trained.train(dataclasses.replace(run, programs=programs), tmp_path)
    assert max(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == 3


@pytest.mark.parametrize(("processes", "what"), [(1, "device"), (2, "other host")])
def test_what_an_update_waits_for(monkeypatch, processes, what):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    assert waits_for() == what
    assert what in PHASES
