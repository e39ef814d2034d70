"""The whole training loop against its bare compiled functions: examples/s, and the host's time.

    python -m tests.benchmarks.trainer [WORK ...] > tests/benchmarks/results/trainer.md

*Loop* is `bigbatch.train`: input, logging of every update (JSON lines and event files), the
watchdog, checkpoints at the config's interval. *Bare* calls the same compiled accumulate and
apply_update on one microbatch that lies on the devices, with hyperparameters that do too. Both run
in one process, a stretch of the one and a stretch of the other by turns, inside one run of the
loop; the first of each is not counted. Evaluation is off in both: it is work, not overhead.
*Host* is the loop's time per update where the compiled functions are replaced by ones that return
at once: without the input, and with it, whose thread then has nothing to hide behind.
"""

import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

# Name -> (config file, overrides, virtual devices, updates in a stretch, rounds). A stretch of the
# digits is a whole run of theirs, 30 epochs, with its checkpoint.
_DIGITS = {"microbatch_examples_per_device": 32}
_WRN = {
    "ghost_batch_examples": 64,
    "microbatch_examples_per_device": 64,
    "policy.batch_size": 64,
}
_LANGUAGE = {"evaluate_every_tokens": 10**12, "evaluate_every_epochs": None}
WORKS = {
    "digits": ("configs/digits.py:decay", _DIGITS, 1, 1350, 15),
    "digits-noise": (
        "configs/digits.py:decay",
        {"policy.batch_size": 64, "noise_small_batch_examples": 32},
        1,
        675,
        15,
    ),
    "digits-8-devices": (
        "configs/digits.py:decay",
        {"policy.batch_size": 256, "microbatch_examples_per_device": 32},
        8,
        170,
        11,
    ),
    "wrn16-4": ("configs/cifar10.py:decay", _WRN, 1, 6, 5),
    # Batches of 4 sequences of 128 tokens; a checkpoint every 293 updates, and none.
    "language": ("configs/language.py:cosine", _LANGUAGE, 1, 100, 9),
    "language-no-checkpoint": (
        "configs/language.py:cosine",
        {**_LANGUAGE, "checkpoint_every_tokens": 10**12, "keep_every_tokens": None},
        1,
        100,
        9,
    ),
    "wrn16-4-8-devices": (
        "configs/cifar10.py:decay",
        {**_WRN, "ghost_batch_examples": 8, "microbatch_examples_per_device": 8},
        8,
        6,
        5,
    ),
}
HOST_UPDATES = 2_000
COLUMNS = (
    "work",
    "devices",
    "batch size",
    "rounds x updates",
    "bare, examples/s",
    "loop, examples/s",
    "loop / bare",
    "quartiles",
    "host, ms an update",
    "host with input, ms",
)


def measure(name: str) -> dict:
    """One work, in this process."""
    import jax

    from bigbatch.config.file import load_config
    from bigbatch.data.dataset import arrays, data_set
    from bigbatch.engine import functions as step
    from bigbatch.layout.layout import Microbatch
    from bigbatch.training import loop as train
    from bigbatch.training.microbatches import Request
    from tests import trained

    reference, changes, devices, stretch, rounds = WORKS[name]
    jax.config.update("jax_num_cpu_devices", devices)
    needed = max((rounds + 1) * stretch, HOST_UPDATES) + 10
    overrides = {"evaluate_every_epochs": 1_000_000, **changes}
    config = load_config(reference, [(key, str(value)) for key, value in overrides.items()])
    batch_size = int(config.plan.batch_sizes[0])
    plan = dataclasses.replace(
        config.plan,
        batch_sizes=config.plan.batch_sizes[:1].repeat(needed),
        hypers={key: column[:1].repeat(needed) for key, column in config.plan.hypers.items()},
    )
    info = config.data.info
    data = None
    if hasattr(info, "image_shape") and info.name != "digits":
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (info.train_examples, *info.image_shape), np.uint8)
        noise = arrays(images, rng.integers(0, info.num_classes, len(images)))
        test = arrays(images[: info.test_examples], noise.labels[: info.test_examples])
        data = data_set(info, noise, test, config.data.augment, config.data.on_device)
    run = trained.prepared(config, devices, plan, data=data)
    part = run.layout.microbatches(batch_size)
    assert len(part) == 1
    size, examples = run.microbatch(Request(0, Microbatch(0, batch_size, batch_size // devices)))
    sharded = jax.sharding.NamedSharding(run.mesh, step.SHARDED)
    examples = jax.device_put(dict(examples), sharded)
    hyper = jax.device_put(
        {key: np.float32(run.plan.hypers[key][0]) for key in run.optimizer.hyper_names},
        jax.sharding.NamedSharding(run.mesh, step.REPLICATED),
    )
    accumulate, apply_update = run.programs.accumulate[size], run.programs.apply_update
    own = [run.init_state(), run.programs.empty_accumulator(), None]

    def bare() -> float:
        """Seconds of a stretch of the bare functions."""
        state, accumulator, _ = own
        start_s = time.perf_counter()
        for _ in range(stretch):
            accumulator = accumulate(state, accumulator, examples, run.frozen)
            state, accumulator, sums = apply_update(state, accumulator, hyper)
            if devices > 1:
                jax.block_until_ready(state)
        jax.block_until_ready((state, accumulator, sums))
        own[:] = state, accumulator, sums
        return time.perf_counter() - start_s

    taken: dict[str, list[float]] = {"loop": [], "bare": []}
    updates = train.updates

    class EndError(Exception):
        pass

    def by_turns(*arguments):
        begin_s = time.perf_counter()
        for row, state, sums in updates(*arguments):
            if row.update and row.update % stretch == 0:
                jax.block_until_ready(state)
                taken["loop"].append(time.perf_counter() - begin_s)
                taken["bare"].append(bare())
                if len(taken["loop"]) == rounds + 1:
                    raise EndError
                begin_s = time.perf_counter()
            yield row, state, sums

    def train_with(run, instead_of_updates) -> None:
        with tempfile.TemporaryDirectory() as directory:
            train.updates = instead_of_updates
            try:
                trained.train(run, Path(directory))
            except EndError:
                pass
            finally:
                train.updates = updates

    train_with(run, by_turns)
    result = tuple(own)
    programs = dataclasses.replace(
        run.programs,
        accumulate={size: lambda state, accumulator, examples, frozen: result[1]},
        apply_update=lambda state, accumulator, hyper: result,
    )
    empty = dataclasses.replace(run, programs=programs)
    host_s = {}
    for kind, instead in {
        "host": dataclasses.replace(empty, microbatch=lambda request: (size, examples)),
        "host with input": empty,
    }.items():
        moments: list[float] = []

        def timed(*arguments, moments=moments):
            for one in updates(*arguments):
                moments.append(time.perf_counter())
                if len(moments) == HOST_UPDATES:
                    raise EndError
                yield one

        train_with(instead, timed)
        host_s[kind] = np.percentile(np.diff(moments[100:]), (50, 25, 75)).tolist()
    return {
        "batch_size": batch_size,
        "stretch": stretch,
        "rounds": rounds,
        "devices": devices,
        "loop_s": taken["loop"][1:],
        "bare_s": taken["bare"][1:],
        "host_s": host_s,
        "jax": jax.__version__,
    }


def row(name: str, found: dict) -> tuple[str, ...]:
    """The cells of one line of the table."""
    loop, bare = np.array(found["loop_s"]), np.array(found["bare_s"])
    examples = found["stretch"] * found["batch_size"]
    low, middle, high = np.percentile(bare / loop, (25, 50, 75))
    host = [
        f"{1e3 * s[0]:.2f} ({1e3 * s[1]:.2f} to {1e3 * s[2]:.2f})" for s in found["host_s"].values()
    ]
    return (
        name,
        str(found["devices"]),
        f"{found['batch_size']}",
        f"{found['rounds']} x {found['stretch']}",
        f"{examples / np.median(bare):,.1f}",
        f"{examples / np.median(loop):,.1f}",
        f"{middle:.3f}",
        f"{low:.3f} to {high:.3f}",
        *host,
    )


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2])))
        return
    names = sys.argv[1:] or list(WORKS)
    print(f"# The training loop against its bare compiled functions\n\n{__doc__.strip()}\n")
    for number, name in enumerate(names):
        command = [sys.executable, "-m", "tests.benchmarks.trainer", "--measure", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        if not number:
            print(
                f"{platform.machine()}, {os.cpu_count()} CPU cores, jax {found['jax']}, Python "
                f"{platform.python_version()}. Medians, and quartiles over the rounds.\n"
            )
            print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
        print(f"| {' | '.join(row(name, found))} |", flush=True)


if __name__ == "__main__":
    main()
