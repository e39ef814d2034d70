"""Measures the speeds of one device, for `bigbatch plan --bench` on many.

Updates of 1 and of 3 microbatches are timed by turns, on random images that lie on the device: the
slope over the microbatches is the time of one, the rest is the fixed cost of an update. Two sizes
of microbatch give the fixed cost of a call and the time of an example. An evaluation of one
microbatch, and all until the first update can be sent, are timed too.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bigbatch.config.assemble import prepared, task_of
from bigbatch.config.config import Config
from bigbatch.config.lengths import facts_of
from bigbatch.data.dataset import Info
from bigbatch.data.source import Data
from bigbatch.data.tokens import TokenInfo
from bigbatch.engine import functions
from bigbatch.errors import Problem, UserError
from bigbatch.layout.layout import Microbatch
from bigbatch.training.evaluate import source_sums
from bigbatch.training.microbatches import Request
from bigbatch.training.programs import precision
from bigbatch.training.run import Run

RUNS = 7
_MICROBATCHES = (1, 3)
# So many updates of each size make both shapes worth compiling.
_UPDATES = 100_000


def bench(config: Config) -> dict[str, Any]:
    """Times a config's compiled functions on the first device.

    Args:
      config: a validated config; of its data set only the shapes are used.

    Returns:
      Plain values: `examples_per_s`, `call_s`, `update_s`, `evaluation_examples_per_s` and
      `compile_s` (with what the cache held) as in `time_model.Speeds`, the measured `microbatches`
      and `updates` behind them, and what they were measured on.

    Raises:
      UserError: the layout cannot be formed on one device.
    """
    start_s = time.perf_counter()
    run = one_device(config)
    compile_s = time.perf_counter() - start_s
    taken = update_seconds(run, run.layout.shapes, _MICROBATCHES)
    seconds = {key: statistics.median(values) for key, values in taken.items()}
    fit = fitted(seconds, run.layout.shapes)
    device = run.mesh.devices.flat[0]
    return {
        **fit._asdict(),
        "evaluation_examples_per_s": run.evaluation_examples_per_device / evaluation_s(run),
        "compile_s": compile_s,
        "microbatches": [
            {"examples": size, "seconds": s}
            for size, s in sorted(microbatch_seconds(seconds, run.layout.shapes).items())
        ],
        "updates": [
            {"examples": size, "microbatches": count, "seconds": s}
            for (size, count), s in sorted(seconds.items())
        ],
        "runs": RUNS,
        "device": f"{device.platform} {device.device_kind}",
        "jax": jax.__version__,
        "experiment": config.experiment,
        "model": dict(config.tree.get("model") or config.tree["task"]),
    }


class SpeedFit(NamedTuple):
    """The terms of `time_model.Speeds` that one device decides."""

    examples_per_s: float
    call_s: float
    update_s: float


def microbatch_seconds(
    seconds: Mapping[tuple[int, int], float], sizes: Sequence[int]
) -> dict[int, float]:
    """Seconds of one microbatch of each size: the slope between updates of few and of many."""
    few, many = _MICROBATCHES
    return {size: (seconds[size, many] - seconds[size, few]) / (many - few) for size in sizes}


def fitted(seconds: Mapping[tuple[int, int], float], sizes: Sequence[int]) -> SpeedFit:
    """The terms from the seconds of updates.

    Args:
      seconds: of an update with 1 and with 3 microbatches, of each size.
      sizes: one or two sizes of microbatch.
    """
    microbatches = microbatch_seconds(seconds, sizes)
    few = _MICROBATCHES[0]
    fixed_s = statistics.mean(seconds[size, few] - few * microbatches[size] for size in sizes)
    large, small = max(sizes), min(sizes)
    example_s, call_s = microbatches[large] / large, 0.0
    if small < large:
        slope = (microbatches[large] - microbatches[small]) / (large - small)
        # Where an example costs more in a larger microbatch, there is nothing fixed to be seen.
        if 0 < slope < example_s:
            example_s, call_s = slope, microbatches[large] - slope * large
    # The clock cannot resolve what is less than its noise: no cost is below 0.
    return SpeedFit(1 / example_s, call_s, max(0.0, fixed_s))


def one_device(config: Config) -> Run:
    """The run of a config on one device, with microbatches of the config's size and of half."""
    limit, ghost = config.microbatch_examples_per_device, config.ghost_batch_examples
    if limit == "auto" or limit < ghost:
        allowed = f"for one device at least the {ghost} examples of a ghost batch"
        raise UserError(Problem("microbatch_examples_per_device", limit, allowed, ghost))
    unit = config.unit_examples
    half = max(unit, limit // 2 // unit * unit)
    return prepared(
        config,
        config.plan,
        **stand_ins(config, limit),
        batch_sizes=np.repeat(np.array([limit, half]), _UPDATES),
        mesh=functions.data_mesh(jax.devices()[:1]),
    )


def stand_ins(config: Config, examples: int) -> dict[str, Any]:
    """For `prepared`: noise in place of a config's images, and its task for it, made from facts.

    Args:
      config: a validated config; data of the user's own stay as they are.
      examples: so many differ.
    """
    info = facts_of(config.data)
    if isinstance(info, Info):
        # Of some sets only the images could tell.
        channels = info.image_shape[2]
        mean, std = info.mean or (127.0,) * channels, info.std or (1.0,) * channels
        info = dataclasses.replace(info, mean=mean, std=std)
    if config.model is None or not isinstance(info, Info | TokenInfo):
        return {}
    return {"data": Data(_Noise(info, examples)), "task": task_of(config, info)}


class _Noise:
    """Examples of noise, as many as a real data set has, in the memory of a few."""

    def __init__(self, info: Info | TokenInfo, examples: int):
        rng = np.random.default_rng(0)
        self._length, self._examples = info.train_examples, examples
        ends = {"image": 256, "label": getattr(info, "num_classes", 0)}
        ends |= {"tokens": getattr(info, "vocabulary", 0), "mask": 2}
        self._held = {
            name: rng.integers(0, ends[name], (examples, *shape)).astype(dtype)
            for name, (shape, dtype) in info.example_shapes.items()
        }

    def __len__(self) -> int:
        return self._length

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The examples of some numbers."""
        return {name: array[indices % self._examples] for name, array in self._held.items()}


def update_seconds(
    run: Run, sizes: tuple[int, ...], counts: tuple[int, ...], runs: int = RUNS
) -> dict[tuple[int, int], list[float]]:
    """Seconds of one update, so often measured, by the size of its microbatches and their number.

    Args:
      run: from `one_device`.
      sizes: examples in a microbatch, each one of the layout's shapes.
      counts: how many microbatches.
      runs: each is timed so often, by turns, after one that is not counted.
    """
    state, accumulator = run.init_state(), run.programs.empty_accumulator()
    made = {size: run.microbatch(Request(0, Microbatch(0, size, size)))[1] for size in sizes}
    examples = jax.device_put(made, jax.sharding.NamedSharding(run.mesh, functions.SHARDED))
    row = run.plan.row(0)
    dtype = precision(state)
    hyper = jax.device_put(
        {name: np.asarray(row.hyper[name], dtype) for name in run.optimizer.hyper_names}
    )
    taken: dict[tuple[int, int], list[float]] = {}
    for number in range(runs + 1):
        for size in sizes:
            for count in counts:
                jax.block_until_ready((state, accumulator))
                accumulate = run.programs.accumulate[size]
                start_s = time.perf_counter()
                for _ in range(count):
                    accumulator = accumulate(state, accumulator, examples[size], run.frozen)
                state, accumulator, sums = run.programs.apply_update(state, accumulator, hyper)
                jax.block_until_ready((state, accumulator, sums))
                if number:
                    taken.setdefault((size, count), []).append(time.perf_counter() - start_s)
    return taken


def evaluation_s(run: Run) -> float:
    """Seconds of one evaluation microbatch, the median of `RUNS` after one that is not counted."""
    state, source = run.init_state(), functools.partial(run.data.training, run.seed)
    taken = []
    for _ in range(RUNS + 1):
        start_s = time.perf_counter()
        source_sums(run, state, source, run.evaluation_examples_per_device)
        taken.append(time.perf_counter() - start_s)
    return statistics.median(taken[1:])


def table(result: dict[str, Any]) -> str:
    """The measured speeds in a few lines."""
    lines = [f"{result['device']}, jax {result['jax']}, medians of {result['runs']}:"]
    lines += [
        f"  microbatch of {row['examples']:,} examples: {1000 * row['seconds']:.4g} ms, "
        f"{row['examples'] / row['seconds']:,.5g} examples/s"
        for row in result["microbatches"]
    ]
    lines.append(
        f"  {result['examples_per_s']:,.5g} examples/s and {1000 * result['call_s']:.4g} ms a "
        f"microbatch; {1000 * result['update_s']:.4g} ms an update; "
        f"{result['evaluation_examples_per_s']:,.5g} evaluated/s; ready after "
        f"{result['compile_s']:.3g} s"
    )
    return "\n".join(lines)
