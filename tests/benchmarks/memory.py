"""Peak memory of an update of 65,536 examples, beside one microbatch's and a plain `jit`'s.

    python -m tests.benchmarks.memory [runs] > tests/benchmarks/results/memory_cpu.md

Images of 32x32 pixels, one convolution with ghost norm, microbatches and ghost batches of 128, one
device. Every run is a process of its own. `programs`: what XLA says that the largest program needs,
arguments, results and temporaries. `resident`: the largest resident memory of the process (on a CPU
the device's and the host's together), the median of the runs and their range; `grown` is its median
growth since just before the first update. The plain program is one gradient of the mean loss over
the whole batch and one heavy-ball step, of the same network with the same ghost batches; where its
batch would take most of this machine it is compiled and not run.
"""

import functools
import json
import platform
import resource
import statistics
import subprocess
import sys

MIB = 2**20
GHOST, CLASSES, TRAIN_EXAMPLES = 128, 10, 2_048
SHAPE = (32, 32, 3)
# The smallest is one microbatch. All but the last train on as many examples, in several updates.
BATCHES = (GHOST, 1_024, 8_192, 65_536)
PLAIN_BATCHES = (GHOST, 1_024, 8_192)
LEAST_EXAMPLES = 8_192


def resident_bytes() -> int:
    """The largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def task_and_arrays():
    """The network, and random images of as many classes."""
    import jax.numpy as jnp
    import numpy as np

    from bigbatch.models.classification import image_classification
    from tests.elastic import Network

    module = Network(CLASSES, GHOST, axis_name="data", dtype=jnp.dtype("float32"))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (TRAIN_EXAMPLES, *SHAPE), np.uint8)
    labels = rng.integers(0, CLASSES, TRAIN_EXAMPLES, np.int32)
    mean, std = (127.5,) * 3, (74.0,) * 3
    return image_classification(module, SHAPE, mean, std), {"image": images, "label": labels}


def ours(batch_size: int) -> dict[str, int]:
    """The updates by the trainer."""
    import jax

    import bigbatch
    from bigbatch.engine import functions as step
    from bigbatch.engine.optimizer import Momentum
    from bigbatch.training.prepare import prepare
    from bigbatch.training.updates import updates

    task, arrays = task_and_arrays()
    examples = max(LEAST_EXAMPLES, batch_size)
    plan = bigbatch.make_plan(
        bigbatch.constant(0.01, batch_size, 0.9),
        train_examples=TRAIN_EXAMPLES,
        epochs=examples / TRAIN_EXAMPLES,
        batch_multiple_examples=GHOST,
    )
    run = prepare(
        task,
        arrays,
        plan,
        Momentum(),
        microbatch_examples_per_device=GHOST,
        ghost_batch_examples=GHOST,
        mesh=step.data_mesh(jax.devices()[:1]),
    )
    start = jax.block_until_ready(run.init_state())
    before, done = resident_bytes(), 0
    for _, state, _ in updates(run, start, 0):
        jax.block_until_ready(state)
        done += 1
    assert done == examples // batch_size
    needs = run.programs.device_bytes
    programs = max(needs["accumulate"], needs["apply_update"])
    return {"programs": programs, "resident": resident_bytes(), "before": before}


def plain(batch_size: int, *, runs: bool) -> dict[str, int]:
    """One jitted update of the whole batch."""
    import jax
    import numpy as np
    import optax

    from bigbatch.layout import memory

    task, arrays = task_and_arrays()
    optimizer = optax.sgd(0.01, momentum=0.9)
    params, running = task.init(jax.random.key(0))

    def mean_loss(params, batch):
        outputs, _ = task.apply(params, running, batch, True)
        sums = task.loss(outputs, batch)
        return sums["loss"] / sums["count"]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, velocity, batch):
        changes, velocity = optimizer.update(jax.grad(mean_loss)(params, batch), velocity)
        return optax.apply_updates(params, changes), velocity

    shapes = {
        name: jax.ShapeDtypeStruct((batch_size, *array.shape[1:]), array.dtype)
        for name, array in arrays.items()
    } | {"weight": jax.ShapeDtypeStruct((batch_size,), np.float32)}
    velocity = optimizer.init(params)
    compiled = update.lower(params, velocity, shapes).compile()
    found = {"programs": memory.program_bytes(compiled)}
    if not runs:
        return found
    before = resident_bytes()
    index = np.arange(batch_size) % TRAIN_EXAMPLES
    batch = {name: array.take(index, axis=0) for name, array in arrays.items()}
    batch["weight"] = np.ones(batch_size, np.float32)
    jax.block_until_ready(compiled(params, velocity, batch))
    return found | {"resident": resident_bytes(), "before": before}


def in_own_process(kind: str, batch_size: int) -> dict[str, int]:
    """One measurement."""
    command = [sys.executable, "-m", "tests.benchmarks.memory", kind, str(batch_size)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(kind: str, batch_size: int, found: list[dict[str, int]], first: dict[str, float]) -> str:
    """A line of the table; `first` is filled by the first line of a kind."""
    cells = [f"{found[0]['programs'] / MIB:,.1f}"]
    if "resident" in found[0]:
        resident = [one["resident"] / MIB for one in found]
        middle = statistics.median(resident)
        grown = statistics.median((one["resident"] - one["before"]) / MIB for one in found)
        ratio = middle / first.setdefault(kind, middle)
        spread = f"{middle:,.1f} ({min(resident):,.1f} to {max(resident):,.1f})"
        cells += [spread, f"{ratio:.3f}", f"{grown:,.1f}"]
    else:
        cells += ["not run", "", ""]
    return f"| {kind} | {batch_size:,} | {' | '.join(cells)} |"


def main() -> None:
    if len(sys.argv) == 3:
        kind, batch_size = sys.argv[1], int(sys.argv[2])
        if kind == "bigbatch":
            print(json.dumps(ours(batch_size)))
        else:
            print(json.dumps(plain(batch_size, runs=batch_size in PLAIN_BATCHES)))
        return
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    import jax

    print(f"# Memory of an update\n\n{__doc__.strip()}\n")
    print(
        f"cpu, {platform.machine()}, 2 shared CPU cores, jax {jax.__version__}, Python "
        f"{platform.python_version()}; {runs} processes a row; MiB.\n"
    )
    print("| program | batch size | programs | resident | to the first | grown |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    rows = [("bigbatch", size) for size in BATCHES]
    rows += [("plain jit", size) for size in (*PLAIN_BATCHES, BATCHES[-1])]
    first: dict[str, float] = {}
    for kind, size in rows:
        print(row(kind, size, [in_own_process(kind, size) for _ in range(runs)], first), flush=True)


if __name__ == "__main__":
    main()
