"""The compiled programs of a run, all made before its first update.

Programs are compiled ahead of time for the exact shapes, so a call that would need another
compilation is an error and not a pause of a minute.
"""

import dataclasses
import functools
import math
import os
import re
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from bigbatch.engine import accumulator as accumulators
from bigbatch.engine import exact_sums, functions
from bigbatch.engine.accumulator import Accumulator
from bigbatch.engine.parts import NONE, Parts, Shard
from bigbatch.engine.task import PyTree, Task
from bigbatch.engine.update_rule import Rule
from bigbatch.layout import memory
from bigbatch.training import compilation_cache
from bigbatch.training.wall_time import compiling

# Programs that are compiled at once. On CPU one uses all cores, and two would only take each
# other's memory; elsewhere too a large network's needs gigabytes.
_ON_CPU, _ELSEWHERE = 1, 2

APPLY_UPDATE = "apply_update"

# What compilers are told; docs/compilers.md has the reasons.
_GPU_OPTIONS: dict[str, Any] = {
    "xla_gpu_all_reduce_combine_threshold_bytes": 2**28,
    "xla_gpu_exclude_nondeterministic_ops": True,
}
# A program of several devices is searched for what is computed twice before it is simplified, one
# of a single device only after: other products are fused with sums, and bits move by the number.
_REPRODUCIBLE_OPTIONS = {"xla_disable_hlo_passes": "cse"}
# Of a * b + b * c one product is rounded before it is added. Code for CPUs chooses it by the length
# of the array, and an update's arrays in parts are shorter: each operation of an update then has a
# loop of its own.
_OF_PARTS_ON_CPU = {"xla_disable_hlo_passes": "cse,fusion"}
_SCATTERED = re.compile(r'stablehlo\.(?:select_and_)?scatter".*?\}\) : \((.*?)\) ->', re.DOTALL)
# To give a sum of more scattered numbers an order, XLA sorts them for longer than all else takes.
_MOST_SORTED = 2**20

# Gives what stands for a program, from its name, what was traced, what was lowered, and what its
# compiler is to be told.
Compiler = Callable[[str, Any, Any, dict[str, Any]], Any]


@dataclasses.dataclass(frozen=True)
class Programs:
    """The programs of one task, optimizer and mesh.

    Attributes:
      accumulate: microbatch examples -> compiled `functions.accumulate` (accumulator is donated).
      apply_update: compiled `functions.apply_update` (state and accumulator are donated).
      evaluate: compiled `functions.evaluate`.
      init_state: a key's data -> state, each array made where it lies; compiled when it is called,
        as a run that goes on has a checkpoint.
      state_from: parameters, running statistics -> state, otherwise like it; compiled when it is
        called, which few runs do. So is the next.
      with_copy: compiled `functions.with_copy`, for a state from a checkpoint.
      state_shapes: shapes, dtypes and shardings of the state.
      sum_names: of what the loss returns.
      sum_shapes: of the accumulator, likewise.
      evaluation_examples: of an evaluation microbatch, over all devices.
      reproducible: whether sums are exact, and so may have to be taken again.
      shard: how the state lies on the devices.
    """

    accumulate: Mapping[int, Callable]
    apply_update: Callable
    evaluate: Callable
    init_state: Callable[[jax.Array], functions.State]
    state_from: Callable[[PyTree, PyTree], functions.State]
    with_copy: Callable[[functions.State], functions.State]
    state_shapes: functions.State
    sum_names: tuple[str, ...]
    sum_shapes: Any
    evaluation_examples: int
    reproducible: bool = False
    shard: Shard = NONE

    @property
    def compilations(self) -> int:
        """The number of programs that the run's updates and evaluations call."""
        return len(self.accumulate) + 2

    def empty_accumulator(self) -> Accumulator:
        """The accumulator that the first update starts with."""
        zeros: Accumulator = accumulators.zeros(self.sum_shapes)
        return zeros

    @property
    def device_bytes(self) -> dict[str, int]:
        """What a device needs for the state, for `accumulate` at its largest, for `apply_update`.

        The two programs' needs hold the state's; see `memory.program_bytes`.
        """
        return {
            "state": _device_bytes(
                self.state_shapes, jax.tree.map(lambda leaf: leaf.sharding, self.state_shapes)
            ),
            "accumulate": max(map(memory.program_bytes, self.accumulate.values())),
            "apply_update": memory.program_bytes(self.apply_update),
        }


def _device_bytes(shapes: PyTree, shardings: PyTree) -> int:
    """Of a device's parts of arrays."""
    leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(at.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, at in leaves)


def held_bytes(
    task: Task,
    optimizer: Rule,
    shapes: tuple[PyTree, PyTree],
    mesh: Mesh,
    reproducible: bool,
    shard: Shard,
) -> dict[str, int]:
    """What lies on a device all the time, by what it is; from shapes, before anything is compiled.

    Args:
      task: what is trained.
      optimizer: its rule.
      shapes: of the parameters and the running statistics.
      mesh: the devices.
      reproducible: whether sums are exact, of two words each.
      shard: how the state lies: see `bigbatch.engine.parts`.
    """
    parts = Parts(mesh, shard)
    begun = functions.State(*shapes, jax.eval_shape(optimizer.init, shapes[0]))
    state = jax.eval_shape(functools.partial(functions.with_copy, task=task, parts=parts), begun)
    where = functions.shardings(state, parts)._asdict()
    held = {
        name.replace("_", " "): _device_bytes(tree, where[name])
        for name, tree in state._asdict().items()
    }
    sums = _device_bytes(shapes[0], parts.of_calls.sharding(shapes[0]))
    return held | {"sums of gradients": sums * (2 if reproducible else 1)}


def compiler_options(name: str, text: str, platform: str, reproducible: bool) -> dict[str, Any]:
    """What the compiler is told of a lowered program, save what XLA_FLAGS names."""
    options: dict[str, Any] = dict(_REPRODUCIBLE_OPTIONS) if reproducible else {}
    if reproducible and platform == "cpu" and name == APPLY_UPDATE:
        options |= _OF_PARTS_ON_CPU
    if platform == "gpu":
        options |= _GPU_OPTIONS
        # The first is what they are added to.
        added = [kind for kinds in _SCATTERED.findall(text) for kind in kinds.split("tensor<")[2:]]
        sizes = [math.prod(int(n) for n in re.findall(r"(\d+)x", kind)) for kind in added]
        if max(sizes, default=0) > _MOST_SORTED:
            del options["xla_gpu_exclude_nondeterministic_ops"]
    given = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in options.items() if name not in given}


def _while_in_use(compile_anew: Callable[..., Programs]) -> Callable[..., Programs]:
    """Gives equal arguments the same programs, while some run has them or no others are newer."""
    known: weakref.WeakValueDictionary[Any, Programs] = weakref.WeakValueDictionary()
    newest: list[Programs] = []

    @functools.wraps(compile_anew)
    def compile_programs(*arguments: Any, **options: Any) -> Programs:
        key = arguments, tuple(sorted(options.items()))
        programs = known.get(key)
        if programs is None:
            programs = known[key] = compile_anew(*arguments, **options)
        newest[:] = [programs]
        return programs

    return compile_programs


@_while_in_use
@compiling()
@compilation_cache.guarded()
def compile_programs(
    task: Task,
    optimizer: Rule,
    mesh: Mesh,
    *,
    example_shapes: tuple[tuple[str, tuple[int, ...], np.dtype], ...],
    microbatch_examples: tuple[int, ...],
    evaluation_examples: int | None,
    ghost_batch_examples: int,
    noise_small_batch_examples: int | None,
    shard: Shard,
    reproducible: bool,
    compensated: bool,
    compiler: Compiler | None = None,
) -> Programs:
    """Compiles everything that a run will call.

    Args:
      task: what is trained.
      optimizer: its rule.
      mesh: the devices.
      example_shapes: name, shape and dtype of what the stream gives for one example.
      microbatch_examples: how many a microbatch computes over all devices, for each shape.
      evaluation_examples: likewise, of an evaluation microbatch; None: as many as of the first.
      ghost_batch_examples: examples that share batch-norm statistics.
      noise_small_batch_examples: of the noise measurement; None: nothing is measured.
      shard: how the state lies on the devices: see `bigbatch.engine.parts`.
      reproducible: sums exactly, so that no layout changes a bit; see `exact_sums`.
      compensated: keeps what rounding leaves of sums; see `functions.empty_accumulator`.
      compiler: makes what stands for each program; None for the programs themselves.

    Returns:
      The programs.
    """
    replicated, sharded = (
        NamedSharding(mesh, spec) for spec in (functions.REPLICATED, functions.SHARDED)
    )

    def microbatch(examples: int, *, training: bool = True) -> dict[str, Any]:
        leaves = {name: ((examples, *shape), dtype) for name, shape, dtype in example_shapes}
        leaves["weight"] = ((examples,), np.dtype(np.float32))
        if training:
            # Devices that share a ghost batch have an entry each; see `microbatches.place`.
            entries = max(examples // ghost_batch_examples, mesh.size)
            leaves["ghost_mask"] = ((entries,), np.dtype(np.float32))
        if training and task.takes_keys:
            leaves["key"] = ((examples, 2), np.dtype(np.uint32))
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

    parts = Parts(mesh, shard)

    def first_state(key_data: jax.Array) -> functions.State:
        key = jax.random.wrap_key_data(key_data)
        return begun_with(functions.init_state(task, optimizer, key))

    def state_from(params: PyTree, running_statistics: PyTree) -> functions.State:
        given = params, running_statistics
        params, running_statistics = jax.tree.map(lambda a, like: a.astype(like.dtype), given, like)
        return begun_with(functions.State(params, running_statistics, optimizer.init(params)))

    def begun_with(state: functions.State) -> functions.State:
        if reproducible:
            examples = microbatch(microbatch_examples[0])
            given = state.params, state.running_statistics, examples, measures_noise
            bounds = exact_sums.first_exponents(accumulators.addend_shapes(task, *given))
            state = state._replace(bounds=bounds)
        state = jax.lax.with_sharding_constraint(state, functions.shardings(state, parts))
        return functions.with_copy(state, task, parts)

    platform = mesh.devices.flat[0].platform
    on_cpu = platform == "cpu"

    def compiled(name: str, function: Any, *shapes: Any) -> Callable[[], Any]:
        traced = function.trace(*shapes)
        lowered = traced.lower()
        text = lowered.as_text() if platform == "gpu" else ""
        options = compiler_options(name, text, platform, reproducible)
        if compiler:
            return lambda: compiler(name, traced, lowered, options)
        return functools.partial(lowered.compile, options or None)

    # Called once: on CPU, to compile it well takes seconds and saves milliseconds.
    quick = {"xla_backend_optimization_level": 0} if on_cpu else None
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    state = jax.eval_shape(first_state, key)
    where = functions.shardings(state, parts)
    placed = functools.partial(jax.jit, out_shardings=where, compiler_options=quick)
    state = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), state, where
    )
    like = state.params, state.running_statistics
    frozen = with_sharding(task.frozen, replicated)
    accumulator = accumulators.shapes_of(
        task,
        *like,
        microbatch(microbatch_examples[0]),
        parts.of_calls,
        measures_noise=measures_noise,
        reproducible=reproducible,
        compensated=compensated,
    )
    hyper = {
        name: jax.ShapeDtypeStruct((), precision(state), sharding=replicated)
        for name in optimizer.hyper_names
    }
    accumulate = jax.jit(
        functools.partial(
            functions.accumulate,
            task=task,
            mesh=mesh,
            shard=shard,
            unit_examples=unit_examples,
            measures_noise=measures_noise,
        ),
        donate_argnums=1,
    )
    apply_update = jax.jit(
        functools.partial(
            functions.apply_update, task=task, optimizer=optimizer, mesh=mesh, shard=shard
        ),
        donate_argnums=(0, 1),
    )

    @functools.cache
    @compiling()
    @compilation_cache.guarded()
    def initial() -> Any:
        return compiled("init_state", placed(first_state), with_sharding(key, replicated))()

    evaluate = jax.jit(
        functools.partial(
            functions.evaluate, task=task, optimizer=optimizer, mesh=mesh, shard=shard
        )
    )
    evaluation_examples = evaluation_examples or microbatch_examples[0]
    # The compiler lets Python go on: one program is traced while others are compiled. Processes
    # compile in one order, in case their compilers speak with each other.
    workers = _ON_CPU if on_cpu or jax.process_count() > 1 else _ELSEWHERE
    with ThreadPoolExecutor(workers, thread_name_prefix="compile") as pool:

        def begun(name: str, function: Any, *shapes: Any) -> Future[Any]:
            return pool.submit(compiled(name, function, *shapes))

        # What takes longest comes first.
        accumulates = {
            n: begun(f"accumulate {n}", accumulate, state, accumulator, microbatch(n), frozen)
            for n in microbatch_examples
        }
        applied = begun(APPLY_UPDATE, apply_update, state, accumulator, hyper)
        test = microbatch(evaluation_examples, training=False)
        evaluated = begun("evaluate", evaluate, state, test, frozen)
        return Programs(
            accumulate={examples: one.result() for examples, one in accumulates.items()},
            apply_update=applied.result(),
            evaluate=evaluated.result(),
            init_state=lambda data: initial()(data),
            state_from=placed(state_from),
            with_copy=jax.jit(functools.partial(functions.with_copy, task=task, parts=parts)),
            sum_shapes=accumulator,
            evaluation_examples=evaluation_examples,
            state_shapes=state,
            sum_names=tuple(jax.eval_shape(evaluate, state, test, frozen)),
            reproducible=reproducible,
            shard=shard,
        )


def precision(state: functions.State) -> np.dtype:
    """In which hyperparameters reach the optimizer: float32 at least."""
    kinds = {leaf.dtype for leaf in jax.tree.leaves(state.params)}
    return jax.numpy.result_type(np.float32, *kinds)
