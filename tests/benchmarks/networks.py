"""Compile time and memory of one update for each network.

    python -m tests.benchmarks.networks [NAME ...] > tests/benchmarks/results/networks_DEVICE.md

For each network and dtype: the time to lower and compile `accumulate` and `apply_update` for one
ghost batch as the microbatch on one device, and what XLA says the two programs need in memory
(arguments, outputs and temporaries, without what they share by donation).
"""

import functools
import platform
import sys
import time

import jax
import numpy as np

from bigbatch.engine import functions as step
from bigbatch.engine.accumulator import shapes_of
from bigbatch.engine.optimizer import Momentum
from bigbatch.engine.parts import Parts
from bigbatch.engine.update_rule import resolve
from bigbatch.models import InceptionResNetV2Config, ResNetConfig, WideResNetConfig
from bigbatch.models.classification import image_classification

# Name -> (config, image side in pixels, classes, ghost batch of the paper).
NETWORKS = {
    "WRN-16-4": (functools.partial(WideResNetConfig, depth=16, width=4), 32, 10, 128),
    "ResNet-18": (functools.partial(ResNetConfig, depth=18), 224, 1000, 32),
    "ResNet-50": (functools.partial(ResNetConfig, depth=50), 224, 1000, 32),
    "Inception-ResNet-V2": (InceptionResNetV2Config, 299, 1000, 32),
}
MIB = 2**20


def memory_bytes(compiled) -> int:
    """What a program needs on its device."""
    found = compiled.memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return held + found.temp_size_in_bytes


def timed(lowered_by):
    """A compiled program, and the seconds that it took to lower and compile."""
    start_s = time.perf_counter()
    compiled = lowered_by().compile()
    return compiled, time.perf_counter() - start_s


def measure(name: str, dtype: str) -> str:
    """One row of the table."""
    make, pixels, num_classes, ghost = NETWORKS[name]
    mesh = step.data_mesh(jax.devices()[:1])
    module = make(dtype=dtype).module(
        num_classes=num_classes, ghost_batch_examples=ghost, axis_name=step.DATA_AXIS
    )
    image_shape = (pixels, pixels, 3)
    task = image_classification(module, image_shape, (127.5,) * 3, (64.0,) * 3)
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    columns = {"learning_rate": np.array([0.1]), "momentum": np.array([0.9])}
    optimizer = resolve(Momentum(weight_decay=1e-4), columns, params)
    init = functools.partial(step.init_state, task, optimizer)
    state = jax.eval_shape(init, jax.random.key(0))
    microbatch = {
        "image": jax.ShapeDtypeStruct((ghost, *image_shape), np.uint8),
        "label": jax.ShapeDtypeStruct((ghost,), np.int32),
        "key": jax.ShapeDtypeStruct((ghost, 2), np.uint32),
        "weight": jax.ShapeDtypeStruct((ghost,), np.float32),
        "ghost_mask": jax.ShapeDtypeStruct((1,), np.float32),
    }
    if not task.takes_keys:
        del microbatch["key"]
    like = state.params, state.running_statistics, microbatch
    accumulator = shapes_of(task, *like, Parts(mesh))
    hyper = {n: jax.ShapeDtypeStruct((), np.float32) for n in columns}
    accumulate = jax.jit(functools.partial(step.accumulate, task=task, mesh=mesh), donate_argnums=1)
    apply_update = jax.jit(
        functools.partial(step.apply_update, task=task, optimizer=optimizer, mesh=mesh),
        donate_argnums=(0, 1),
    )
    first, first_s = timed(lambda: accumulate.lower(state, accumulator, microbatch, task.frozen))
    second, second_s = timed(lambda: apply_update.lower(state, accumulator, hyper))
    params_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.params))
    cells = (
        name,
        dtype,
        f"{ghost} x {pixels}^2",
        f"{params_bytes / MIB:.0f}",
        f"{first_s:.1f}",
        f"{memory_bytes(first) / MIB:,.0f}",
        f"{second_s:.1f}",
        f"{memory_bytes(second) / MIB:,.0f}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    device = jax.devices()[0]
    print(
        f"{device.device_kind}, {platform.machine()}, jax {jax.__version__}, "
        f"Python {platform.python_version()}; one device.\n"
    )
    columns = (
        "network",
        "dtype",
        "ghost batch",
        "parameters, MiB",
        "accumulate, s",
        "accumulate, MiB",
        "apply_update, s",
        "apply_update, MiB",
    )
    print(f"| {' | '.join(columns)} |")
    print("| --- " * len(columns) + "|")
    for name in sys.argv[1:] or NETWORKS:
        for dtype in ("float32", "bfloat16"):
            print(measure(name, dtype), flush=True)


if __name__ == "__main__":
    main()
