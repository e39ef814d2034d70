"""A run that is told to stop saves the state at the start of its update, and continues exactly."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest

from bigbatch.errors import StoppedError
from bigbatch.training import evaluate, loop, microbatches, preemption
from bigbatch.training.preemption import StopNoticeError, StopRequest
from tests import perceptron_run, trained
from tests.storm import ROOT, records
from tests.test_distributed import ended, start
from tests.test_lost_processes import wait_for_updates


@pytest.fixture(autouse=True)
def _sigint_is_heeded():
    """Also where the tests run in the background of a script, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def run():
    # Updates of one and of five microbatches.
    return trained.prepared(
        trained.quick(evaluate_every_updates=4, checkpoint_every_updates=7, log_every_updates=2)
    )


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    return directory, trained.train(run, directory)


def stopping_at(run, number: int, *notices: int):
    """The run, with signals to this process while its microbatch of that number is made."""
    made = iter(range(10**6))

    def microbatch(request: microbatches.Request):
        if next(made) == number:
            for notice in notices or (signal.SIGTERM,):
                os.kill(os.getpid(), notice)
        return run.microbatch(request)

    return dataclasses.replace(run, microbatch=microbatch)


# Of the 64 microbatches: in the first update, at a stage change, within updates of five, last.
@pytest.mark.parametrize("numbers", [[0], [9], [12, 3, 30], [60]])
def test_sigterm_drops_the_update_and_the_same_run_goes_on(run, undisturbed, tmp_path, numbers):
    expected_directory, expected = undisturbed
    before = signal.getsignal(signal.SIGTERM)
    for number in numbers:
        with pytest.raises(StoppedError, match=r"saved after update .* the same command continues"):
            trained.train(stopping_at(run, number), tmp_path)
        assert not (tmp_path / "result.json").exists()
        assert signal.getsignal(signal.SIGTERM) is before
    result = trained.train(run, tmp_path)
    same = ["updates", "examples", "test_accuracy", "test_loss", "train_loss", "params_sha256"]
    assert {k: result[k] for k in same} == {k: expected[k] for k in same}
    assert records(tmp_path) == records(expected_directory)


def test_before_the_first_update_nothing_is_said_to_be_saved(run, tmp_path, monkeypatch):
    original = loop.restore

    def notified(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(loop, "restore", notified)
    with pytest.raises(StoppedError, match="told to stop: no update was done yet; the same"):
        trained.train(run, tmp_path)
    assert not list((tmp_path / "checkpoints").glob("*"))


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


@pytest.mark.parametrize("notice", preemption._NOTICES)
def test_every_notice_saves_and_is_told(run, undisturbed, tmp_path, notice):
    before = signal.signal(notice, signal.default_int_handler)
    try:
        with pytest.raises(StoppedError, match=r"saved after update \d of 20") as stopped:
            trained.train(stopping_at(run, 3, notice), tmp_path)
        assert signal.getsignal(notice) is signal.default_int_handler
    finally:
        signal.signal(notice, before)
    assert stopped.value.exit_status == 128 + notice
    assert trained.train(run, tmp_path)["params_sha256"] == undisturbed[1]["params_sha256"]


def test_a_notice_after_the_last_update_is_not_lost(run, undisturbed, tmp_path):
    def stop_at_the_end(record):
        if record["update"] == 20 and "test_loss" in record:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError, match="at its end"):
        trained.train(run, tmp_path, on_record=stop_at_the_end)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["params_sha256"] == undisturbed[1]["params_sha256"]


def test_a_second_sigint_does_not_wait_and_what_is_ignored_stays_so():
    hup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.notice == 0
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.exit_status == 143
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGHUP, hup)


# It computes for hours, in C, without a look at signals.
BUSY = """
import hashlib
from bigbatch.commands import interrupts
from bigbatch.training.preemption import StopRequest
interrupts.heed()
with StopRequest():
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


def test_a_second_sigint_ends_a_program_within_a_long_call():
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen([sys.executable, "-c", BUSY], **options) as process:
        assert process.stdout.readline() == "busy\n"
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == "\nbigbatch: ended at once; what was saved before stands\n"


def test_ctrl_c_saves_the_state_of_a_program(tmp_path, monkeypatch):
    monkeypatch.setenv(perceptron_run.WAIT_S, "0.1")
    command = ["tests.perceptron_run", "train", "--config=tests/perceptron_run.py"]
    process = start([*command, f"--workdir={tmp_path}", "--compilation-cache=off"], 1)
    wait_for_updates(tmp_path, [process], 2)
    process.send_signal(signal.SIGINT)
    [(status, text)] = ended([process])
    assert status == 130, text
    assert "bigbatch: told to stop: saved after update" in text
    assert "Traceback" not in text
    assert list((tmp_path / "checkpoints").iterdir())


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
