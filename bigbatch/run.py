"""A prepared run: the parts of a config, put together for the devices that are there."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from bigbatch import microbatches, step
from bigbatch.config import Config
from bigbatch.data import stream
from bigbatch.data.keys import example_keys
from bigbatch.data.sets import DataSet, load
from bigbatch.layout import Layout
from bigbatch.plan import Plan
from bigbatch.programs import Programs, compile_programs
from bigbatch.task import Examples, image_classification


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that stays the same from the first update to the last.

    Attributes:
      config: what was asked for.
      plan: every update's batch size and hyperparameters.
      layout: how each update is cut into microbatches.
      data: the data set.
      mesh: the devices.
      programs: the compiled functions.
      hyper_names: the hyperparameters that the optimizer takes from the plan.
      takes_keys: whether the model draws random numbers, from a key for each example.
      evaluation_examples_per_device: each device's share of an evaluation microbatch.
      init_state: makes the state before the first update, replicated over the devices.
    """

    config: Config
    plan: Plan
    layout: Layout
    data: DataSet
    mesh: Mesh
    programs: Programs
    hyper_names: tuple[str, ...]
    takes_keys: bool
    evaluation_examples_per_device: int
    init_state: Callable[[], step.State]


def prepare(config: Config, plan: Plan, mesh: Mesh | None = None) -> Run:
    """Loads the data, lays the plan out over the devices and compiles every program.

    Args:
      config: a validated config.
      plan: the config's plan, or the one that the working directory holds.
      mesh: the devices; None for all there are.

    Returns:
      What training and evaluation need.

    Raises:
      UserError: the data is missing or does not fit, or the layout cannot be formed.
    """
    mesh = step.data_mesh() if mesh is None else mesh
    data = load(
        config.data.name,
        train_examples=config.data.train_examples,
        data_dir=config.data.directory,
    )
    layout = config.layout(plan, mesh.size)
    module = config.model.module(
        num_classes=data.num_classes,
        ghost_batch_examples=None if config.full_batch_norm else config.ghost_batch_examples,
        axis_name=step.DATA_AXIS,
    )
    task = image_classification(
        module, data.image_shape, data.mean, data.std, config.label_smoothing
    )
    takes_keys = getattr(config.model, "dropout_rate", 0) > 0
    optimizer = config.optimizer.transformation()
    hyper_names = config.optimizer.hyper_names(plan.hypers)
    evaluation_examples_per_device = -(-config.evaluation_batch_examples // mesh.size)
    programs = compile_programs(
        task,
        optimizer,
        mesh,
        example_shapes=(
            ("image", data.image_shape, np.dtype(np.uint8)),
            ("label", (), np.dtype(np.int32)),
        ),
        training_shapes=(("key", (2,), np.dtype(np.uint32)),) if takes_keys else (),
        hyper_names=hyper_names,
        microbatch_examples=tuple(layout.devices * shape for shape in layout.shapes),
        evaluation_examples=mesh.size * evaluation_examples_per_device,
        ghost_batch_examples=None if config.full_batch_norm else config.ghost_batch_examples,
    )

    def init_state() -> step.State:
        state = programs.init_state(jax.random.key(config.seed))
        return jax.device_put(state, NamedSharding(mesh, step.REPLICATED))

    return Run(
        config=config,
        plan=plan,
        layout=layout,
        data=data,
        mesh=mesh,
        programs=programs,
        hyper_names=hyper_names,
        takes_keys=takes_keys,
        evaluation_examples_per_device=evaluation_examples_per_device,
        init_state=init_state,
    )


def training_microbatch(run: Run, request: microbatches.Request) -> tuple[int, Examples]:
    """Makes one training microbatch and puts it on the devices.

    Args:
      run: from `prepare`.
      request: which one.

    Returns:
      The number of examples that it computes, which names its program, and its arrays.
    """
    first, present = request.first_example, request.part.num_examples
    examples = stream.examples(
        run.data.train, run.config.seed, first, present, run.config.data.augment
    )
    if run.takes_keys:
        examples["key"] = example_keys(len(run.data.train), run.config.seed, first, present)
    size = run.layout.devices * request.part.examples_per_device
    ghost = size if run.config.full_batch_norm else run.config.ghost_batch_examples
    return size, microbatches.place(examples, size, ghost, run.mesh)
