"""How long a plan takes, and what it costs, on devices that are not there.

One update of one batch size takes

    sum over its microbatches (call_s + examples_per_device / examples_per_s)
    + allreduce_s + update_s

where masked examples count as computed, and the gradients go the quicker of two ways over n
devices: around a ring, 2 (n - 1) (hop_s + gradient_bytes / n / bandwidth) (Patarasu and Yuan 2009),
or through two trees, 2 ceil(log2 n) hop_s + 2 gradient_bytes / bandwidth (Sanders et al. 2009). A
run takes its updates, and `Beside` them evaluations, checkpoints and compilation, as far as their
speeds are known. Input is not in it, nor is anything hidden behind anything. The terms are compared
with measured updates in `tests/benchmarks/time_model.py`, and with published runs in
`tests/benchmarks/published_runs.py`.

>>> speeds = Speeds(examples_per_s=1000.0, update_s=0.01, allreduce_gbps=8.0)
>>> speeds.allreduce_s(4, gradient_bytes=10**9)
1.5
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from bigbatch.checks import Checks, parsed, text_of
from bigbatch.errors import Problem, UserError
from bigbatch.layout.layout import Layout
from bigbatch.schedule.plan import Plan, Stage

# Twice the devices are worth it while they make the run at least so many times faster.
WORTHWHILE_SPEEDUP = 1.5
_BYTES_PER_S_PER_GBPS = 1e9 / 8
# Of a bench file; older ones lack the last two.
_MEASURED = ("examples_per_s", "call_s", "update_s")
_ALSO_MEASURED = ("evaluation_examples_per_s", "compile_s")


@dataclasses.dataclass(frozen=True)
class Speeds:
    """What the hardware does, measured or believed.

    Attributes:
      examples_per_s: of one device, within a microbatch.
      call_s: fixed cost of one microbatch.
      update_s: fixed cost of one update (the optimizer), without the all-reduce.
      allreduce_gbps: bandwidth of one device to its neighbour in the ring, 1e9 bits a second; None
        if it is not known, which does for one device.
      hop_s: latency of the way to the neighbour.
      evaluation_examples_per_s: of one device; None: evaluations are not counted.
      checkpoint_s: for which the updates wait where one is written.
      compile_s: from the start of a run to its first update.
      cost_per_device_hour: in the user's own money; None if it does not matter.
    """

    examples_per_s: float
    call_s: float = 0.0
    update_s: float = 0.0
    allreduce_gbps: float | None = None
    hop_s: float = 0.0
    evaluation_examples_per_s: float | None = None
    checkpoint_s: float = 0.0
    compile_s: float = 0.0
    cost_per_device_hour: float | None = None

    def __post_init__(self) -> None:
        checks = Checks()
        allowed = "examples a second of one device, above 0"
        for name in ("examples_per_s", "evaluation_examples_per_s"):
            if (rate := getattr(self, name)) is not None:
                checks.number(name, rate, allowed, above=0)
        for name in ("call_s", "update_s", "hop_s", "checkpoint_s", "compile_s"):
            checks.number(name, getattr(self, name), "seconds, at least 0", at_least=0)
        if self.allreduce_gbps is not None:
            allowed = "1e9 bits a second of one device, above 0"
            checks.number("allreduce_gbps", self.allreduce_gbps, allowed, above=0)
        if self.cost_per_device_hour is not None:
            cost = self.cost_per_device_hour
            checks.number("cost_per_device_hour", cost, "a number, at least 0", at_least=0)
        checks.done()

    def allreduce_s(self, devices: int, gradient_bytes: int) -> float:
        """Seconds of one all-reduce, by ring or tree.

        Raises:
          UserError: there are several devices and the bandwidth is not known.
        """
        if devices == 1:
            return 0.0
        if self.allreduce_gbps is None:
            allowed = "1e9 bits a second of one device: there are several devices"
            raise UserError(Problem("allreduce_gbps", "nothing", allowed))
        sent_s = 2 * gradient_bytes / (self.allreduce_gbps * _BYTES_PER_S_PER_GBPS)
        ring_s = 2 * (devices - 1) * self.hop_s + (devices - 1) / devices * sent_s
        return min(ring_s, 2 * (devices - 1).bit_length() * self.hop_s + sent_s)


class Beside(NamedTuple):
    """What a run does beside its updates.

    Attributes:
      evaluated_examples: over all evaluations.
      checkpoints: that are written.
    """

    evaluated_examples: int = 0
    checkpoints: int = 0

    def seconds(self, devices: int, speeds: Speeds) -> dict[str, float]:
        """By kind, on so many devices; evaluation is 0 where its speed is not known."""
        rate = devices * (speeds.evaluation_examples_per_s or math.inf)
        return {
            "evaluation": self.evaluated_examples / rate,
            "checkpoints": self.checkpoints * speeds.checkpoint_s,
            "compilation": speeds.compile_s,
        }


class UpdateTime(NamedTuple):
    """Seconds of one update, by what they are spent on."""

    compute_s: float
    allreduce_s: float
    update_s: float

    @property
    def total_s(self) -> float:
        """Their sum."""
        return sum(self)


class StageTime(NamedTuple):
    """One stage of a plan, with the time of one of its updates and of all."""

    stage: Stage
    update: UpdateTime
    seconds: float


class Scaling(NamedTuple):
    """A whole run on one number of devices."""

    devices: int
    seconds: float

    @property
    def device_hours(self) -> float:
        """Devices times hours."""
        return self.devices * self.seconds / 3600


def update_time(
    layout: Layout, batch_size: int, devices: int, gradient_bytes: int, speeds: Speeds
) -> UpdateTime:
    """Seconds of one update.

    Args:
      layout: how it is cut; its `devices` may be groups of neighbours that share ghost batches.
      batch_size: its examples.
      devices: how many there are.
      gradient_bytes: what the all-reduce sums: 4 a parameter in float32.
      speeds: of the hardware.
    """
    examples_per_device = layout.computed_examples(batch_size) / devices
    calls = layout.num_microbatches(batch_size)
    return UpdateTime(
        calls * speeds.call_s + examples_per_device / speeds.examples_per_s,
        speeds.allreduce_s(devices, gradient_bytes),
        speeds.update_s,
    )


def stage_times(
    plan: Plan, layout: Layout, devices: int, gradient_bytes: int, speeds: Speeds
) -> list[StageTime]:
    """The time of each of a plan's stages; arguments as of `update_time`."""
    sizes = {stage.batch_size for stage in plan.stages}
    times = {
        size: update_time(layout, size, devices, gradient_bytes, speeds) for size in sorted(sizes)
    }
    return [
        StageTime(
            stage, times[stage.batch_size], stage.num_updates * times[stage.batch_size].total_s
        )
        for stage in plan.stages
    ]


def scaling(
    plan: Plan,
    layout_over: Callable[[Plan, int], Layout],
    device_counts: Sequence[int],
    gradient_bytes: int,
    speeds: Speeds,
    beside: Beside,
) -> list[Scaling]:
    """The whole run on several numbers of devices.

    Args:
      plan: the run.
      layout_over: (plan, devices) -> layout.
      device_counts: how many devices; a number for which there is no layout is left out.
      gradient_bytes: as of `update_time`.
      speeds: of the hardware.
      beside: what there is to do beside the updates.
    """
    found = []
    for devices in device_counts:
        try:
            layout = layout_over(plan, devices)
        except UserError:
            continue
        times = stage_times(plan, layout, devices, gradient_bytes, speeds)
        seconds = sum(time.seconds for time in times)
        found.append(Scaling(devices, seconds + sum(beside.seconds(devices, speeds).values())))
    return found


def device_counts(plan: Plan, ghost_batch_examples: int, devices: int) -> list[int]:
    """Powers of two up to where every device holds one ghost batch of the largest batch, and more.

    Args:
      plan: the run with the largest batches.
      ghost_batch_examples: of one ghost batch.
      devices: a number that must be among them.
    """
    most = max(max(plan.batch_sizes.tolist()) // ghost_batch_examples, devices)
    powers = [2**i for i in range(most.bit_length() + 1)]
    return sorted({*powers, devices})


def most_worthwhile(rows: Sequence[Scaling]) -> int:
    """The number of devices past which twice as many no longer help.

    Helping is making the run at least `WORTHWHILE_SPEEDUP` times faster.

    Args:
      rows: from `scaling`, at least one.

    >>> most_worthwhile([Scaling(1, 100.0), Scaling(2, 52.0), Scaling(4, 40.0), Scaling(8, 20.0)])
    2
    """
    seconds = {row.devices: row.seconds for row in rows}
    best = rows[0].devices
    while seconds.get(2 * best, best * float("inf")) * WORTHWHILE_SPEEDUP <= seconds[best]:
        best *= 2
    return best


def asked(bench: str | None, typed: Mapping[str, float], devices: int) -> Speeds | None:
    """What is known of the hardware; None where no time was asked for.

    Args:
      bench: the file of `bigbatch bench`, or None.
      typed: fields of `Speeds`, which count more than what was measured.
      devices: how many there are to be.

    Raises:
      UserError: something is missing or out of its range.
    """
    if not typed and bench is None:
        return None
    known = {**(read_bench(bench) if bench is not None else {}), **typed}
    problems = []
    if "examples_per_s" not in known:
        allowed = "examples a second of one device, or --bench with the file of `bigbatch bench`"
        problems.append(Problem("examples_per_s", "nothing", allowed))
    if devices > 1 and "allreduce_gbps" not in known:
        allowed = "1e9 bits a second of one device: there are several devices"
        problems.append(Problem("allreduce_gbps", "nothing", allowed))
    try:
        speeds = Speeds(**{"examples_per_s": 1.0} | known)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(problems)
    return speeds


def read_bench(path: str) -> dict[str, float]:
    """The speeds of `bigbatch bench`, from its file.

    Raises:
      UserError: it cannot be read, or lacks one of them.
    """
    allowed = "a JSON file written by `bigbatch bench`"
    try:
        text = text_of(path)
        values = parsed(text, dict.fromkeys(_MEASURED, float))
        names = [*_MEASURED, *(name for name in _ALSO_MEASURED if name in values)]
        parsed(text, dict.fromkeys(names, float))
    except (OSError, ValueError) as error:
        raise UserError(Problem("bench", path, f"{allowed} ({error})")) from error
    return {name: float(values[name]) for name in names}
