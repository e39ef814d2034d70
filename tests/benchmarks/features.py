"""What each feature adds to an update.

    python -m tests.benchmarks.features [ROUNDS] > tests/benchmarks/results/features.md

Digits, WRN-10-1, updates of one microbatch (*reproducible*: one a ghost batch and device).
Variants that differ in their programs are timed as accumulate + apply_update, one update of each by
turns in one process; event files and checkpoints are timed as what the loop calls for them. On
several (virtual) devices each update is waited for. The ratio is to the update without the feature
in the same round, of the same number of devices.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

EXAMPLES = 256
_AVERAGE = {"name": "momentum", "weight_decay": 5e-4, "average_examples": 1437.0}
# Devices -> variants; the first is the plain one. Ghost batches of 32 unless it says otherwise.
VARIANTS = {
    1: {
        "plain": {},
        "noise measured, small batches of 128": {"noise_small_batch_examples": 128},
        "noise measured, small batches of 32": {"noise_small_batch_examples": 32},
        "reproducible": {"reproducible": True},
        "average of the parameters": {"optimizer": _AVERAGE},
    },
    8: {
        "plain": {},
        "noise measured, small batches of 32 (a device's share)": {
            "noise_small_batch_examples": 32
        },
        "ghost batches of 64, over 2 devices": {"ghost_batch_examples": 64},
        "ghost batches of 256, over 8 devices": {"ghost_batch_examples": 256},
        "optimizer divided over the devices": {"shard": "update"},
        "reproducible": {"reproducible": True},
    },
}


def config(changes: dict, devices: int):
    """The config of a variant."""
    from bigbatch.config.config import read_config
    from tests import trained

    constant = {"name": "constant", "learning_rate": 0.01, "batch_size": EXAMPLES, "momentum": 0.9}
    share = EXAMPLES // devices
    tree = trained.tree(policy=constant, transformations=[], microbatch_examples_per_device=share)
    return read_config({**tree, "model": {**tree["model"], "strides": [1, 2, 1]}} | changes)


class Variant:
    """One config's programs and the microbatches of an update: one, or one a unit and device."""

    def __init__(self, changes: dict, devices: int) -> None:
        import jax

        from bigbatch.training.microbatches import Request
        from tests import trained

        self.run = trained.prepared(config(changes, devices), devices)
        self.state, self.accumulator = self.run.init_state(), self.run.programs.empty_accumulator()
        self.parts = [
            self.run.microbatch(Request(part.offset_examples, part))
            for part in self.run.layout.microbatches(EXAMPLES)
        ]
        self.hyper = {name: np.float32(0.01) for name in self.run.optimizer.hyper_names}
        self.wait = jax.block_until_ready

    def update_s(self) -> float:
        """Seconds of one update."""
        programs, start_s = self.run.programs, time.perf_counter()
        for size, examples in self.parts:
            self.accumulator = programs.accumulate[size](
                self.state, self.accumulator, examples, self.run.frozen
            )
        self.state, self.accumulator, _ = programs.apply_update(
            self.state, self.accumulator, self.hyper
        )
        self.wait((self.state, self.accumulator))
        return time.perf_counter() - start_s


def measure(devices: int, rounds: int) -> list[str]:
    """The rows of one number of devices, in this process."""
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    variants = {name: Variant(changes, devices) for name, changes in VARIANTS[devices].items()}
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 2):
        for name, variant in variants.items():
            seconds = variant.update_s()
            if number > 1:
                taken[name].append(seconds)
    plain = np.array(taken["plain"])
    rows = [row(devices, name, np.array(found), plain) for name, found in taken.items()]
    if devices == 1:
        rows += beside(variants["plain"], plain, rounds)
    return rows


def beside(plain_variant: Variant, plain: np.ndarray, rounds: int) -> list[str]:
    """Rows of what the host does beside the programs: an event record, a checkpoint."""
    from bigbatch.workdir.checkpoint import Checkpoints
    from bigbatch.workdir.event_files import EventFiles

    record = {
        "update": 1,
        "examples": 256,
        "epoch": 0.1,
        "batch_size": 256,
        "learning_rate": 0.1,
        "momentum": 0.9,
        "noise_scale": 44.9,
        "train_loss": 2.3,
        "examples_per_s": 7000.0,
        "input_wait_s": 0.0,
    }
    with tempfile.TemporaryDirectory() as directory:
        files = EventFiles(
            Path(directory) / "events",
            last_update=0,
            config={},
            metrics=["train_loss"],
        )
        events = []
        for _ in range(rounds):
            # A group of records, as they are written together.
            start_s = time.perf_counter()
            for _ in range(128):
                files.write(record)
            events.append((time.perf_counter() - start_s) / 128)
        files.close()
        saves = []
        with Checkpoints(Path(directory) / "checkpoints", keep=2) as checkpoints:
            for number in range(1, 8):
                start_s = time.perf_counter()
                checkpoints.save(number, plain_variant.state, {"run": "x"})
                saves.append(time.perf_counter() - start_s)
                time.sleep(0.5)
    base = np.median(plain)
    rows = []
    for name, found in {
        "event files, a record of 8 values": np.array(events),
        "a checkpoint, what the loop waits for it": np.array(saves[1:]),
    }.items():
        low, high = np.percentile(found, (25, 75))
        middle = np.median(found)
        cells = (
            "1",
            name,
            f"+ {1e3 * middle:.3f} ({1e3 * low:.3f} to {1e3 * high:.3f})",
            f"+ {middle / base:.3f} of an update",
            "",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def row(devices: int, name: str, found: np.ndarray, plain: np.ndarray) -> str:
    """One line of the table."""
    low, middle, high = np.percentile(found / plain, (25, 50, 75))
    cells = (
        str(devices),
        name,
        f"{1e3 * np.median(found):.2f}",
        f"{middle:.3f}",
        f"{low:.3f} to {high:.3f}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(int(sys.argv[2]), int(sys.argv[3]))))
        return
    import jax

    rounds = sys.argv[1] if len(sys.argv) > 1 else "51"
    print(f"# Cost of each feature\n\n{__doc__.strip()}\n")
    print(
        f"{platform.machine()}, {os.cpu_count()} CPU cores, jax {jax.__version__}, Python "
        f"{platform.python_version()}; {rounds} rounds, medians and quartiles.\n"
    )
    print("| devices | update | ms | ratio | quartiles |\n| ---: | --- | ---: | ---: | ---: |")
    for devices in VARIANTS:
        command = [sys.executable, "-m", "tests.benchmarks.features", "--measure"]
        command += [str(devices), rounds]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        print("\n".join(json.loads(output.splitlines()[-1])), flush=True)


if __name__ == "__main__":
    main()
