"""Training of any model and loss on any arrays, without a config: a plan and a `Task`.

>>> import bigbatch, jax.numpy as jnp, numpy as np
>>> from bigbatch.training.prepare import Task, fit, prepare_task
>>> from bigbatch.engine.optimizer import Momentum
>>> x = np.random.default_rng(0).normal(size=(1000, 3)).astype(np.float32)
>>> arrays = {"x": x, "y": x @ np.float32([1, 2, 3]), "weight": np.linspace(0, 2, 1000)}
>>> def squared_error(prediction, examples):
...     weight, error = examples["weight"], prediction - examples["y"]
...     return {"loss": jnp.sum(weight * error**2), "count": jnp.sum(weight)}
>>> task = Task(
...     init=lambda key: (jnp.zeros(3), {}),
...     apply=lambda params, statistics, examples, train: (examples["x"] @ params, {}),
...     loss=squared_error,
... )
>>> recipe = bigbatch.step_decay(0.05, 10, 0.9, boundaries_epochs=[2, 4], factor=0.2)
>>> growing = bigbatch.grow_batch(recipe, max_batch_size=200)
>>> plan = bigbatch.make_plan(growing, train_examples=1000, epochs=5)
>>> run = prepare_task(task, arrays, plan, Momentum(), microbatch_examples_per_device=50)
>>> [round(float(param), 3) for param in fit(run).params]
[1.0, 2.0, 3.0]
"""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from bigbatch.checks import Checks
from bigbatch.data import stream
from bigbatch.engine import functions as step
from bigbatch.engine.optimizer import Optimizer
from bigbatch.engine.task import Task
from bigbatch.layout import memory
from bigbatch.layout.sharing import layout_over
from bigbatch.schedule.plan import Plan
from bigbatch.training import microbatches
from bigbatch.training.loop import updates
from bigbatch.training.programs import compile_programs
from bigbatch.training.run import Updates


def prepare_task(
    task: Task,
    arrays: Mapping[str, np.ndarray],
    plan: Plan,
    optimizer: Optimizer,
    *,
    microbatch_examples_per_device: int,
    ghost_batch_examples: int = 1,
    noise_small_batch_examples: int | None = None,
    reproducible: bool = False,
    seed: int = 0,
    shard_optimizer: bool = False,
    mesh: Mesh | None = None,
) -> Updates:
    """Lays a plan out over the devices and compiles everything for a task of one's own.

    Args:
      task: model and loss.
      arrays: the training examples, [examples, ...] by name, as the task reads them; `weight`,
        [examples], among them or not (then all are 1). Order and epochs are those of
        `data.stream`.
      plan: for as many training examples.
      optimizer: one of `bigbatch.engine.optimizer`.
      microbatch_examples_per_device: the most that a device computes in one call.
      ghost_batch_examples: examples that share statistics; 1 for a model without batch norm.
      noise_small_batch_examples: measures the gradient noise from small batches of so many; see
        `gradient_noise`.
      reproducible: sums exactly, one ghost batch (or small batch) a call and device, so that
        devices and processes change no bit; see `exact_sums`.
      seed: of the initial parameters and the order of the examples.
      shard_optimizer: whether the optimizer's state is divided over the devices.
      mesh: the devices; None for all there are.

    Returns:
      What `fit`, `train.updates` and `evaluate.sums` need.

    Raises:
      UserError: the arrays do not fit the plan, the plan not the optimizer, or the layout cannot be
        formed.
    """
    mesh = step.data_mesh() if mesh is None else mesh
    checks = Checks()
    for name, array in arrays.items():
        length, allowed = np.shape(array)[:1], f"{plan.train_examples} examples, as in the plan"
        checks.require(length == (plan.train_examples,), f"arrays.{name}", length, allowed)
    checks.problems += optimizer.plan_problems(plan.hypers)
    allowed = "False with shard_optimizer"
    checks.require(not (reproducible and shard_optimizer), "reproducible", True, allowed, False)
    checks.done()
    # JAX has no float64 outside of its 64-bit mode; weights are float32, as masks are.
    held = {name: np.asarray(jax.device_get(jax.numpy.asarray(a))) for name, a in arrays.items()}
    if "weight" in held:
        held["weight"] = held["weight"].astype(np.float32)
    layout = layout_over(
        plan,
        ghost_batch_examples=ghost_batch_examples,
        devices=mesh.size,
        microbatch_examples_per_device=microbatch_examples_per_device,
        noise_small_batch_examples=noise_small_batch_examples,
        reproducible=reproducible,
    )
    hyper_names = optimizer.hyper_names(plan.hypers)
    sizes = tuple(layout.devices * shape for shape in layout.shapes)
    programs = compile_programs(
        task,
        optimizer.transformation(),
        mesh,
        example_shapes=tuple((name, a.shape[1:], a.dtype) for name, a in held.items()),
        training_shapes=(),
        hyper_names=hyper_names,
        microbatch_examples=sizes,
        evaluation_examples=sizes[0],
        ghost_batch_examples=ghost_batch_examples,
        noise_small_batch_examples=noise_small_batch_examples,
        shard_optimizer=shard_optimizer,
        reproducible=reproducible,
    )

    def source(first_example: int, num_examples: int) -> dict[str, np.ndarray]:
        index = stream.indices(plan.train_examples, seed, first_example, num_examples)
        return {name: array.take(index, axis=0) for name, array in held.items()}

    def smaller() -> Updates:
        return prepare_task(
            task,
            arrays,
            plan,
            optimizer,
            microbatch_examples_per_device=memory.smaller(
                sizes[0] // mesh.size, unit=noise_small_batch_examples or ghost_batch_examples
            ),
            ghost_batch_examples=ghost_batch_examples,
            noise_small_batch_examples=noise_small_batch_examples,
            reproducible=reproducible,
            seed=seed,
            shard_optimizer=shard_optimizer,
            mesh=mesh,
        )

    return Updates(
        plan=plan,
        layout=layout,
        mesh=mesh,
        programs=programs,
        hyper_names=hyper_names,
        seed=seed,
        microbatch=microbatches.maker(source, layout, mesh, ghost_batch_examples),
        evaluation_examples_per_device=sizes[0] // mesh.size,
        smaller=smaller,
    )


def fit(run: Updates) -> step.State:
    """The state at the end of a run's plan. `train.updates` gives it after every update."""
    *_, (_, state, _) = updates(run, run.init_state(), 0)
    return state
