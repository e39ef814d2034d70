"""Small runs for tests: a config on the digits, prepared for a number of devices."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn

from bigbatch.config import assemble
from bigbatch.config.config import Config, read_config
from bigbatch.engine.functions import data_mesh
from bigbatch.models import DType, ModelConfig
from bigbatch.models.ghost_norm import GhostNorm
from bigbatch.models.pool import mean_over_positions
from bigbatch.schedule.durations import TIME_UNITS
from bigbatch.schedule.intervals import MINUTES
from bigbatch.training import loop
from bigbatch.training.run import Run
from bigbatch.workdir import resume
from bigbatch.workdir.files import Workdir

DECAY = {
    "name": "step_decay",
    "learning_rate": 0.1,
    "batch_size": 32,
    "momentum": 0.9,
    "boundaries_epochs": [0.2, 0.5],
    "factor": 0.2,
}
GROW = {"name": "grow_batch", "max_batch_size": 160}

FLOAT64_MODEL = {
    "name": "wide_resnet",
    "depth": 10,
    "width": 1,
    "strides": [2, 2, 1],
    "dtype": "float64",
}


def tree(**changes: Any) -> dict[str, Any]:
    """A valid config: 20 updates, 9 of batch size 32 and 11 of 160, with momentum."""
    settings = {
        "seed": 0,
        "epochs": 1.4,
        "ghost_batch_examples": 32,
        "data": {"name": "digits"},
        "model": {"name": "wide_resnet", "depth": 10, "width": 1, "strides": [2, 2, 1]},
        "optimizer": {"name": "momentum", "weight_decay": 5e-4},
        "policy": DECAY,
        "transformations": [GROW],
        "microbatch_examples_per_device": 32,
        "evaluation_batch_examples": 360,
        "log_every_updates": 1,
        "evaluate_every_epochs": 1,
        "checkpoint_every_updates": 5,
    }
    # An interval in another unit takes the place of the one above.
    for name in changes:
        stem, _, unit = name.rpartition("_")
        if stem and unit in (*TIME_UNITS, MINUTES):
            settings = {n: v for n, v in settings.items() if n.rpartition("_")[0] != stem}
    return settings | changes


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfigRun(Run):
    """A run that knows its config."""

    config: Config


def prepared(config: Config, devices: int = 1, plan: Any = None, **options: Any) -> ConfigRun:
    """The run of a config on the first so many devices."""
    mesh = data_mesh(jax.devices()[:devices])
    run = assemble.prepared(config, plan, **{"mesh": mesh, **options})
    return ConfigRun(**vars(run), config=config)


def train(run: ConfigRun, directory: Path, **options: Any) -> dict[str, Any]:
    """Trains a run as its config says."""
    config = run.config
    record = {"experiment": config.experiment, **config.tree}
    settings: dict[str, Any] = {"record": record, "keep_checkpoints": config.keep_checkpoints}
    settings["trackers"] = config.trackers
    return loop.train(run, directory, **settings, **config.intervals, **options)


def claimed(files: Workdir, config: Config, data: Any = None, **options: Any) -> None:
    """Claims a directory for the run of a config on its data, or what they are said to be."""
    record = {"experiment": config.experiment, **config.tree}
    options["adaptive"] = config.controller is not None
    identity = config.identity if data is None else assemble.identity_of(config, data)
    with files.released():
        resume.open_run(files, identity, config.plan, record=record, **options)


def config(**changes: Any) -> Config:
    """The validated config of `tree`."""
    return read_config(tree(**changes), "test")


class Network(nn.Module):
    """One convolution with ghost norm; compiles in a second."""

    num_classes: int
    ghost_batch_examples: int | None
    axis_name: str | None
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.dtype}
        x = nn.Conv(8, (3, 3), strides=2, **dtypes, name="stem")(x)
        x = GhostNorm(self.ghost_batch_examples, self.axis_name)(x, train=train)
        x = mean_over_positions(nn.relu(x), self.dtype)
        return nn.Dense(self.num_classes, **dtypes, name="logits")(x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvolutionConfig(ModelConfig):
    """Its config."""

    def num_parameters(self, *, image_channels: int, num_classes: int) -> int:
        return (9 * image_channels + 3 + num_classes) * 8 + num_classes

    def _module_class(self) -> Any:
        return Network


def quick(dtype: DType = "float32", **changes: Any) -> Config:
    """The same of a network that compiles in a second, where a test does not ask which it is."""
    return dataclasses.replace(config(**changes), model=ConvolutionConfig(dtype=dtype))


def failing(run: Run, fails: Callable[[int], bool]) -> Run:
    """The run, its `accumulate` out of memory where `fails(examples)` says so."""

    def program(size, compiled):
        def call(*arguments):
            if fails(size):
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory (injected).")
            return compiled(*arguments)

        return call

    compiled = run.programs.accumulate
    accumulate = {size: program(size, compiled[size]) for size in compiled}
    return dataclasses.replace(
        run,
        programs=dataclasses.replace(run.programs, accumulate=accumulate),
        smaller=lambda: failing(run.smaller(), fails),
    )


class StopError(Exception):
    """Stands for anything that ends a process."""


def stopping(updates: Callable[..., Iterator], stop_at: int) -> Callable[..., Iterator]:
    """`train.updates` whose process ends in an update, before anything is written of it."""

    def stopped(*arguments: Any) -> Iterator:
        for row, state, sums in updates(*arguments):
            if row.update == stop_at:
                raise StopError
            yield row, state, sums

    return stopped
