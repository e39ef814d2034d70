"""A prepared run: the parts of a config, put together for the devices that are there."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from bigbatch import microbatches, step
from bigbatch.config import Config
from bigbatch.config_fields import in_config_names
from bigbatch.data import on_device, stream
from bigbatch.data.keys import example_keys
from bigbatch.data.sets import DataSet, load
from bigbatch.errors import Problem, UserError
from bigbatch.layout import Layout
from bigbatch.plan import Plan
from bigbatch.programs import Programs, compile_programs
from bigbatch.task import Examples, image_classification


@dataclasses.dataclass(frozen=True, kw_only=True)
class Updates:
    """What a plan's updates need, whatever is trained.

    Attributes:
      plan: every update's batch size and hyperparameters.
      layout: how each update is cut into microbatches.
      mesh: the devices.
      programs: the compiled functions.
      hyper_names: the hyperparameters that the optimizer takes from the plan.
      init_state: makes the state before the first update, replicated over the devices.
      microbatch: makes one microbatch on the devices, with the number of examples that it computes,
        which names its program.
      evaluation_examples_per_device: each device's share of an evaluation microbatch.
    """

    plan: Plan
    layout: Layout
    mesh: Mesh
    programs: Programs
    hyper_names: tuple[str, ...]
    init_state: Callable[[], step.State]
    microbatch: Callable[[microbatches.Request], tuple[int, Examples]]
    evaluation_examples_per_device: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Updates):
    """Everything that stays the same from the first update of a config to the last.

    Attributes:
      config: what was asked for.
      data: the data set.
    """

    config: Config
    data: DataSet


def prepare(
    config: Config, plan: Plan, mesh: Mesh | None = None, data: DataSet | None = None
) -> Run:
    """Loads the data, lays the plan out over the devices and compiles every program.

    Args:
      config: a validated config.
      plan: the config's plan, or the one that the working directory holds.
      mesh: the devices; None for all there are.
      data: the data set; None to load the config's.

    Returns:
      What training and evaluation need.

    Raises:
      UserError: the data is missing or does not fit, or the layout cannot be formed.
    """
    mesh = step.data_mesh() if mesh is None else mesh
    data = load_data(config) if data is None else data
    if data.train_examples != plan.train_examples:
        allowed = f"the {plan.train_examples:,} training examples that the plan is for"
        raise UserError(Problem("data.train_examples", data.train_examples, allowed))
    layout = config.layout(plan, mesh.size)
    ghost_batch_examples = None if config.full_batch_norm else config.ghost_batch_examples
    module = config.model.module(
        num_classes=data.num_classes,
        ghost_batch_examples=ghost_batch_examples,
        axis_name=step.DATA_AXIS,
    )
    task = image_classification(
        module, data.image_shape, data.mean, data.std, config.label_smoothing
    )
    optimizer = config.optimizer.transformation()
    hyper_names = config.optimizer.hyper_names(plan.hypers)
    evaluation_examples_per_device = -(-config.evaluation_batch_examples // mesh.size)
    sizes = tuple(layout.devices * shape for shape in layout.shapes)
    programs = compile_programs(
        task,
        optimizer,
        mesh,
        example_shapes=(
            ("image", data.image_shape, np.dtype(np.uint8)),
            ("label", (), np.dtype(np.int32)),
        ),
        training_shapes=(("key", (2,), np.dtype(np.uint32)),) if _takes_keys(config) else (),
        hyper_names=hyper_names,
        microbatch_examples=sizes,
        evaluation_examples=mesh.size * evaluation_examples_per_device,
        ghost_batch_examples=ghost_batch_examples,
        noise_small_batch_examples=config.noise_small_batch_examples,
        shard_optimizer=config.shard_optimizer,
    )

    def init_state() -> step.State:
        state = programs.init_state(jax.random.key(config.seed))
        return programs.divide(jax.device_put(state, NamedSharding(mesh, step.REPLICATED)))

    return Run(
        config=config,
        plan=plan,
        layout=layout,
        data=data,
        mesh=mesh,
        programs=programs,
        hyper_names=hyper_names,
        evaluation_examples_per_device=evaluation_examples_per_device,
        init_state=init_state,
        microbatch=training_input(config, data, layout, mesh),
    )


def training_input(
    config: Config, data: DataSet, layout: Layout, mesh: Mesh
) -> Callable[[microbatches.Request], tuple[int, Examples]]:
    """What makes a config's microbatches on the devices; see `microbatches.maker`."""
    augment = config.data.augment
    indices = on_device.index_source(len(data.train), config.seed, augment)

    def examples(first_example: int, num_examples: int) -> Mapping[str, np.ndarray]:
        span = first_example, num_examples
        if config.data.on_device:
            made = indices(*span)
        else:
            made = stream.examples(data.train, config.seed, *span, augment)
        if _takes_keys(config):
            made["key"] = example_keys(len(data.train), config.seed, *span)
        return made

    ghost_batch_examples = None if config.full_batch_norm else config.ghost_batch_examples
    microbatch = microbatches.maker(examples, layout, mesh, ghost_batch_examples)
    if not config.data.on_device:
        return microbatch
    sizes = [layout.devices * shape for shape in layout.shapes]
    sharding = NamedSharding(mesh, step.SHARDED)
    return on_device.maker(microbatch, data.train, augment, sharding, sizes)


def _takes_keys(config: Config) -> bool:
    """Whether the model draws random numbers in training."""
    return getattr(config.model, "dropout_rate", 0) > 0


def load_data(config: Config) -> DataSet:
    """The config's data set; what is wrong with it is said in the config's names."""
    try:
        return load(
            config.data.name,
            train_examples=config.data.train_examples,
            data_dir=config.data.directory,
            path=config.data.path,
        )
    except UserError as error:
        raise UserError(p.under("data") for p in in_config_names(error).problems) from error
