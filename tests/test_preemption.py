"""A run that is told to stop saves the state at the start of its update, and continues exactly."""

import dataclasses
import os
import signal

import pytest

from bigbatch.errors import StoppedError
from bigbatch.training import evaluate, microbatches
from bigbatch.training.preemption import StopNoticeError, StopRequest
from tests import trained
from tests.storm import records


@pytest.fixture(scope="module")
def run():
    # Updates of one and of five microbatches.
    return trained.prepared(
        trained.config(evaluate_every_updates=4, checkpoint_every_updates=7, log_every_updates=2)
    )


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    return directory, trained.train(run, directory)


def stopping_at(run, number: int):
    """The run, with a SIGTERM to this process while its microbatch of that number is made."""
    made = iter(range(10**6))

    def microbatch(request: microbatches.Request):
        if next(made) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return run.microbatch(request)

    return dataclasses.replace(run, microbatch=microbatch)


# Of the 64 microbatches: in the first update, at a stage change, within updates of five, last.
@pytest.mark.parametrize("numbers", [[0], [9], [12, 3, 30], [60]])
def test_sigterm_drops_the_update_and_the_same_run_goes_on(run, undisturbed, tmp_path, numbers):
    expected_directory, expected = undisturbed
    before = signal.getsignal(signal.SIGTERM)
    for number in numbers:
        with pytest.raises(StoppedError, match="the same command continues"):
            trained.train(stopping_at(run, number), tmp_path)
        assert not (tmp_path / "result.json").exists()
        assert signal.getsignal(signal.SIGTERM) is before
    result = trained.train(run, tmp_path)
    same = ["updates", "examples", "test_accuracy", "test_loss", "train_loss", "params_sha256"]
    assert {k: result[k] for k in same} == {k: expected[k] for k in same}
    assert records(tmp_path) == records(expected_directory)


def test_a_stop_within_an_evaluation_evaluates_again(run, undisturbed, tmp_path, monkeypatch):
    expected_directory, expected = undisturbed
    original, calls = evaluate.source_sums, []

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise StopNoticeError
        return original(*arguments)

    monkeypatch.setattr(evaluate, "source_sums", stopped)
    with pytest.raises(StoppedError, match="saved after update 8 of 20"):
        trained.train(run, tmp_path)
    result = trained.train(run, tmp_path)
    assert result["params_sha256"] == expected["params_sha256"]
    assert records(tmp_path) == records(expected_directory)


def test_outside_of_the_loop_sigterm_is_what_it_was():
    stop = StopRequest()
    stop.check()
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        with stop:
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(StopNoticeError):
                stop.check()
        assert heard == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [1]
    finally:
        signal.signal(signal.SIGTERM, before)
