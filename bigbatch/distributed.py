"""Many processes, one run: how they start, agree and put values on the devices of all of them.

Every process runs the same command and the same program. Process 0 alone writes the working
directory; the others read it, so it must be a directory that all of them see. What a process
decides by itself (a file that is missing, a checkpoint that it cannot read) is told to all, and all
go on or end together: a process that left alone would leave the others waiting in a collective.

With one process everything here is the plain thing itself.
"""

import contextlib
import functools
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bigbatch.checks import Checks
from bigbatch.errors import Problem, RunError, StoppedError, UserError

Value = TypeVar("Value")

# A process that has not been heard of for so long is gone: the others end.
HEARTBEAT_TIMEOUT_S = 45
# Processes that are told of each other by hand have so long to find each other.
START_TIMEOUT_S = 120
# JAX's own, for hosts that a cluster starts one by one.
_CLUSTER_START_TIMEOUT_S = 300
_MOST_PROCESSES = 2**20
_LOST_WORDS = (
    "was ended from outside: by a signal, or by JAX because another process of this run has gone. "
    "Start all of them again: they continue from the newest checkpoint"
)
# Processes exchange messages of one size, so that one program serves them all.
_MESSAGE_BYTES = 4096
_LENGTH_BYTES = 8
# How the runtime's errors begin, some of which come as a ValueError.
_STATUS = re.compile(r"(ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL|UNAVAILABLE|UNKNOWN): ")
# The shell ends with its process, and not by what is sent to both.
_WITNESS = 'trap "" HUP INT TERM USR1 USR2; read -r line || echo "$1" >&2'
# With a frame of this type JAX's coordinator answers whoever connects, before it is asked.
_HTTP2_HEAD_BYTES, _HTTP2_SETTINGS, _ANSWER_S = 9, b"\4", 5.0
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


class Witness:
    """Stands beside a process of several until it is dismissed; nothing where there is no shell.

    When process 0 of a run goes, JAX aborts the others at once, on a thread of its own; Python is
    not asked. Nor is it where processes do not find each other. So a shell waits at the end of a
    pipe that only its process holds open. A process that ends by itself sends a line; where the
    pipe closes without one, the shell says what to do.

    Args:
      words: what it says of the process, where that ends before.
    """

    def __init__(self, words: str) -> None:
        text = f"bigbatch: process {os.getpid()} on {socket.gethostname()} {words}"
        shell = shutil.which("sh")
        self._shell = None
        if shell is not None:
            self._shell = subprocess.Popen(
                [shell, "-c", _WITNESS, shell, text],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
            )

    def dismiss(self) -> None:
        """Tells the shell that all is well; may be called again."""
        if self._shell is not None:
            with contextlib.suppress(BrokenPipeError):
                self._shell.communicate(b"\n")
            self._shell = None


def start(
    coordinator: str | None = None, num_processes: int | None = None, process: int | None = None
) -> None:
    """Joins the processes of a run, before JAX looks for devices. May be called again.

    Without arguments the processes are found where the environment tells of them: in a Slurm step
    of several tasks, and on the hosts of a Cloud TPU. Anywhere else there is one process. Where the
    others do not come in time, JAX aborts this process, and a `Witness` says so.

    Args:
      coordinator: HOST:PORT of process 0, reachable from all. It listens there and nowhere else.
      num_processes: how many there are.
      process: the number of this one, from 0.

    Raises:
      UserError: the arguments are incomplete or out of range.
      RunError: the others were not found.
    """
    given = {"coordinator": coordinator, "num-processes": num_processes, "process": process}
    if any(value is not None for value in given.values()):
        _check(given)
    elif not (_in_slurm_step() or _on_cloud_tpu()):
        return
    if jax.distributed.is_initialized():
        return
    if coordinator is not None:
        _check_door(coordinator, process)
    timeout_s = _CLUSTER_START_TIMEOUT_S if coordinator is None else START_TIMEOUT_S
    witness = Witness(_not_found_words(coordinator, num_processes, timeout_s))
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process,
            initialization_timeout=timeout_s,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            # Else it would listen on all interfaces: whoever reaches it can end the run.
            coordinator_bind_address=coordinator if process == 0 else None,
            cluster_detection_method=None if coordinator is None else "deactivate",
        )
    except ValueError as error:
        # A TPU that is no part of a cluster, such as a notebook's.
        if coordinator is None and not _in_slurm_step() and "should be defined" in str(error):
            return
        raise RunError(f"the processes of this run did not find each other: {error}") from error
    except RuntimeError as error:
        raise RunError(f"the processes of this run did not find each other: {error}") from error
    finally:
        witness.dismiss()


@contextlib.contextmanager
def joined(
    coordinator: str | None,
    num_processes: int | None,
    process: int | None,
    tell: Callable[[BaseException], int],
) -> Iterator[None]:
    """`start`, and an end that leaves no process behind.

    One of several processes that fails ends at once: other threads may wait for processes that are
    gone, and JAX would at its end. What ends it from outside, a `Witness` says.
    Processes that were told different numbers of processes are refused.

    Args:
      coordinator: as for `start`, like the next two.
      num_processes: how many there are.
      process: the number of this one.
      tell: says on standard error what has ended the run, and gives the exit status.
    """
    start(coordinator, num_processes, process)
    if not jax.distributed.is_initialized():
        yield
        return
    witness = Witness(_LOST_WORDS)
    try:
        # JAX goes by what process 0 was told, and would train without those beyond it.
        agree({"num-processes": num_processes}, "value")
        yield
    except StoppedError:
        witness.dismiss()
        raise
    except BaseException as error:
        status = tell(_lost(error) if is_of_runtime(error) else error)
        sys.stdout.flush()
        sys.stderr.flush()
        witness.dismiss()
        if getattr(error, "of_all", False):
            # Without process 0, JAX would abort the others before they have told.
            with contextlib.suppress(Exception):
                gather(b"")
        os._exit(status)
    witness.dismiss()


def is_of_runtime(error: BaseException) -> bool:
    """Whether the runtime has failed, as it does where a collective lacks a process."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return True
    return type(error) is ValueError and _STATUS.match(str(error)) is not None


def _not_found_words(coordinator: str | None, num_processes: int | None, timeout_s: int) -> str:
    """What to say of a process that ends before it has found the others."""
    words = (
        "was ended before it had found the others of its run: they did not come within "
        f"{timeout_s} s"
    )
    if coordinator is None:
        return f"{words}. Start all of them again"
    return (
        f"{words} at {coordinator}, or were told another number than {num_processes}. Start all of "
        "them again, with one --coordinator and one --num-processes for all, and for each a "
        "--process of its own"
    )


def _lost(error: BaseException) -> RunError:
    first_line = str(error).strip().splitlines()[0]
    return RunError(
        f"another process of this run has gone, or the connection to it ({first_line}). Start all "
        "of them again: they continue from the newest checkpoint"
    )


def say(text: str) -> None:
    """Prints a line, on process 0 only."""
    if is_first():
        print(text)


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def gather(message: bytes) -> list[bytes]:
    """One message of every process, by process; all must call."""
    # A process that was not joined to others need not start a device to know.
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return [message]
    framed = len(message).to_bytes(_LENGTH_BYTES, "little") + message
    received: list[bytes] = [b""] * jax.process_count()
    while True:
        piece = framed[len(received[0]) :][:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
        sharding, exchange = _exchange()
        row = np.frombuffer(piece, np.uint8)[None]
        shape = (len(received), _MESSAGE_BYTES)
        pieces = exchange(jax.make_array_from_process_local_data(sharding, row, shape))
        received = [
            old + new.tobytes()
            for old, new in zip(received, np.asarray(pieces.addressable_data(0)), strict=True)
        ]
        lengths = [int.from_bytes(text[:_LENGTH_BYTES], "little") for text in received]
        if len(received[0]) >= _LENGTH_BYTES + max(lengths):
            bodies = zip(received, lengths, strict=True)
            return [text[_LENGTH_BYTES : _LENGTH_BYTES + length] for text, length in bodies]


@functools.cache
def _exchange() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    """How a row of each process is placed, and the program that gives all rows to all.

    It takes one device of each process, so processes with other numbers of them can still agree
    that this will not do, which JAX's own `process_allgather` cannot.
    """
    first: dict[int, jax.Device] = {}
    for device in jax.devices():
        first.setdefault(device.process_index, device)
    mesh = Mesh(np.array([first[process] for process in sorted(first)]), ("process",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    program = jax.jit(lambda rows: rows, out_shardings=everywhere)
    return NamedSharding(mesh, PartitionSpec("process")), program


def together(function: Callable[[], Value]) -> Value:
    """Calls a function on every process; where one fails, all fail.

    Returns:
      This process's value.

    Raises:
      UserError, RunError: what this process's call raised, or in words what another's did.
    """
    failure: Exception | None = None
    try:
        value = function()
    except (UserError, RunError) as error:
        failure = error
    others = gather(json.dumps(failure and str(failure)).encode())
    if failure is not None:
        raise _of_all(failure)
    for process, text in enumerate(others):
        message = json.loads(text)
        if message is not None:
            raise _of_all(RunError(f"process {process} cannot go on: {message}"))
    return value


def on_first(function: Callable[[], None]) -> None:
    """Calls a function on process 0; the others wait for it, and fail if it fails."""
    together(function if is_first() else lambda: None)


def devices() -> dict[str, Any]:
    """How many devices of which kind this process has; nothing where it is the only one."""
    if not jax.distributed.is_initialized():
        return {}
    own = jax.local_devices()
    return {"devices": len(own), "device kind": own[0].device_kind}


def agree(facts: Mapping[str, Any], what: str) -> None:
    """Makes sure that all processes hold the same facts.

    Args:
      facts: plain values by name.
      what: what they are, in words.

    Raises:
      UserError: with every fact that differs, and the processes that differ from process 0.
    """
    facts = json.loads(json.dumps(facts))
    everyone = [json.loads(text) for text in gather(json.dumps(facts).encode())]
    problems = []
    for name in sorted({name for facts in everyone for name in facts}):
        values = [json.dumps(facts.get(name)) for facts in everyone]
        unlike = [process for process, value in enumerate(values) if value != values[0]]
        if unlike:
            given = ", ".join(f"process {process}: {values[process]}" for process in unlike[:4])
            allowed = f"one {what} for all processes; process 0 has {values[0]}"
            problems.append(Problem(name, given, allowed))
    if problems:
        raise _of_all(UserError(problems))


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Puts host values, which every process holds in full, on the devices of all processes."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def leaf(value: Any) -> jax.Array:
        array = np.asarray(value)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(leaf, tree)


def _of_all(error: Exception) -> Exception:
    """Marks an error that every process raises."""
    error.of_all = True  # type: ignore[attr-defined]
    return error


def _check(given: Mapping[str, Any]) -> None:
    """Refuses flags that do not name one process of several."""
    checks = Checks()
    for name, value in given.items():
        allowed = "given together with the other two of " + ", ".join(f"--{n}" for n in given)
        checks.require(value is not None, name, "nothing", allowed)
    checks.done()
    host, _, port = given["coordinator"].rpartition(":")
    allowed = "HOST:PORT of process 0, with a port from 1 to 65535"
    fits = bool(host) and port.isdecimal() and 1 <= int(port) <= 65535
    checks.require(fits, "coordinator", given["coordinator"], allowed)
    count, allowed = given["num-processes"], f"a whole number from 1 to {_MOST_PROCESSES:,}"
    if checks.whole("num-processes", count, allowed) and checks.require(
        count <= _MOST_PROCESSES, "num-processes", count, allowed, _MOST_PROCESSES
    ):
        last = given["num-processes"] - 1
        nearest = min(max(given["process"], 0), last)
        allowed = f"a whole number from 0 to {last}"
        checks.require(nearest == given["process"], "process", given["process"], allowed, nearest)
    checks.done()


def _check_door(coordinator: str, process: int | None) -> None:
    """Refuses a port that is another program's, or is none of this host's.

    JAX's coordinator would share it, and the other processes would wait for minutes.
    """
    host, _, port = coordinator.rpartition(":")
    host, allowed = host.strip("[]"), "an address of the host of process 0, and a port that is free"
    if process == 0:
        try:
            family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as door:
                door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                door.bind(address)
        except (OSError, UnicodeError) as error:
            words = f"{allowed} ({error})"
            raise UserError(Problem("coordinator", coordinator, words)) from error
        return
    try:
        peer = socket.create_connection((host, int(port)), _ANSWER_S)
    except (OSError, UnicodeError):
        # It may not have begun yet.
        return
    with peer, contextlib.suppress(OSError):
        if peer.recv(_HTTP2_HEAD_BYTES, socket.MSG_WAITALL)[3:4] == _HTTP2_SETTINGS:
            return
    raise UserError(Problem("coordinator", coordinator, f"{allowed}: another program answers"))


def _in_slurm_step() -> bool:
    """Whether this is one of several tasks that `srun` has started."""
    return all(name in os.environ for name in _SLURM) and int(os.environ["SLURM_NTASKS"]) > 1


def _on_cloud_tpu() -> bool:
    """Whether this host has TPUs that JAX would use."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return importlib.util.find_spec("libtpu") is not None and "cpu" not in platforms.split(",")[:1]
