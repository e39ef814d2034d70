"""The time model against published runs: ResNet-50 on ImageNet, from 64 to 4,096 devices.

    python -m tests.benchmarks.published_runs > tests/benchmarks/results/published_runs.md

Nothing is timed here. The *speeds of a device* come from another publication than the run that is
predicted: the first MLPerf round with the chip, and there the smallest and the largest system of
one submitter; TensorFlow's benchmark page for the P100. These have different batches a device. The
fit of `bigbatch bench` through the two gives the speed and the fixed cost of a call, after the
modelled all-reduce is taken off. *Speed alone* is the smallest system's, without a fixed cost.

Batch size, epochs and evaluations are the run's own. Its seconds are from run_start to run_stop of
its first log, without compilation, as MLPerf counts; papers round theirs. Gradients are 4 bytes a
parameter, an evaluated image counts as a third of a trained one, an evaluation that a paper does
not speak of is not counted. A link is what leaves a host, or a chip of a TPU. A hop is 1 us on
TPUs (jax-ml/scaling-book, sharding.md), 14 us between hosts and 3.4 within one (the constants of
NCCL 2.19, src/graph/tuning.cc); over Ethernet that of InfiniBand is believed.

No number was fitted to a run, and the rule is one for all. It was not the first that was tried.
The speed of one size alone came first. Then the two sizes of the round before the run: the TPU of
v0.7 so came out at 3.7 times its time (v0.6 writes its time between two evaluations, with what the
host does in it), and the rule took the first round for every chip. The runs were chosen before, and
none was dropped for its error. Left out: You et al. 2018 (no speed of one of its processors was
found), A100s (the logs of their first round were not to be had), and Smith et al. 2018, who say
"under 30 minutes" and not on how many chips.
"""

from typing import NamedTuple

import bigbatch as bb
from bigbatch.commands.bench import fitted
from bigbatch.commands.compile.chips import CHIPS
from bigbatch.layout.time_model import Beside, Speeds, stage_times

TRAIN_EXAMPLES, TEST_EXAMPLES = 1_281_167, 50_000
GRADIENT_BYTES = 4 * 25_557_032
_TPU, _HOSTS, _NVLINK = 1e-6, 14e-6, 3.4e-6
_V3_GBPS = CHIPS["v3"].sent_bytes_s * 8 / 1e9


class System(NamedTuple):
    """One whose speed was published: so many epochs in so many seconds, without evaluations."""

    devices: int
    examples_per_device: int
    epochs: float
    seconds: float
    gbps: float | None = None
    hop_s: float = 0.0

    @property
    def update_s(self) -> float:
        """Of one update, without the all-reduce as the model has it."""
        examples = self.devices * self.examples_per_device
        measured_s = self.seconds * examples / (self.epochs * TRAIN_EXAMPLES)
        speeds = Speeds(1.0, allreduce_gbps=self.gbps, hop_s=self.hop_s)
        return measured_s - speeds.allreduce_s(self.devices, GRADIENT_BYTES)


def _rate(examples: int, examples_per_s: float) -> System:
    return System(1, examples, 1, TRAIN_EXAMPLES / examples_per_s)


# Medians of the logs' times from one evaluation to the next, or of epochs; the first is left out.
CHIP_SOURCES = {
    "P100": (
        "TensorFlow's benchmarks, DGX-1, real data, May 2017 (tensorflow/docs, r1, benchmarks.md)",
        (_rate(64, 218), _rate(32, 193)),
    ),
    "TPU v3": (
        "MLPerf v0.5, Google: cloud_v3.8, research_v3.512",
        (System(4, 256, 4, 686.9, _V3_GBPS, _TPU), System(256, 64, 4, 14.25, _V3_GBPS, _TPU)),
    ),
    "V100": (
        "MLPerf v0.5, NVIDIA: dgx1, dgx1_multi (80 hosts)",
        (System(8, 208, 1, 126.47, 1200, _NVLINK), System(640, 26, 1, 4.291, 400, _HOSTS)),
    ),
    "H100": (
        "MLPerf v2.1, NVIDIA: dgxh100_preview, dgxh100_n4_preview",
        (System(8, 400, 1, 24.449, 3600, _NVLINK), System(32, 100, 1, 7.577, 3200, _HOSTS)),
    ),
}


class Published(NamedTuple):
    """A run; its reason is of an error of more than 25 %."""

    name: str
    source: str
    chip: str
    devices: int
    batch_size: int
    epochs: int
    evaluations: int
    seconds: float
    gbps: float
    hop_s: float
    reason: str = ""


_H100 = ("H100", 3200.0, _HOSTS)
RUNS = (
    Published("Goyal et al. 2017", "arXiv 1706.02677", "P100", 256, 8192, 90, 0, 3600, 50, _HOSTS),
    Published(
        *("Akiba et al. 2017", "arXiv 1711.04325 (its network is believed)", "P100"),
        *(1024, 32_768, 90, 0, 900, 112, _HOSTS),
        "likely another framework (Chainer), and a network slower than its links",
    ),
    Published(
        *("Ying et al. 2018", "arXiv 1811.06992", "TPU v3"),
        *(1024, 32_768, 90, 0, 132, _V3_GBPS, _TPU),
    ),
    Published(
        *("MLPerf v0.6, Google", "tpu-v3-2048", "TPU v3"),
        *(1024, 32_768, 72, 18, 76.97, _V3_GBPS, _TPU),
    ),
    Published(
        *("MLPerf v0.7, Google, JAX", "tpu-v3-8192-JAX", "TPU v3"),
        *(4096, 65_536, 92, 23, 28.70, _V3_GBPS, _TPU),
        "likely two years of compilers: a whole update took 16 ms, the fixed cost in v0.5 is 14",
    ),
    Published(
        *("MLPerf v0.6, Fujitsu", "abci_2048xV100_mxnet", "V100"),
        *(2048, 86_016, 90, 23, 70.44, 200, _HOSTS),
        "likely what the 80 hosts of v0.5 waited for; the next round sends while it computes",
    ),
    *(
        Published(
            *(f"MLPerf v3.0, {submitter}", name, "H100"),
            *(devices, batch_size, epochs, evaluations, seconds, 3200, _HOSTS),
        )
        for submitter, name, devices, batch_size, epochs, evaluations, seconds in (
            ("NVIDIA", "dgxh100_n8", 64, 3200, 35, 9, 159.92),
            ("NVIDIA", "dgxh100_n64", 512, 20_480, 50, 13, 31.96),
            ("NVIDIA", "dgxh100_n96", 768, 32_256, 56, 14, 22.21),
            ("NVIDIA and CoreWeave", "hgxh100_n448", 3584, 57_344, 77, 20, 10.96),
        )
    ),
)


def speeds_of(run: Published, *, alone: bool = False) -> Speeds:
    """The speeds with which a run is predicted."""
    small, large = CHIP_SOURCES[run.chip][1]
    if alone:
        rate, call_s = small.examples_per_device / small.update_s, 0.0
    else:
        taken = {s.examples_per_device: s.update_s for s in (small, large)}
        seconds = {(size, count): count * s for size, s in taken.items() for count in (1, 3)}
        rate, call_s, _ = fitted(seconds, list(taken))
    return Speeds(
        *(rate, call_s),
        allreduce_gbps=run.gbps,
        hop_s=run.hop_s,
        evaluation_examples_per_s=3 * rate,
    )


def predicted_s(run: Published, *, alone: bool = False) -> float:
    """The seconds of a run by the time model."""
    share = run.batch_size // run.devices
    policy = bb.constant(0.1, run.batch_size)
    plan = bb.make_plan(policy, train_examples=TRAIN_EXAMPLES, epochs=run.epochs)
    layout = bb.make_layout(
        plan,
        ghost_batch_examples=share,
        devices=run.devices,
        microbatch_examples_per_device=share,
    )
    speeds = speeds_of(run, alone=alone)
    stages = stage_times(plan, layout, run.devices, GRADIENT_BYTES, speeds)
    beside = Beside(run.evaluations * TEST_EXAMPLES).seconds(run.devices, speeds)
    return sum(stage.seconds for stage in stages) + sum(beside.values())


def errors() -> dict[str, float]:
    """Of each run, as a share of its published time."""
    return {f"{r.name} {r.devices}": predicted_s(r) / r.seconds - 1 for r in RUNS}


def main() -> None:
    print(f"# The time model against published runs\n\n{__doc__.strip()}\n")
    print("| chip | examples/s | ms a call | speed alone | from |")
    print("| --- | ---: | ---: | ---: | --- |")
    for chip, (source, _) in CHIP_SOURCES.items():
        run = next(run for run in RUNS if run.chip == chip)
        fit, alone = speeds_of(run), speeds_of(run, alone=True)
        print(
            f"| {chip} | {fit.examples_per_s:,.0f} | {1e3 * fit.call_s:.2f} | "
            f"{alone.examples_per_s:,.0f} | {source} |"
        )
    print(
        "\n| run | devices | batch size | epochs | Gbit/s | published, min | model, min | error |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for run in RUNS:
        found = predicted_s(run)
        print(
            f"| {run.name} ({run.source}) | {run.devices:,} | {run.batch_size:,} | {run.epochs} | "
            f"{run.gbps:,.0f} | {run.seconds / 60:.3g} | {found / 60:.3g} | "
            f"{found / run.seconds - 1:+.0%} |"
        )
    within = sum(abs(error) <= 0.25 for error in errors().values())
    kinds = {run.name.removesuffix(" and CoreWeave") for run in RUNS}
    missed = {run.name for run in RUNS if run.reason}
    print(f"\n{within} of {len(RUNS)} within 25 %, or {len(kinds - missed)} of ", end="")
    print(f"{len(kinds)} where those of H100s count as one. The others:\n")
    for run in RUNS:
        if abs(predicted_s(run) / run.seconds - 1) > 0.25:
            print(f"- {run.name}, {run.devices:,} devices: {run.reason or 'not known'}.")
    print("\n| run | speed alone, min | error |\n| --- | ---: | ---: |")
    for run in RUNS:
        found = predicted_s(run, alone=True)
        name = f"{run.name}, {run.devices:,}"
        print(f"| {name} | {found / 60:.3g} | {found / run.seconds - 1:+.0%} |")


if __name__ == "__main__":
    main()
