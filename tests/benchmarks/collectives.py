"""Collectives of one update over 8 virtual devices, read in the compiled programs.

    python -m tests.benchmarks.collectives > tests/benchmarks/results/collectives.md

Digits, WRN-10-1, a batch of 1,024 in 4 microbatches of 256, ghost batches of 32 (a device's share
of a microbatch), data parallel. What stands in the body of a loop counts once for each microbatch,
as does a program that is called for each. Bytes are those of the results, on each device.
"""

import functools
import os
import platform
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from bigbatch.commands.compile import read

DEVICES, MICROBATCH, MICROBATCHES = 8, 256, 4
BATCH = MICROBATCH * MICROBATCHES


def collectives(program, loops: int = 1) -> tuple[Counter, int]:
    """How often each collective is executed, and the bytes of their results on a device.

    Args:
      program: compiled.
      loops: how often the bodies of its loops run, where the text does not say it.
    """
    counts: Counter = Counter()
    total = 0
    for each in read.collectives(program.as_text()):
        times = each["trips"] or loops
        counts[each["kind"]] += times * each["count"]
        total += times * each["bytes"]
    return counts, total


def ours() -> tuple[Counter, int]:
    """Of accumulate, four times, and apply_update."""
    from tests import trained

    policy = {"name": "constant", "learning_rate": 0.1, "batch_size": BATCH, "momentum": 0.9}
    share = MICROBATCH // DEVICES
    config = trained.config(
        policy=policy, transformations=[], epochs=3, microbatch_examples_per_device=share
    )
    programs = trained.prepared(config, DEVICES).programs
    each, each_bytes = collectives(programs.accumulate[MICROBATCH])
    counts, total = collectives(programs.apply_update)
    for name, count in each.items():
        counts[name] += MICROBATCHES * count
    return counts, total + MICROBATCHES * each_bytes


def peers(
    task, optimizer, mesh, shape, microbatch: int, microbatches: int
) -> dict[str, tuple[Any, int, int]]:
    """The same update as JAX's users write it, with arguments sharded over the devices.

    Args:
      task: an image classification.
      optimizer: of optax.
      mesh: the devices.
      shape: of an image.
      microbatch: examples over all devices.
      microbatches: of an update.

    Returns:
      Name -> what is lowered, how often an update calls it, and how often its loops run.
    """
    from bigbatch.engine import functions as step

    replicated, sharded = (NamedSharding(mesh, s) for s in (step.REPLICATED, step.SHARDED))
    many = optax.MultiSteps(optimizer, every_k_schedule=microbatches)

    def summed(params, running, batch):
        def loss(params):
            logits, ghosts = task.apply(params, running, batch, True)
            sums = task.loss(logits, batch)
            moved = jax.tree.map(lambda r, s: 0.9 * r + 0.1 * jnp.mean(s, 0), running, ghosts)
            return sums["loss"] / sums["count"], moved

        (value, moved), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return gradients, moved, value

    def update(how, gradients_of, params, running, state, batch):
        gradients, running, value = gradients_of(params, running, batch)
        changes, state = how.update(gradients, state, params)
        return optax.apply_updates(params, changes), running, state, value

    def in_loop(params, running, batch):
        total = optax.microbatching.microbatch(
            summed,
            argnums=2,
            microbatch_size=microbatch,
            num_real_microbatches=jnp.int32(microbatches),
        )(params, running, batch)
        return jax.tree.map(lambda leaf: leaf / microbatches, total)

    params, running = jax.eval_shape(task.init, jax.random.key(0))

    def lowered(how, gradients_of, examples):
        batch = {
            "image": jax.ShapeDtypeStruct((examples, *shape), np.uint8, sharding=sharded),
            "label": jax.ShapeDtypeStruct((examples,), np.int32, sharding=sharded),
            "weight": jax.ShapeDtypeStruct((examples,), np.float32, sharding=sharded),
        }
        held = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
            (params, running, jax.eval_shape(how.init, params)),
        )
        made = jax.jit(functools.partial(update, how, gradients_of), out_shardings=replicated)
        return made.lower(*held, batch)

    batch = microbatch * microbatches
    return {
        "jit of the whole batch (also Flax's examples)": (lowered(optimizer, summed, batch), 1, 1),
        "optax.MultiSteps": (lowered(many, summed, microbatch), microbatches, 1),
        "optax.microbatching": (lowered(optimizer, in_loop, batch), 1, microbatches),
    }


def of_digits() -> dict[str, tuple[Counter, int]]:
    """Collectives of the peers' programs."""
    from bigbatch.engine import functions as step
    from bigbatch.models import WideResNetConfig
    from bigbatch.models.classification import image_classification

    module = WideResNetConfig(depth=10, width=1, strides=(2, 2, 1)).module(
        num_classes=10, ghost_batch_examples=32, axis_name=step.DATA_AXIS
    )
    task = image_classification(module, (8, 8, 1), (77.0,), (96.0,))
    optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))
    found = {}
    programs = peers(task, optimizer, step.data_mesh(), (8, 8, 1), MICROBATCH, MICROBATCHES)
    for name, (lowered, calls, loops) in programs.items():
        counts, total = collectives(lowered.compile(), loops)
        found[name] = Counter({kind: calls * n for kind, n in counts.items()}), calls * total
    return found


def main() -> None:
    jax.config.update("jax_num_cpu_devices", DEVICES)
    print(f"# Collectives of an update\n\n{__doc__.strip()}\n")
    print(
        f"{platform.machine()}, {os.cpu_count()} CPU cores, jax {jax.__version__}, optax "
        f"{optax.__version__}, Python {platform.python_version()}. Compiled programs do not differ "
        "from run to run.\n"
    )
    print("| update | collectives | KiB |\n| --- | --- | ---: |")
    for name, (counts, total) in {"bigbatch": ours(), **of_digits()}.items():
        named = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "none"
        print(f"| {name} | {named} | {total / 1024:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
