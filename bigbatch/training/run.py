"""A prepared run: the parts of a config, put together for the devices that are there."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from bigbatch import distributed
from bigbatch.config.assemble import Source, evaluation_source, load_data, training_source
from bigbatch.config.config import Config
from bigbatch.data import on_device
from bigbatch.data.records.record_set import RecordSet
from bigbatch.data.sets import DataSet, Info
from bigbatch.engine import functions as step
from bigbatch.engine.task import Examples, PyTree, Task
from bigbatch.errors import Problem, UserError
from bigbatch.layout import memory
from bigbatch.layout.layout import Layout
from bigbatch.models.classification import image_classification
from bigbatch.schedule.adaptive.controller import Controller
from bigbatch.schedule.plan import Plan
from bigbatch.training import microbatches
from bigbatch.training.microbatches import MICROBATCHES_IN_FLIGHT
from bigbatch.training.programs import Programs, compile_programs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Updates:
    """What a plan's updates need, whatever is trained.

    Attributes:
      plan: every update's batch size and hyperparameters.
      layout: how each update is cut into microbatches.
      mesh: the devices.
      programs: the compiled functions.
      hyper_names: the hyperparameters that the optimizer takes from the plan.
      seed: of the state before the first update.
      microbatch: makes one microbatch on the devices, with the number of examples that it computes,
        which names its program.
      evaluation_examples_per_device: each device's share of an evaluation microbatch.
      controller: decides an adaptive run's updates; None for a planned one.
      smaller: the same with microbatches of half the size, which it compiles.
    """

    plan: Plan
    layout: Layout
    mesh: Mesh
    programs: Programs
    hyper_names: tuple[str, ...]
    seed: int
    microbatch: Callable[[microbatches.Request], tuple[int, Examples]]
    evaluation_examples_per_device: int
    smaller: Callable[[], "Updates"]
    controller: Controller | None = None

    def init_state(self) -> step.State:
        """The state before the first update, replicated over the devices."""
        return self.on_devices(self.programs.init_state(jax.random.key(self.seed)))

    def state_from(self, params: PyTree, running_statistics: PyTree) -> step.State:
        """The same of given arrays, which every process holds in full, in place of random ones."""
        return self.on_devices(self.programs.state_from(params, running_statistics))

    def on_devices(self, state: step.State) -> step.State:
        """The state that the updates take, from one as in a checkpoint that all processes hold."""
        replicated = NamedSharding(self.mesh, step.REPLICATED)
        return self.programs.divide(distributed.put(state, replicated))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Updates):
    """Everything that stays the same from the first update of a config to the last.

    Attributes:
      config: what was asked for.
      data: the data set.
      test_source: its test examples, by their numbers.
    """

    config: Config
    data: DataSet | RecordSet
    test_source: Source


def prepare(
    config: Config,
    plan: Plan,
    mesh: Mesh | None = None,
    data: DataSet | RecordSet | None = None,
    kept: Path | None = None,
) -> Run:
    """Loads the data, lays the plan out over the devices and compiles every program.

    Args:
      config: a validated config.
      plan: the config's plan, or the one that the working directory holds.
      mesh: the devices; None for all there are.
      data: the data set; None to load the config's.
      kept: a file for the microbatch that was found to fit; None to find it anew.

    Returns:
      What training and evaluation need.

    Raises:
      UserError: the data is missing or does not fit, or the layout cannot be formed.
    """
    mesh = step.data_mesh() if mesh is None else mesh
    data = load_data(config, show_progress=sys.stderr.isatty()) if data is None else data
    if data.train_examples != plan.train_examples:
        allowed = f"the {plan.train_examples:,} training examples that the plan is for"
        raise UserError(Problem("data.train_examples", data.train_examples, allowed))
    ghost_batch_examples = None if config.full_batch_norm else config.ghost_batch_examples
    task = image_task(config, data)
    optimizer = config.optimizer.transformation()
    hyper_names = config.optimizer.hyper_names(plan.hypers)
    evaluation_examples_per_device = -(-config.evaluation_batch_examples // mesh.size)
    compiled = functools.partial(
        compile_programs,
        task,
        optimizer,
        mesh,
        example_shapes=(
            ("image", data.image_shape, np.dtype(np.uint8)),
            ("label", (), np.dtype(np.int32)),
        ),
        training_shapes=(("key", (2,), np.dtype(np.uint32)),) if _takes_keys(config) else (),
        hyper_names=hyper_names,
        evaluation_examples=mesh.size * evaluation_examples_per_device,
        ghost_batch_examples=ghost_batch_examples,
        noise_small_batch_examples=config.noise_small_batch_examples,
        shard_optimizer=config.shard_optimizer,
        reproducible=config.reproducible,
        reestimates=config.reestimate_examples is not None,
    )
    config, keep = _fitted(config, mesh, data, compiled, kept)
    layout = config.layout(plan, mesh.size)
    sizes = tuple(layout.devices * shape for shape in layout.shapes)
    programs = compiled(microbatch_examples=sizes)

    def smaller() -> Run:
        largest = layout.devices * layout.shapes[0] // mesh.size
        half = memory.smaller(largest, unit=config.microbatch_unit_examples)
        keep(half)
        halved = dataclasses.replace(
            config, microbatch_examples_per_device=half, automatic_microbatch=False
        )
        return prepare(halved, plan, mesh, data, kept)

    return Run(
        config=config,
        plan=plan,
        layout=layout,
        data=data,
        mesh=mesh,
        programs=programs,
        hyper_names=hyper_names,
        evaluation_examples_per_device=evaluation_examples_per_device,
        controller=config.controller,
        seed=config.seed,
        test_source=evaluation_source(data),
        microbatch=training_input(config, data, layout, mesh),
        smaller=smaller,
    )


def image_task(config: Config, data: DataSet | RecordSet | Info) -> Task:
    """What a config trains on a data set, of which nothing but the facts are read."""
    module = config.model.module(
        num_classes=data.num_classes,
        ghost_batch_examples=None if config.full_batch_norm else config.ghost_batch_examples,
        axis_name=step.DATA_AXIS,
    )
    return image_classification(
        module, data.image_shape, data.mean, data.std, config.label_smoothing
    )


def _fitted(
    config: Config,
    mesh: Mesh,
    data: DataSet | RecordSet,
    compiled: Callable[..., Programs],
    kept: Path | None,
) -> tuple[Config, Callable[[int], None]]:
    """The config with the microbatch that was kept or is now found, and what keeps another one."""
    key = {
        "asked": config.tree.get("microbatch_examples_per_device"),
        "device_memory_bytes": config.device_memory_bytes,
        "device_kind": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
    }
    keep = functools.partial(memory.keep, kept, key)
    chosen = memory.kept(kept, key)
    if chosen is None and config.automatic_microbatch:
        in_flight = (1 + MICROBATCHES_IN_FLIGHT) * (int(np.prod(data.image_shape)) + 16)
        held = 0
        if isinstance(data, DataSet) and config.data.on_device:
            held = data.train.images.nbytes

        def needed_bytes(examples: int) -> int:
            needs = compiled(microbatch_examples=(examples * mesh.size,)).device_bytes
            # Room for what a checkpoint and an evaluation need beside the updates.
            programs = max(needs["accumulate"], needs["apply_update"]) + needs["state"]
            return programs + in_flight * examples + held

        chosen = memory.largest_that_fits(
            needed_bytes,
            unit=config.microbatch_unit_examples,
            most=config.microbatch_examples_per_device,
            limit_bytes=memory.limit_bytes(mesh, config.device_memory_bytes),
        )
        keep(chosen)
    if chosen is None:
        return config, keep
    return dataclasses.replace(config, microbatch_examples_per_device=chosen), keep


def training_input(
    config: Config, data: DataSet | RecordSet, layout: Layout, mesh: Mesh
) -> Callable[[microbatches.Request], tuple[int, Examples]]:
    """What makes a config's microbatches on the devices; see `microbatches.maker`."""
    source = training_source(data, config, keys=_takes_keys(config))
    ghost_batch_examples = None if config.full_batch_norm else config.ghost_batch_examples
    microbatch = microbatches.maker(source, layout, mesh, ghost_batch_examples)
    if isinstance(data, RecordSet) or not config.data.on_device:
        return microbatch
    sizes = [layout.devices * shape for shape in layout.shapes]
    sharding = NamedSharding(mesh, step.SHARDED)
    return on_device.maker(microbatch, data.train, config.data.augment, sharding, sizes)


def _takes_keys(config: Config) -> bool:
    """Whether the model draws random numbers in training."""
    return getattr(config.model, "dropout_rate", 0) > 0
