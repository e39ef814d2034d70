"""Peak memory of a device, by how the state lies on 8 of them.

    python -m tests.benchmarks.shard_memory > tests/benchmarks/results/shard_memory.md

29.4 million parameters in 7 matrices, Adam in float32, 3 updates of 32 examples, 2 a device and
microbatch. Each row is a process of its own, with 8 virtual devices. All is a device's,
in MiB. `state`: what its arrays are by their shapes. `programs`: what XLA says that the largest
program needs, the state among it. The rest is the process's growth since its programs were
compiled, divided by 8: `begun` at the first state, `trained` at the most. `s` is processor seconds
of an update, of all devices, without the first one.
"""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

DEVICES, LAYERS, WIDTH, EXAMPLES = 8, 7, 2_048, 96
BATCH_SIZE = 32
SHARDS = ('"none"', '"update"', '{"layer": 2}', '{"layer": 8}')
MIB = 2**20


def resident_mib(field: str) -> float:
    """A field of this process's memory, for each device."""
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(f"{field}:")
    )
    return int(line.split()[1]) / 1024 / DEVICES


def measured(shard) -> dict[str, float]:
    """Of a run in this process."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import bigbatch
    from bigbatch.engine.optimizer import Adam
    from bigbatch.engine.task import Task
    from bigbatch.training.prepare import prepare
    from bigbatch.training.updates import updates

    def init(key):
        # Random ones take a CPU longer than all the rest.
        return [jnp.eye(WIDTH) for _ in range(LAYERS)], {}

    def apply(params, statistics, examples, train):
        x = examples["x"]
        for part in params:
            x = layer(part, x)
        return jnp.sum(x, axis=1), {}

    @jax.checkpoint
    def layer(part, x):
        return jnp.tanh(x @ bigbatch.whole(part, (WIDTH, WIDTH)))

    def loss(outputs, examples):
        weight = examples["weight"]
        return {"loss": weight @ (outputs - examples["y"]) ** 2, "count": jnp.sum(weight)}

    rng = np.random.default_rng(0)
    arrays = {"x": rng.normal(size=(EXAMPLES, WIDTH)), "y": rng.normal(size=EXAMPLES)}
    recipe = bigbatch.constant(1e-4, BATCH_SIZE)
    plan = bigbatch.make_plan(recipe, train_examples=EXAMPLES, epochs=1)
    run = prepare(
        Task(init, apply, loss),
        {name: array.astype(np.float32) for name, array in arrays.items()},
        plan,
        Adam(),
        microbatch_examples_per_device=2,
        shard=shard,
    )
    needs = run.programs.device_bytes
    found = {"state": needs.pop("state") / MIB, "programs": max(needs.values()) / MIB}
    before = resident_mib("VmRSS")
    state = jax.block_until_ready(run.init_state())
    found["begun"] = resident_mib("VmRSS") - before
    # The first state is not held beside those after it.
    remaining = updates(run, state, 0)
    del state
    marks_s = []
    for _, state, _ in remaining:
        jax.block_until_ready(state)
        del state
        marks_s.append(time.process_time())
    assert len(marks_s) == EXAMPLES // BATCH_SIZE
    found["s"] = (marks_s[-1] - marks_s[0]) / (len(marks_s) - 1)
    found["trained"] = resident_mib("VmHWM") - before
    return found


def main() -> None:
    if len(sys.argv) == 2:
        print(json.dumps(measured(json.loads(sys.argv[1]))))
        return
    import jax

    print(f"# Memory of a state in parts\n\n{__doc__.strip()}\n")
    print(
        f"cpu, {platform.machine()}, 2 shared CPU cores, jax {jax.__version__}, Python "
        f"{platform.python_version()}; one process a row.\n"
    )
    print("| `shard` | state | programs | begun | s | trained |")
    print(f"| --- |{' ---: |' * 5}")
    for shard in SHARDS:
        command = [sys.executable, "-m", "tests.benchmarks.shard_memory", shard]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(DEVICES)}
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=environment
        )
        values = json.loads(done.stdout.splitlines()[-1]).values()
        cells = [f"{value:,.0f}" if value > 10 else f"{value:.2f}" for value in values]
        print(f"| `{shard}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
