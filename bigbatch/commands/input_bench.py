"""How fast a config's own input is, alone: what the device could be fed with."""

import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from bigbatch.config.assemble import load_data, task_of
from bigbatch.config.config import Config
from bigbatch.engine.functions import data_mesh
from bigbatch.training import microbatches
from bigbatch.training.microbatches import MICROBATCHES_IN_FLIGHT
from bigbatch.training.prefetch import Prefetch
from bigbatch.training.prepare import specialised


class StageRate(NamedTuple):
    """What was measured of one stage of a plan.

    Attributes:
      batch_size: of its updates.
      microbatch_examples: the largest microbatch of an update, over all devices.
      examples_per_s: made and on the devices.
      examples: how many were made for it.
    """

    batch_size: int
    microbatch_examples: int
    examples_per_s: float
    examples: int


def measure(
    config: Config, *, seconds: float, say: Callable[[StageRate], None] | None = None
) -> list[StageRate]:
    """Makes microbatches as a run does, stage for stage, and throws them away.

    Args:
      config: a validated config; its plan, data and layout are used, over all devices.
      seconds: how long each batch size is measured.
      say: is told of each stage as it is done.

    Returns:
      One for each different batch size of the plan, in its order.

    Raises:
      UserError: the data is missing or does not fit.
    """
    mesh = data_mesh()
    data = load_data(config)
    task, _ = specialised(task_of(config, data), data, config.ghost_batch_examples)
    layout = config.layout(config.plan, mesh.size)
    make = microbatches.of(
        *(data, layout, mesh, config.seed, config.ghost_batch_examples), takes_keys=task.takes_keys
    )
    rates = []
    measured: set[int] = set()
    for stage in config.plan.stages:
        if stage.batch_size in measured:
            continue
        measured.add(stage.batch_size)
        parts = layout.microbatches(stage.batch_size)
        requests = (
            microbatches.Request(stage.first_example + first + part.offset_examples, part)
            for first in itertools.count(0, stage.batch_size)
            for part in parts
        )
        rate, examples = _drain(make, requests, seconds)
        largest = layout.devices * parts[0].examples_per_device
        rates.append(StageRate(stage.batch_size, largest, rate, examples))
        if say is not None:
            say(rates[-1])
    return rates


def _drain(make: Any, requests: Any, seconds: float) -> tuple[float, int]:
    """Examples a second and examples, from the first microbatch to the one past so many seconds."""
    requests, counted = itertools.tee(requests)
    with Prefetch(make, requests, max_in_flight=MICROBATCHES_IN_FLIGHT) as items:
        # The first one pays for what is made once.
        jax.block_until_ready(next(items))
        next(counted)
        examples, start = 0, time.monotonic()
        while (passed := time.monotonic() - start) < seconds or not examples:
            jax.block_until_ready(next(items))
            examples += next(counted).part.num_examples
    return examples / passed, examples
