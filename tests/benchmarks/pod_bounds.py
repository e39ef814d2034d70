"""Bounds of the ImageNet runs on pods: what no chip of a kind can be faster than.

    python -m tests.benchmarks.pod_bounds > tests/benchmarks/results/pod_bounds.md

Each network is traced once, in bfloat16, and nothing is compiled or run. A run's bound is the time
model's: model operations of every update at the peak of the chips, the all-reduce of its gradients
at the bandwidth of all links, and what of the update's own bytes (gradients, parameters and
momentum read, the last two written) that does not hide. Latency, input and evaluation are not in
it. Where a batch gives a device less than a ghost batch, devices share ghost batches.
"""

import jax
import jax.numpy as jnp
import numpy as np

from bigbatch.commands.bench import stand_ins
from bigbatch.commands.compile import read
from bigbatch.commands.compile.chips import CHIPS
from bigbatch.commands.plan_time import times
from bigbatch.config.file import load_config
from bigbatch.layout.time_model import Speeds

KINDS = ("v3", "v4", "v5e", "v5p", "v6e")
RUNS = {
    "imagenet_resnet50": ("decay", "increase", "mlperf_lars"),
    "imagenet_inception_resnet_v2": (
        *("decay", "increase", "momentum_0.9", "momentum_0.95", "momentum_0.975"),
    ),
}
# On so many chips; those of the larger number where a pod has as many.
CHIPS_OF = {256: KINDS, 4096: ("v3", "v4", "v5p")}
EXAMPLES = 64
_BFLOAT16 = [("model.dtype", "bfloat16")]


def flops_an_example(config) -> float:
    """Of the gradient of the loss, as the command counts them."""
    task = stand_ins(config, 2)["task"]
    size = config.tree["data"].get("image_size") or 224
    examples = {
        "image": jax.ShapeDtypeStruct((EXAMPLES, size, size, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((EXAMPLES,), np.int32),
        "weight": jax.ShapeDtypeStruct((EXAMPLES,), np.float32),
    }
    if task.takes_keys:
        examples["key"] = jax.ShapeDtypeStruct((EXAMPLES, 2), np.uint32)

    def loss(params, statistics, examples):
        outputs, _ = task.apply(params, statistics, examples, True)
        return jnp.sum(task.loss(outputs, examples)["loss"])

    shapes = jax.eval_shape(task.init, jax.random.key(0))
    return read.model_flops(jax.make_jaxpr(jax.grad(loss))(*shapes, examples).jaxpr) / EXAMPLES


def seconds(name: str, chips: int, kind: str, flops: float) -> float:
    """The bound of a run."""
    chip = CHIPS[kind]
    devices = chips * chip.devices
    config = load_config(name, _BFLOAT16)
    share = int(min(config.plan.batch_sizes)) // devices
    if share < config.ghost_batch_examples:
        config = load_config(name, [*_BFLOAT16, ("microbatch_examples_per_device", str(share))])
    sent_bytes_s = chip.sent_bytes_s / chip.devices
    speeds = Speeds(chip.bf16_flops_s / chip.devices / flops, 0.0, 0.0, sent_bytes_s * 8 / 1e9)
    found = times(config, devices, speeds)
    passed_s = 5 * found.gradient_bytes * chip.devices / chip.memory_bytes_s
    # At the bandwidth of its memory, as far as it does not hide behind what is sent.
    hidden_s = speeds.allreduce_s(devices, found.gradient_bytes)
    return found.seconds + config.plan.num_updates * max(0.0, passed_s - hidden_s)


def main() -> None:
    print(f"# Bounds of runs on pods\n\n{__doc__.strip()}\n\njax {jax.__version__}.\n")
    rates = ", ".join(
        f"{kind} {CHIPS[kind].bf16_flops_s / 1e12:g} TFLOP/s, {CHIPS[kind].memory_bytes_s / 1e9:g} "
        f"GB/s, {CHIPS[kind].sent_bytes_s / 1e9:g} GB/s sent"
        for kind in KINDS
    )
    print(f"Peaks of a chip (their sources: `bigbatch/commands/compile/chips.py`): {rates}.\n")
    print(f"| run | GFLOP an example | chips | {' | '.join(KINDS)} |")
    print("| --- | ---: | ---: |" + " ---: |" * len(KINDS))
    for file, experiments in RUNS.items():
        flops = flops_an_example(load_config(f"configs/{file}.py:{experiments[0]}", _BFLOAT16))
        for experiment in experiments:
            for chips, kinds in CHIPS_OF.items():
                if chips == 256 or experiment == "mlperf_lars":
                    name = f"configs/{file}.py:{experiment}"
                    cells = [
                        f"{seconds(name, chips, kind, flops) / 60:.3g}" if kind in kinds else ""
                        for kind in KINDS
                    ]
                    told = f"`{file.removeprefix('imagenet_')}:{experiment}`"
                    print(f"| {told} | {flops / 1e9:.3g} | {chips:,} | {' | '.join(cells)} |")
    print("\nMinutes of the whole run.")


if __name__ == "__main__":
    main()
