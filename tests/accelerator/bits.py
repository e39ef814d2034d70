"""Whether a killed run ends with the same bits, and at which price.

XLA measures which algorithm of a convolution is fastest each time that it compiles one, and another
choice gives other last bits. A program from the compilation cache keeps its choice.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Flags, and whether programs are kept, what matters most first.
TRIED = (
    ("", True),
    ("", False),
    ("--xla_gpu_deterministic_ops=true", False),
    ("--xla_gpu_autotune_level=0", False),
    ("--xla_gpu_exclude_nondeterministic_ops=false", True),
)


def rows(toy: bool, _: str) -> Iterator[dict[str, Any]]:
    """Per set of flags, with and without the compilation cache: one hash, and the seconds."""
    import jax

    changes = ["--config.epochs=2", "--config.log_every_updates=1"]
    changes += ["--config.checkpoint_every_updates=10"]
    if not toy:
        changes[0] = "--config.epochs=15"
    for number, (flags, cached) in enumerate(TRIED):
        if flags and jax.default_backend() != "gpu":
            continue
        with tempfile.TemporaryDirectory() as directory:
            cache = f"{directory}/programs" if cached else "off"
            found = _killed(Path(directory), flags, cache, changes)
        yield {"flags": flags or "default", "cache": cached} | found
        if number == 1:
            yield _cut(changes)


def _cut(changes: list[str]) -> dict[str, Any]:
    """Reproducible sums, whatever the microbatch."""
    with tempfile.TemporaryDirectory() as directory:
        hashes = set()
        for microbatch in (32, 64, 128):
            own = [f"--config.microbatch_examples_per_device={microbatch}"]
            own += ["--config.reproducible=True", *changes]
            started = _start(Path(directory) / str(microbatch), "", f"{directory}/programs", own)
            hashes.add(_result(started)["params_sha256"])
    what = "reproducible, microbatches of 1, 2 and 4 ghost batches"
    return {"flags": what, "cache": True, "same bits": len(hashes) == 1}


def _start(
    directory: Path, flags: str, cache: str, changes: list[str]
) -> tuple[subprocess.Popen, Path]:
    command = [sys.executable, "-m", "bigbatch", "train", "--config=configs/digits.py:increase"]
    command += [*changes, f"--workdir={directory}", f"--compilation-cache={cache}"]
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    return process, directory


def _result(started: tuple[subprocess.Popen, Path]) -> dict[str, Any]:
    process, directory = started
    if process.wait():
        raise RuntimeError(f"a run ended with status {process.returncode}")
    found: dict[str, Any] = json.loads((directory / "result.json").read_text())
    return found


def _killed(directory: Path, flags: str, cache: str, changes: list[str]) -> dict[str, Any]:
    """One run undisturbed, another killed in its 13th update and begun again."""
    start_s = time.monotonic()
    undisturbed = _result(_start(directory / "undisturbed", flags, cache, changes))
    seconds = time.monotonic() - start_s
    process, killed = _start(directory / "killed", flags, cache, changes)
    log = killed / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 12):
        time.sleep(0.01)
    process.kill()
    process.wait()
    again = _result(_start(killed, flags, cache, changes))
    return {
        "same bits": again["params_sha256"] == undisturbed["params_sha256"],
        "was killed": process.returncode == -9,
        "updates": undisturbed["updates"],
        "s of a whole start": seconds,
        "s of training": undisturbed["seconds"],
    }
