"""One update of ResNet-50 on a pod that is described: ours beside what JAX's users write.

    export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1
    python -m tests.benchmarks.pod_collectives > tests/benchmarks/results/pod_collectives.md

Needs libtpu and no TPU; a quarter of an hour. `configs/imagenet_resnet50.py:mlperf_lars` in
bfloat16: 65,536 examples on 256 v5e chips, 4 microbatches of 64 on each, ghost batches of 64. What
stands in the body of a loop counts once for each microbatch, as does a program that is called for
each. Bytes of collectives are those of the results, memory is by the compiler's analysis, both of a
chip. Nothing was run.
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

ASKED, MICROBATCH, MICROBATCHES = "v5e:16x16", 64, 4
CONFIG = "configs/imagenet_resnet50.py:mlperf_lars"
OVERRIDES = [("model.dtype", "bfloat16"), ("microbatch_examples_per_device", str(MICROBATCH))]


def main() -> None:
    print(f"# Collectives of an update on a pod\n\n{__doc__.strip()}\n")
    asked = chips.target(ASKED)
    devices, version = child.described(asked)
    print(f"{version.splitlines()[0]}, optax {optax.__version__}.\n")
    print("| update | collectives | MiB sent for | MiB needed |\n| --- | --- | ---: | ---: |")

    def row(name: str, counts: dict[str, int], sent: int, needed: str) -> None:
        told = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())) or "none"
        print(f"| {name} | {told} | {sent / 2**20:,.0f} | {needed} |", flush=True)

    *accumulates, applied, _ = table.compiled(CONFIG, OVERRIDES, asked)["programs"]
    assert not any(each["collectives"] for each in accumulates)
    row(
        "bigbatch",
        {each["kind"]: each["count"] for each in applied["collectives"]},
        sum(each["bytes"] for each in applied["collectives"]),
        f"{max(each['needed_bytes'] for each in (*accumulates, applied)) / 2**20:,.0f}",
    )
    task = stand_ins(load_config(CONFIG, OVERRIDES), 2)["task"]
    optimizer = optax.lars(23.08, weight_decay=1e-4, momentum=0.954)
    whole = MICROBATCH * len(devices)
    programs = peers(task, optimizer, data_mesh(devices), (224, 224, 3), whole, MICROBATCHES)
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
