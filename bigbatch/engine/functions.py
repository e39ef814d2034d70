"""The two compiled functions of a run: accumulate and apply_update.

An update of any batch size is k calls of `accumulate`, one a microbatch, and one of
`apply_update`. The number k is a loop on the host, so a batch size is never compiled. Gradients
travel as sums and counts and are divided once, at the very end; there is no mean of means.

Every device sums its own share: the leaves of the accumulator carry a leading axis of length
`devices`, sharded over the mesh axis `data`. So `accumulate` needs no collective at all, and
`apply_update` needs exactly one all-reduce; where the state is larger than a device, see
`bigbatch.engine.parts`. (`check_vma=False`: with its types of what varies over
the devices, `shard_map` would put a reduction into the gradient by replicated parameters, and
refuse a scan that begins with zeros, so every recurrent network.) Where the parameters of a layer
are gathered while it computes, that is over the mesh axis `fsdp`; over `model` too, where devices
compute it together.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bigbatch.engine import exact_sums, layers, units
from bigbatch.engine.accumulator import RESTS, Accumulator, add, in_parts, specs_of, sums_of
from bigbatch.engine.exact_sums import FixedPoint, two_sum
from bigbatch.engine.in_any_order import in_any_order
from bigbatch.engine.parts import DATA_AXIS, NONE, REPLICATED, Parts, Shard
from bigbatch.engine.task import COUNT, Examples, PyTree, Sums, Task
from bigbatch.engine.update_rule import Rule
from bigbatch.noise.sums import small_batch_sums, square
from bigbatch.schedule.adaptive.gradient_noise import BIG_SQUARE, EXAMPLES, SMALL_SQUARES

IS_EXACT = "is_exact"
GRADIENT_IS_FINITE = "gradient_is_finite"
PARAMS_ARE_FINITE = "params_are_finite"
SHARDED = PartitionSpec(DATA_AXIS)


class State(NamedTuple):
    """Everything that an update changes.

    Attributes:
      params: of the model; like the optimizer's state on every device, or in parts.
      running_statistics: likewise of the model; on every device.
      optimizer: its state, hyperparameters included.
      bounds: where sums are reproducible, int32[leaves of the accumulator]: see `exact_sums`.
      copy: where `params` are masters, or lie in parts but not by layer, the parameters on every
        device, in the dtypes that the task computes with. In no checkpoint.
    """

    params: PyTree
    running_statistics: PyTree
    optimizer: optax.OptState
    bounds: PyTree = ()
    copy: PyTree = None

    @property
    def read_params(self) -> PyTree:
        """The parameters that a microbatch reads."""
        return self.params if self.copy is None else self.copy


def data_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of the given devices, by default all there are, along the axis `data`.

    The devices of one process are neighbours.
    """
    devices = sorted(
        jax.devices() if devices is None else devices, key=lambda d: (d.process_index, d.id)
    )
    return Mesh(np.array(devices), (DATA_AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


def init_state(task: Task, optimizer: optax.GradientTransformation, key: jax.Array) -> State:
    """The state before the first update."""
    params, running_statistics = task.init(key)
    return State(params, running_statistics, optimizer.init(params))


def shardings(state: State, parts: Parts) -> State:
    """Where the arrays of a state lie."""
    whole = jax.tree.map(lambda leaf: NamedSharding(parts.mesh, REPLICATED), state)
    return whole._replace(
        params=parts.sharding(state.params), optimizer=parts.sharding(state.optimizer)
    )


def with_copy(state: State, task: Task, parts: Parts) -> State:
    """The state with the copy of its parameters that microbatches read, if there is to be one."""
    if parts.by_layer or (not parts.cut and task.computes_with is None):
        return state
    like = state.params if task.computes_with is None else task.computes_with
    copy = jax.tree.map(lambda param, like: param.astype(like.dtype), state.params, like)
    whole = NamedSharding(parts.mesh, REPLICATED)
    return state._replace(copy=jax.lax.with_sharding_constraint(copy, whole))


def accumulate(
    state: State,
    accumulator: Accumulator | FixedPoint,
    microbatch: Examples,
    frozen: PyTree = (),
    *,
    task: Task,
    mesh: Mesh,
    shard: Shard = NONE,
    unit_examples: int | None = None,
    measures_noise: bool = False,
) -> Accumulator | FixedPoint:
    """Adds one microbatch's gradients, sums and ghost statistics to the accumulator.

    Args:
      state: the state at the start of the update; only read.
      accumulator: the sums so far; `accumulator.shapes_of` says how they are taken.
      microbatch: arrays [examples, ...] sharded over `data`: whatever the task reads, among it
        `"weight"`, 0 for a masked example; and `"ghost_mask"`, [ghost batches], 1 or 0. Only whole
        ghost batches are masked, and a masked one adds exactly 0.
      frozen: the task's frozen arrays, replicated.
      task: what is trained.
      mesh: the devices, along `data`.
      shard: how the state lies on them: see `bigbatch.engine.parts`.
      unit_examples: the gradient is computed for so many examples at a time, whole ghost batches; a
        device's share holds whole units, where sums are reproducible one. None: of the whole share.
      measures_noise: also sums |gradient|^2 / examples over the units.

    Returns:
      The sums with this microbatch added.
    """
    parts = Parts(mesh, shard).of_calls
    is_exact = isinstance(accumulator, FixedPoint)
    is_cut = jax.tree.map(lambda leaf: any(parts.spec(leaf.shape)), state.read_params)
    rows = layers.rows_of(is_exact, measures_noise)

    def on_device(
        params: PyTree,
        running: PyTree,
        bounds: PyTree,
        accumulator: Accumulator | FixedPoint,
        microbatch: Examples,
        frozen: PyTree,
    ) -> Accumulator | FixedPoint:
        accumulator = jax.tree.map(lambda leaf: leaf[0], accumulator)

        def summed_loss(params: PyTree, unit: Examples) -> tuple[jax.Array, tuple[Sums, PyTree]]:
            outputs, ghost_statistics = task.apply_to(params, running, unit, True, frozen)
            sums = sums_of(task, outputs, unit)
            return sums[task.minimised], (sums, ghost_statistics)

        given = layers.with_room(params, is_cut, rows, bounds if is_exact else None)

        def addend(unit: Examples) -> Accumulator:
            found, (sums, ghost_statistics) = jax.grad(summed_loss, has_aux=True)(given, unit)
            gradients, squared = layers.without_room(found, is_cut, rows)
            if measures_noise:
                sums |= small_batch_sums(gradients, sums[EXAMPLES], lambda _: squared)
            mask = unit["ghost_mask"]
            ghost_statistics = jax.tree.map(
                lambda leaf: jnp.tensordot(mask.astype(leaf.dtype), leaf, 1), ghost_statistics
            )
            return Accumulator(gradients, sums, ghost_statistics, jnp.sum(mask))

        into: Callable[[Any, Accumulator], Any] = add
        unit = None if unit_examples == len(microbatch["weight"]) else unit_examples
        if is_exact:
            # The same program on every layout.
            assert unit is None, "one unit a call"
            into = functools.partial(exact_sums.add, exponents=bounds)
        kind = {"platform": mesh.devices.flat[0].platform, "together": parts.by_layer}
        total = units.add_units(addend, into, accumulator, microbatch, unit, **kind)
        return jax.tree.map(lambda leaf: leaf[None], total)

    of_params = parts.specs(state.read_params)
    sums = specs_of(accumulator, state.read_params, parts)
    return jax.shard_map(
        on_device,
        mesh=parts.mesh,
        in_specs=(of_params, REPLICATED, REPLICATED, sums, parts.each, REPLICATED),
        out_specs=sums,
        check_vma=False,
    )(state.read_params, state.running_statistics, state.bounds, accumulator, microbatch, frozen)


def apply_update(
    state: State,
    accumulator: Accumulator | FixedPoint,
    hyper: Mapping[str, jax.Array],
    *,
    task: Task,
    optimizer: Rule,
    mesh: Mesh,
    shard: Shard = NONE,
) -> tuple[State, Accumulator | FixedPoint, Sums]:
    """Turns the sums of one update into the next state.

    Args:
      state: the state at the start of the update.
      accumulator: the sums over all of its microbatches.
      hyper: scalars by name (`learning_rate`, `momentum`, ...), traced: another value is no other
        program.
      task: what is trained.
      optimizer: its rule.
      mesh: the devices, along `data`.
      shard: how the state lies on them: see `bigbatch.engine.parts`.

    Returns:
      The next state, which is the old one where the update's count is 0; the accumulator emptied;
      and the sums of `accumulate` over the whole update, for `accumulator.on_host`, with
      `gradient_is_finite` of the mean gradient and `params_are_finite` of the next state, 1 or 0.
      With reproducible sums there is also `is_exact`: where it is 0 a bound has failed, and the
      next state is the old one with bounds that hold; the same update is to be computed again.
    """
    parts = Parts(mesh, shard)

    def reduce_on_device(bounds: PyTree, accumulator: Accumulator | FixedPoint) -> tuple[Any, ...]:
        own = jax.tree.map(lambda leaf: leaf[0], accumulator)
        emptied = jax.tree.map(jnp.zeros_like, accumulator)
        if not isinstance(own, FixedPoint):
            return reduced(in_parts(own)), (), emptied
        exact = reduced(exact_sums.parts(own.words), lead=1)
        largest = jax.lax.pmax(own.largest, parts.mesh.axis_names)
        # From here on the program is the same on any number of devices.
        exact, largest = jax.tree.map(jax.lax.optimization_barrier, (exact, largest))
        total, rests = exact_sums.total(exact, largest, bounds)
        pairs = jax.tree.map(lambda *pair: jnp.stack(pair), total.sums, rests.sums)
        return total._replace(sums=pairs), largest, emptied

    def reduced(own: Accumulator, lead: int = 0) -> Accumulator:
        gradients = jax.tree.map(
            lambda leaf, like: parts.reduced(leaf, like.shape, lead), own.gradients, state.params
        )
        rest = jax.lax.psum(own._replace(gradients=()), parts.mesh.axis_names)
        return rest._replace(gradients=gradients)

    rest: Any = REPLICATED
    spread = specs_of(accumulator, state.params, parts)
    total, largest, emptied = jax.shard_map(
        reduce_on_device,
        mesh=parts.mesh,
        in_specs=(REPLICATED, spread),
        out_specs=(Accumulator(parts.specs(state.params), rest, rest, rest), REPLICATED, spread),
    )(state.bounds, accumulator)
    pairs = {name: two_sum(*pair) for name, pair in total.sums.items()}
    sums: dict[str, Any] = {name: value for name, (value, _) in pairs.items()}
    # Where it is 0 nothing weighs anything.
    moves = sums[COUNT] != 0
    count = jnp.where(moves, sums[COUNT], 1)
    gradients = jax.tree.map(lambda leaf: leaf / count, total.gradients)
    exactly = in_any_order if isinstance(accumulator, FixedPoint) else lambda function: function
    changes, optimizer_state = exactly(optimizer.update)(
        gradients, state.optimizer, state.params, hyper, sums[EXAMPLES]
    )
    params = optax.apply_updates(state.params, changes)
    running = advance_running_statistics(
        state.running_statistics,
        total.ghost_statistics,
        total.ghost_batches,
        decay=task.running_decay,
    )
    sums |= {RESTS: {name: rest for name, (_, rest) in pairs.items()}}
    sums |= {GRADIENT_IS_FINITE: is_finite(gradients), PARAMS_ARE_FINITE: is_finite(params)}
    if SMALL_SQUARES in sums:
        sums |= {BIG_SQUARE: exactly(square)(gradients)}
    bounds = state.bounds
    if isinstance(accumulator, FixedPoint):
        bounds, is_exact = exact_sums.next_bounds(largest, bounds)
        sums |= {IS_EXACT: is_exact.astype(largest.dtype)}
        moves &= is_exact
    next_state = State(params, running, optimizer_state)
    old = state._replace(bounds=(), copy=None)
    next_state = jax.tree.map(lambda new, old: jnp.where(moves, new, old), next_state, old)
    next_state = jax.lax.with_sharding_constraint(next_state, shardings(next_state, parts))
    return with_copy(next_state._replace(bounds=bounds), task, parts), emptied, sums


def is_finite(tree: PyTree) -> jax.Array:
    """float32 scalar: 1 where the sum of all numbers of a tree is finite, else 0.

    One that is not finite makes the sum so. (To look at each takes much longer to compile.)
    """
    total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(tree))
    return jnp.isfinite(total).astype(jnp.float32)


def advance_running_statistics(
    running: PyTree, ghost_sums: PyTree, ghost_batches: jax.Array, *, decay: Any
) -> PyTree:
    """Moves the running statistics by one update of K ghost batches, whatever their order.

    r <- d^K r + (1 - d^K) * (mean over the K): as far as K single steps with decay d would go.

    Args:
      running: statistics before the update.
      ghost_sums: the same, summed over the update's ghost batches.
      ghost_batches: K, a float scalar.
      decay: d, a number in (0, 1), not traced, or one for each array in a tree like the statistics.

    Returns:
      The statistics after the update.
    """

    def advanced(decay: Any, running: jax.Array, ghost_sum: jax.Array) -> jax.Array:
        # log d in double precision: float32's d is off by 6e-8, its power K by K times that.
        fresh = -jnp.expm1(ghost_batches * math.log(decay))
        mean = ghost_sum / ghost_batches
        return ((1 - fresh) * running + fresh * mean).astype(running.dtype)

    return jax.tree.map(advanced, jax.tree.broadcast(decay, running), running, ghost_sums)


def evaluate(
    state: State,
    microbatch: Examples,
    frozen: PyTree = (),
    *,
    task: Task,
    optimizer: Rule,
    mesh: Mesh,
    shard: Shard = NONE,
) -> Sums:
    """The loss's sums over one microbatch of test examples, with the running statistics.

    Args:
      state: its parameters, or what its optimizer evaluates with, such as their average, and its
        running statistics are read.
      microbatch: as in `accumulate`; single examples may be masked by their weight.
      frozen: the task's frozen arrays, replicated.
      task: what is trained.
      optimizer: which parameters are evaluated.
      mesh: the devices, along `data`.
      shard: how the state lies on them: see `bigbatch.engine.parts`.

    Returns:
      What the loss returns, each leaf [devices]: every device's own sums.
    """
    parts = Parts(mesh, shard).of_calls

    def on_device(params: PyTree, running: PyTree, microbatch: Examples, frozen: PyTree) -> Sums:
        outputs, _ = task.apply_to(params, running, microbatch, False, frozen)
        return jax.tree.map(lambda leaf: leaf[None], task.loss(outputs, microbatch))

    params = state.read_params
    if optimizer.evaluates_others(state.optimizer):
        params = optimizer.evaluation_params(state.optimizer, state.params)
    return jax.shard_map(
        on_device,
        mesh=parts.mesh,
        in_specs=(parts.specs(params), REPLICATED, parts.each, REPLICATED),
        out_specs=parts.each,
        check_vma=False,
    )(params, state.running_statistics, microbatch, frozen)
