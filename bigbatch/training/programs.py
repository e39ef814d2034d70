"""The compiled programs of a run, all made before its first update.

Programs are compiled ahead of time for the exact shapes, so a call that would need another
compilation is an error and not a pause of a minute.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from bigbatch.engine import functions as step
from bigbatch.engine import sharded_optimizer
from bigbatch.engine.task import PyTree, Task
from bigbatch.layout import memory
from bigbatch.training import compilation_cache

# Programs that are compiled at once. On CPU one uses all cores, and two would only take each
# other's memory; elsewhere too a large network's needs gigabytes.
_ON_CPU, _ELSEWHERE = 1, 2


@dataclasses.dataclass(frozen=True)
class Programs:
    """The programs of one task, optimizer and mesh.

    Attributes:
      accumulate: microbatch examples -> compiled `step.accumulate` (the accumulator is donated).
      apply_update: compiled `step.apply_update` (state and accumulator are donated).
      evaluate: compiled `step.evaluate`.
      init_state: compiled for one device, whatever the mesh; key -> state, as in a checkpoint.
      state_from: parameters, running statistics -> state, otherwise like it; compiled when it is
        called, which few runs do.
      divide: from a state as in a checkpoint, replicated, to that which the updates take.
      unite: and back. Both the same one where the optimizer's state is not divided.
      state_shapes: shapes, dtypes and shardings of the state that the updates take.
      empty_accumulator: makes the accumulator that the first update starts with.
      mean_ghost_statistics: compiled where it is asked for; an accumulator -> running statistics,
        replicated.
      reproducible_unit_examples: of an addend of the reproducible sums; None where they are not.
    """

    accumulate: Mapping[int, Callable]
    apply_update: Callable
    evaluate: Callable
    init_state: Callable[[jax.Array], step.State]
    state_from: Callable[[PyTree, PyTree], step.State]
    divide: Callable[[step.State], step.State]
    unite: Callable[[step.State], step.State]
    state_shapes: step.State
    empty_accumulator: Callable[[], step.Accumulator]
    mean_ghost_statistics: Callable[[Any], PyTree] | None
    reproducible_unit_examples: int | None = None

    def addends(self, batch_size: int) -> tuple[np.ndarray, ...]:
        """What `accumulate` takes beside a microbatch: how many addends an update has."""
        unit = self.reproducible_unit_examples
        return () if unit is None else (np.asarray(-(-batch_size // unit), np.int32),)

    @property
    def compilations(self) -> int:
        """The number of programs that the run's updates and evaluations call."""
        return len(self.accumulate) + 2

    @property
    def device_bytes(self) -> dict[str, int]:
        """What a device needs for the state, for `accumulate` at its largest, for `apply_update`.

        The two programs' needs hold the state's; see `memory.program_bytes`.
        """
        return {
            "state": sum(
                int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
                for leaf in jax.tree.leaves(self.state_shapes)
            ),
            "accumulate": max(map(memory.program_bytes, self.accumulate.values())),
            "apply_update": memory.program_bytes(self.apply_update),
        }


@functools.cache
@compilation_cache.guarded()
def compile_programs(
    task: Task,
    optimizer: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    *,
    example_shapes: tuple[tuple[str, tuple[int, ...], np.dtype], ...],
    training_shapes: tuple[tuple[str, tuple[int, ...], np.dtype], ...],
    hyper_names: tuple[str, ...],
    microbatch_examples: tuple[int, ...],
    evaluation_examples: int,
    ghost_batch_examples: int | None,
    noise_small_batch_examples: int | None = None,
    shard_optimizer: bool = False,
    reproducible: bool = False,
    reestimates: bool = False,
) -> Programs:
    """Compiles everything that a run will call.

    Args:
      task: what is trained.
      optimizer: an Optax transformation whose state has `hyperparams`.
      mesh: the devices.
      example_shapes: name, shape and dtype of what the stream gives for one example.
      training_shapes: likewise, of what only training reads.
      hyper_names: the names of the hyperparameters that the plan gives.
      microbatch_examples: how many a microbatch computes over all devices, for each shape.
      evaluation_examples: likewise, of an evaluation microbatch.
      ghost_batch_examples: examples that share batch-norm statistics; None: all of a microbatch.
      noise_small_batch_examples: of the noise measurement; None: nothing is measured.
      shard_optimizer: whether the optimizer's state is divided over the devices.
      reproducible: sums exactly, so that no layout changes a bit; see `exact_sums`.
      reestimates: whether running statistics are estimated anew; see `reestimate`.

    Returns:
      The programs. Equal arguments return the same ones without compiling anew.
    """
    replicated, sharded = (NamedSharding(mesh, spec) for spec in (step.REPLICATED, step.SHARDED))

    def microbatch(examples: int, *, training: bool = True) -> dict[str, Any]:
        shapes = example_shapes + (training_shapes if training else ())
        leaves = {name: ((examples, *shape), dtype) for name, shape, dtype in shapes}
        leaves["weight"] = ((examples,), np.dtype(np.float32))
        if training:
            # Devices that share a ghost batch have an entry each; see `microbatches.place`.
            entries = max(examples // (ghost_batch_examples or examples), mesh.size)
            leaves["ghost_mask"] = ((entries,), np.dtype(np.float32))
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharded)
            for name, (shape, dtype) in leaves.items()
        }

    def with_sharding(tree: PyTree, sharding: NamedSharding) -> PyTree:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
        )

    measures_noise = noise_small_batch_examples is not None
    unit_examples = noise_small_batch_examples
    if reproducible and unit_examples is None:
        unit_examples = ghost_batch_examples

    def first_state(key: jax.Array) -> step.State:
        return with_bounds(step.init_state(task, optimizer, key))

    def state_from(params: PyTree, running_statistics: PyTree) -> step.State:
        return with_bounds(step.State(params, running_statistics, optimizer.init(params)))

    def with_bounds(state: step.State) -> step.State:
        if not reproducible:
            return state
        examples = microbatch(microbatch_examples[0])
        return state._replace(bounds=step.first_bounds(task, state, examples, measures_noise))

    # Called once: on CPU, to compile it well takes seconds and saves milliseconds.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    quick = {"xla_backend_optimization_level": 0} if on_cpu else None
    init_state = jax.jit(first_state, compiler_options=quick)
    whole = with_sharding(jax.eval_shape(init_state, jax.random.key(0)), replicated)
    state = whole
    divide: Callable[[step.State], step.State] = _unchanged
    unite = divide
    update: Callable = step.apply_update
    if shard_optimizer:
        over = {"optimizer": optimizer, "mesh": mesh}
        divide = jax.jit(functools.partial(sharded_optimizer.divide, **over)).lower(state).compile()
        state = sharded_optimizer.divided_shapes(state, **over)
        unite = jax.jit(functools.partial(sharded_optimizer.unite, **over)).lower(state).compile()
        update = sharded_optimizer.apply_update
    empty = functools.partial(
        step.empty_accumulator,
        task,
        state,
        microbatch(microbatch_examples[0]),
        mesh,
        measures_noise=measures_noise,
        reproducible=reproducible,
    )
    accumulator = with_sharding(jax.eval_shape(empty), sharded)
    precision = jax.tree.leaves(state.params)[0].dtype
    hyper = {name: jax.ShapeDtypeStruct((), precision, sharding=replicated) for name in hyper_names}
    accumulate = jax.jit(
        functools.partial(
            step.accumulate,
            task=task,
            mesh=mesh,
            unit_examples=unit_examples,
            measures_noise=measures_noise,
        ),
        donate_argnums=1,
    )
    addends = (jax.ShapeDtypeStruct((), np.int32, sharding=replicated),) if reproducible else ()
    apply_update = jax.jit(
        functools.partial(update, task=task, optimizer=optimizer, mesh=mesh),
        donate_argnums=(0, 1),
    )
    evaluate = jax.jit(functools.partial(step.evaluate, task=task, mesh=mesh))
    # The compiler lets Python go on: one program is traced while others are compiled. Processes
    # compile in one order, in case their compilers speak with each other.
    workers = _ON_CPU if on_cpu or jax.process_count() > 1 else _ELSEWHERE
    with ThreadPoolExecutor(workers, thread_name_prefix="compile") as pool:

        def compiled(lowered: Any) -> Future[Callable]:
            return pool.submit(lowered.compile)

        # What takes longest comes first.
        accumulates = {
            examples: compiled(accumulate.lower(state, accumulator, microbatch(examples), *addends))
            for examples in microbatch_examples
        }
        applied = compiled(apply_update.lower(state, accumulator, hyper))
        initial = compiled(init_state.lower(jax.random.key(0)))
        test = microbatch(evaluation_examples, training=False)
        evaluated = compiled(evaluate.lower(state, test))
        means = jax.jit(step.mean_ghost_statistics, out_shardings=replicated)
        averaged = compiled(means.lower(accumulator)) if reestimates else None
        return Programs(
            accumulate={examples: one.result() for examples, one in accumulates.items()},
            apply_update=applied.result(),
            evaluate=evaluated.result(),
            init_state=initial.result(),
            state_from=jax.jit(state_from, compiler_options=quick),
            divide=divide,
            unite=unite,
            empty_accumulator=functools.partial(_zeros, accumulator, sharded),
            mean_ghost_statistics=averaged.result() if averaged else None,
            state_shapes=state,
            reproducible_unit_examples=unit_examples if reproducible else None,
        )


def _zeros(shapes: PyTree, sharding: NamedSharding) -> PyTree:
    """Arrays of zeros on the devices; a program for them would take longer to compile."""

    def zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        # Never all of it on one host: on a pod that would be a thousand times the parameters.
        part = sharding.shard_shape(leaf.shape)
        parts = [
            jax.device_put(np.zeros(part, leaf.dtype), device)
            for device in sharding.addressable_devices
        ]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, parts)

    return jax.tree.map(zeros, shapes)


def _unchanged(state: step.State) -> step.State:
    return state
