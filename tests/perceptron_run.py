"""`bigbatch` with a tiny network, for tests of many processes: `python -m tests.perceptron_run`.

The same command line, to be killed at leisure: each microbatch takes so many seconds as `WAIT_S`
in the environment says. One of more examples than `OUT_OF_MEMORY_ABOVE` says does not fit.
Processes wait for each other at the start and later as long as `START_TIMEOUT_S` and
`HEARTBEAT_TIMEOUT_S` say. This file is its own config.
"""

import dataclasses
import os
import sys
import time
from typing import Any

from flax import linen as nn
from ml_collections import ConfigDict

from bigbatch import cli, distributed, models
from bigbatch.config import assemble
from bigbatch.layout import layout
from bigbatch.training import microbatches
from tests import trained

WAIT_S = "PERCEPTRON_WAIT_S"
OUT_OF_MEMORY_ABOVE = "PERCEPTRON_OUT_OF_MEMORY_ABOVE"
START_TIMEOUT_S = "PERCEPTRON_START_TIMEOUT_S"
HEARTBEAT_TIMEOUT_S = "PERCEPTRON_HEARTBEAT_TIMEOUT_S"


class Perceptron(nn.Module):
    """One hidden layer."""

    hidden: int
    num_classes: int
    ghost_batch_examples: int | None
    axis_name: str | None
    dtype: Any

    @nn.compact
    def __call__(self, x, train: bool = False):
        hidden = nn.relu(nn.Dense(self.hidden)(x.reshape(len(x), -1)))
        return nn.Dense(self.num_classes)(hidden)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerceptronConfig(models.ModelConfig):
    """Its config."""

    hidden: int = 8

    def num_parameters(self, *, image_channels: int, num_classes: int) -> int:
        return (64 * image_channels + 1) * self.hidden + (self.hidden + 1) * num_classes

    def _module_class(self) -> Any:
        return Perceptron


def get_config(experiment: str) -> ConfigDict:
    """20 updates: on two devices 9 of one microbatch, then 11 of three."""
    changes = {"ghost_batch_examples": 16, "checkpoint_every_updates": 3}
    return ConfigDict(trained.tree(model={"name": "perceptron"}, **changes))


def main() -> int:
    models.MODELS["perceptron"] = PerceptronConfig
    place, prepare = microbatches.place, assemble.prepare

    def slowly(*arguments: Any) -> Any:
        time.sleep(float(os.environ.get(WAIT_S, "0")))
        return place(*arguments)

    def prepare_small(*arguments: Any, **options: Any) -> Any:
        return trained.failing(prepare(*arguments, **options), lambda size: size > most)

    # Microbatches of as many sizes as there may be.
    layout.COMPILATION_EXAMPLES = 0
    microbatches.place = slowly
    if START_TIMEOUT_S in os.environ:
        distributed.START_TIMEOUT_S = int(os.environ[START_TIMEOUT_S])
    if HEARTBEAT_TIMEOUT_S in os.environ:
        distributed.HEARTBEAT_TIMEOUT_S = int(os.environ[HEARTBEAT_TIMEOUT_S])
    if OUT_OF_MEMORY_ABOVE in os.environ:
        most = int(os.environ[OUT_OF_MEMORY_ABOVE])
        assemble.prepare = prepare_small
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
