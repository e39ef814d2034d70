"""Processes that are killed, stopped or unlike each other: all end with a word, and all go on."""

import json
import os
import resource
import signal
import time
from pathlib import Path

import pytest

from tests import perceptron_run
from tests.storm import records
from tests.test_distributed import ended, free_port, start

# The time that the issue gives a process to notice that another one has gone.
END_S = 60
AGAIN = "Start all of them again: they continue from the newest checkpoint"


def flags_of(directory: Path, port: int, process: int, num_processes: int = 2) -> list[str]:
    return [
        *("tests.perceptron_run", "train", "--config=tests/perceptron_run.py"),
        *(f"--workdir={directory}", f"--coordinator=127.0.0.1:{port}"),
        *(f"--num-processes={num_processes}", f"--process={process}", "--config.shard=update"),
    ]


def begin(directory: Path, monkeypatch, wait_s: float = 0.0) -> list:
    """Two processes, with one device each."""
    monkeypatch.setenv(perceptron_run.WAIT_S, str(wait_s))
    port = free_port()
    return [start(flags_of(directory, port, process), 1) for process in (0, 1)]


def result(directory: Path) -> dict:
    return json.loads((directory / "result.json").read_text())


def wait_for_updates(directory: Path, processes: list, number: int) -> None:
    """Returns when so many more updates are in the log than before."""

    def update() -> int:
        found = records(directory) if (directory / "metrics.jsonl").exists() else []
        return max((record["update"] for record in found), default=0)

    before = update()
    while all(process.poll() is None for process in processes) and update() < before + number:
        time.sleep(0.01)


@pytest.fixture(scope="module")
def slurm_environment():
    """Starts two processes that find each other by what `srun` would have set."""

    def begin(directory: Path, **options) -> list:
        processes = []
        with pytest.MonkeyPatch.context() as patch:
            for process in ("0", "1"):
                for name, value in {
                    "SLURM_JOB_ID": str(os.getpid()),
                    "SLURM_STEP_NODELIST": "localhost",
                    "SLURM_STEP_NUM_NODES": "1",
                    "SLURM_NTASKS": "2",
                    "SLURM_PROCID": process,
                    "SLURM_LOCALID": process,
                }.items():
                    patch.setenv(name, value)
                processes.append(start(flags_of(directory, 0, 0)[:4], 1, **options))
        return processes

    return begin


@pytest.fixture(scope="module")
def slurm(slurm_environment, tmp_path_factory):
    """A run of two such processes."""
    directory = tmp_path_factory.mktemp("slurm")
    texts = [text for status, text in ended(slurm_environment(directory)) if status == 0]
    return directory, texts


def test_in_a_slurm_step_processes_find_each_other(slurm):
    directory, texts = slurm
    assert len(texts) == 2, texts
    assert result(directory)["updates"] == 20
    # Process 0 alone shows the evaluations: a process by itself would.
    assert ["update 20 of 20" in text for text in texts] == [True, False]


@pytest.fixture(scope="module")
def undisturbed(slurm):
    return slurm[0]


KILL, TERM = signal.SIGKILL, signal.SIGTERM
STORMS = {
    "each killed once, one told to stop": [(KILL, [0]), (TERM, [1]), (KILL, [1])],
    "told to stop": [(TERM, [0]), (TERM, [0, 1])],
}


def test_a_process_that_cannot_write_ends_all_of_them(tmp_path, monkeypatch):
    """Its part of a checkpoint; process 0 waits for it to be written."""
    monkeypatch.setenv(perceptron_run.HEARTBEAT_TIMEOUT_S, "10")
    processes = begin(tmp_path, monkeypatch, wait_s=0.3)
    wait_for_updates(tmp_path, processes, 1)
    # As on a full disk.
    resource.prlimit(processes[1].pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    (_, first), (status, second) = ended(processes, END_S)
    assert status == 1
    assert "a checkpoint could not be written" in second
    assert AGAIN in first
    assert [status for status, _ in ended(begin(tmp_path, monkeypatch))] == [0, 0]


@pytest.mark.parametrize(
    "storm",
    [
        STORMS["each killed once, one told to stop"],
        pytest.param(STORMS["told to stop"], marks=pytest.mark.long),
    ],
    ids=STORMS,
)
def test_the_same_command_goes_on_after_a_process_was_lost(
    undisturbed, tmp_path, monkeypatch, storm
):
    for number, targets in storm:
        # So slow that no start comes near the last update before its signal, on any machine.
        # Evaluations and checkpoints are due every few updates.
        processes = begin(tmp_path, monkeypatch, wait_s=0.3)
        wait_for_updates(tmp_path, processes, 2)
        for target in targets:
            processes[target].send_signal(number)
        for process, (status, text) in enumerate(ended(processes, END_S)):
            if number == TERM:
                assert status == 143, text
                assert "told to stop: saved after update" in text
            elif process in targets:
                assert status == -KILL
            else:
                # JAX may have aborted it before it could end by itself.
                assert status in (1, -signal.SIGABRT), text
                assert AGAIN in text
        assert not (tmp_path / "result.json").exists()
    for status, text in ended(begin(tmp_path, monkeypatch)):
        assert status == 0, text
    assert result(tmp_path)["params_sha256"] == result(undisturbed)["params_sha256"]
    assert records(tmp_path) == records(undisturbed)


@pytest.mark.long
def test_what_slurm_sends_saves_and_has_its_own_status(
    slurm, slurm_environment, tmp_path, monkeypatch
):
    """`--signal=USR1@60` and USR2 to all tasks, then `scancel`: CONT and TERM to whole groups."""
    monkeypatch.setenv(perceptron_run.WAIT_S, "0.3")
    sent = ([signal.SIGUSR1], [signal.SIGUSR2], [signal.SIGCONT, TERM])
    for numbers in sent:
        # A group has the shell that stands beside a process, too.
        processes = slurm_environment(tmp_path, start_new_session=True)
        wait_for_updates(tmp_path, processes, 2)
        for number in numbers:
            for process in processes:
                os.killpg(process.pid, number)
        for status, text in ended(processes, END_S):
            assert status == 128 + numbers[-1], text
            assert "bigbatch: told to stop: saved after update" in text
            assert "was ended from outside" not in text
    monkeypatch.delenv(perceptron_run.WAIT_S)
    assert [status for status, _ in ended(slurm_environment(tmp_path))] == [0, 0]
    assert result(tmp_path)["params_sha256"] == result(slurm[0])["params_sha256"]
    assert records(tmp_path) == records(slurm[0])


def test_processes_that_differ_are_refused_on_all(tmp_path):
    """By the config, and by the number of devices; all at once, and nothing is written."""
    port = free_port()
    processes = [
        start(flags_of(tmp_path / "run", port, 0), 1),
        start([*flags_of(tmp_path / "run", port, 1), "--config.policy.learning_rate=0.2"], 2),
    ]
    for status, text in ended(processes):
        assert status == 2, text
        assert "policy.learning_rate: given 'process 1: 0.2'" in text
        assert "devices: given 'process 1: 2'; allowed: one value for all processes" in text
        assert "process 0 has 1" in text
    assert not (tmp_path / "run").exists()


def test_a_process_told_of_more_than_process_0_was_is_refused(tmp_path):
    port, told = free_port(), ((0, 2), (1, 3))
    for status, text in ended([start(flags_of(tmp_path / "run", port, *one), 1) for one in told]):
        assert status == 2, text
        words = "num-processes: given 'process 1: 3'; allowed: one value for all processes"
        assert f"{words}; process 0 has 2" in text
    assert not (tmp_path / "run").exists()


def test_processes_that_do_not_find_each_other_end_with_a_word(tmp_path, monkeypatch):
    """Process 0 waits for one that nobody has started, and so do all."""
    monkeypatch.setenv(perceptron_run.START_TIMEOUT_S, "5")
    port, told = free_port(), ((0, 3), (1, 2))
    processes = [start(flags_of(tmp_path / "run", port, *one), 1) for one in told]
    for (status, text), (_, num_processes) in zip(ended(processes), told, strict=True):
        assert status == -signal.SIGABRT, text
        words = f"they did not come within 5 s at 127.0.0.1:{port}, or were told another number"
        assert f"{words} than {num_processes}. Start all of them again, with one" in text
    assert not (tmp_path / "run").exists()


def test_out_of_memory_on_one_process_halves_the_microbatch_on_both(undisturbed, tmp_path):
    port, processes = free_port(), []
    for process in (0, 1):
        with pytest.MonkeyPatch.context() as patch:
            if process == 1:
                patch.setenv(perceptron_run.OUT_OF_MEMORY_ABOVE, "64")
            microbatch = "--config.microbatch_examples_per_device=64"
            processes.append(start([*flags_of(tmp_path, port, process), microbatch], 1))
    (status, text), (other_status, other_text) = ended(processes)
    assert (status, other_status) == (0, 0), text + other_text
    assert "out of device memory; now microbatches of up to 32 examples a device" in text
    # From the first update of 160 examples on its microbatches are those of the other run.
    assert result(tmp_path)["params_sha256"] == result(undisturbed)["params_sha256"]
    kept = json.loads((tmp_path / "microbatch.json").read_text())
    assert kept["chosen_examples_per_device"] == 32
