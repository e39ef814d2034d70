"""One update on a pod that is described: ours beside what JAX's users write.

    export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1
    python -m tests.benchmarks.pod_collectives wrn-10-1

Needs libtpu and no TPU. 256 v5e chips, 4 microbatches of which each holds one ghost batch on every
chip: WRN-10-1 on 8x8 digits (32 examples a chip, float32), or `resnet50` (64, bfloat16; a quarter
of an hour of two cores). What stands in the body of a loop counts once for each microbatch, as does
a program that is called for each. Bytes of collectives are those of the results, memory is by the
compiler's analysis, both of a chip. Nothing was run.
"""

import sys
import time

import jax
import optax

from bigbatch.commands.bench import stand_ins
from bigbatch.commands.compile import child, chips, table
from bigbatch.config.file import load_config
from bigbatch.engine.functions import data_mesh
from bigbatch.layout.memory import program_bytes
from tests.benchmarks.collectives import collectives, peers

ASKED, MICROBATCHES = "v5e:16x16", 4
# Config, its fields, shape of an image, examples of a chip's microbatch.
NETWORKS = {
    "wrn-10-1": ("configs/digits.py:decay", {"policy.batch_size": 32_768}, (8, 8, 1), 32),
    "resnet50": (
        *("configs/imagenet_resnet50.py:mlperf_lars", {"model.dtype": "bfloat16"}, (224, 224, 3)),
        64,
    ),
}


def main() -> None:
    config, fields, shape, share = NETWORKS[sys.argv[1]]
    fields |= {"microbatch_examples_per_device": share}
    overrides = [(name, str(value)) for name, value in fields.items()]
    print(f"# Collectives of an update on a pod: {sys.argv[1]}\n\n{__doc__.strip()}\n")
    asked = chips.target(ASKED)
    devices, version = child.described(asked)
    print(f"{version.splitlines()[0]}, optax {optax.__version__}.\n")
    print("| update | collectives | their KiB | MiB needed |\n| --- | --- | ---: | ---: |")

    def row(name: str, counts: dict[str, int], sent: int, needed: str) -> None:
        told = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())) or "none"
        print(f"| {name} | {told} | {sent / 2**10:,.0f} | {needed} |", flush=True)

    *accumulates, applied, _ = table.compiled(config, overrides, asked)["programs"]
    assert not any(each["collectives"] for each in accumulates)
    row(
        "bigbatch",
        {each["kind"]: each["count"] for each in applied["collectives"]},
        sum(each["bytes"] for each in applied["collectives"]),
        f"{max(each['needed_bytes'] for each in (*accumulates, applied)) / 2**20:,.0f}",
    )
    task = stand_ins(load_config(config, overrides), 2)["task"]
    optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))
    mesh, whole = data_mesh(devices), share * len(devices)
    programs = peers(task, optimizer, mesh, shape, whole, MICROBATCHES)
    for name, (lowered, calls, loops) in programs.items():
        start_s = time.perf_counter()
        try:
            program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            print(f"| {name} | refused: {str(error).splitlines()[0][:200]} | | |", flush=True)
            continue
        counts, sent = collectives(program, loops)
        counts = {kind: calls * n for kind, n in counts.items()}
        row(name, counts, calls * sent, f"{program_bytes(program) / 2**20:,.0f}")
        print(f"{name}: {time.perf_counter() - start_s:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
