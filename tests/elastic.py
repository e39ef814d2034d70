"""A part of a run, on all devices of this process.

    python -m tests.elastic DIRECTORY SHARE STOP SHARD

Two runs, one in float32 with reproducible sums, one in float64 with plain ones, each in a workdir
of its own in DIRECTORY. Each begins, or goes on, as `bigbatch train` does. With a STOP such as
"until=1" it ends there; with a number this process is sent SIGTERM while it makes the microbatch
that holds the example at that position. What both have trained on, example by example, is added to
a file of this process.
"""

import contextlib
import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np

from bigbatch.config import assemble
from bigbatch.config.config import Config
from bigbatch.errors import StoppedError
from bigbatch.training.restore import restore
from bigbatch.workdir.checkpoint import Checkpoints
from bigbatch.workdir.files import Workdir
from tests import trained

RUNS = ("float32", "float64")
# 32, 64, 128 and 160 examples.
GROWTH = {"boundaries_epochs": [0.2, 0.4, 0.7], "factor": 0.5}
PLAN = {"ghost_batch_examples": 8, "policy": trained.DECAY | GROWTH}


def config(name: str, share: int, shard: str = "none") -> Config:
    fields = {"microbatch_examples_per_device": share, "shard": shard}
    return trained.quick(name, **PLAN, **fields, reproducible=name == "float32")


def part(directory: Path, name: str, share: int, stop: str, shard: str) -> dict[str, str]:
    """Trains up to the stop or the end; hashes of the examples that were made, by position."""
    asked, files, made = config(name, share, shard), Workdir(directory / name), {}
    data = assemble.load_data(asked)
    until = stop.removeprefix("until=") if stop.startswith("until=") else None

    class Recorded(type(data)):
        """The data set, which writes down what is made of it."""

        def training(self, seed, first, number):
            if until is None and first + number > int(stop):
                os.kill(os.getpid(), signal.SIGTERM)
            examples = super().training(seed, first, number)
            for offset in range(number):
                one = hashlib.sha256()
                for array in examples.values():
                    one.update(np.ascontiguousarray(array[offset]).tobytes())
                made[str(first + offset)] = one.hexdigest()
            return examples

    prepared = trained.prepared(asked, jax.device_count(), data=Recorded(**vars(data)))
    with contextlib.suppress(StoppedError):
        trained.train(prepared, files.path, until=until)
    with Checkpoints(files.checkpoints) as checkpoints:
        state, progress = restore(prepared, checkpoints)
    np.savez(directory / f"{name}.npz", *map(np.asarray, jax.tree.leaves(state[:2])))
    return {"updates": progress.updates, "examples": made}


def main(directory: str, share: str, stop: str, shard: str) -> None:
    found = {}
    for name in RUNS:
        jax.config.update("jax_enable_x64", name == "float64")
        found[name] = part(Path(directory), name, int(share), stop, shard)
    report = {"devices": jax.device_count(), **found}
    (Path(directory) / f"{jax.device_count()}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
