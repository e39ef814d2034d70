"""Optimizer state divided over the devices, for models whose state is too large to be on each.

Each device keeps one part in `devices` of the optimizer's state and updates that part of the
parameters (Rajbhandari et al. 2020, "ZeRO", stage 1). An update reduce-scatters the gradients,
updates the parts and all-gathers the new parameters: one collective each, whatever the number of
arrays, since all arrays are joined to one [devices, part]. Beside them there is the all-reduce of
the sums and ghost statistics, and one of a single number for every norm that the optimizer asks
for: the global one of clipping, those of each array for LARS and LAMB.

An array is divided as [padded length, 1, 1, ...]: flat, zeros at its end up to a multiple of the
devices, and with as many axes as it had, since rules ask for them (what has one axis does not
decay). Zeros change no norm. Outside of the collectives the optimizer sees these arrays whole, as
ordinary sharded ones, so that any Optax transformation whose state follows the parameters gives
what it gives undivided. A checkpoint holds the arrays in their own shapes, whatever the devices.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from bigbatch.engine.functions import (
    DATA_AXIS,
    GRADIENT_IS_FINITE,
    REPLICATED,
    SHARDED,
    Accumulator,
    State,
    advance_running_statistics,
    is_finite,
)
from bigbatch.engine.task import PyTree, Sums, Task
from bigbatch.engine.transformations import in_shape_of
from bigbatch.noise.sums import square
from bigbatch.schedule.adaptive.gradient_noise import BIG_SQUARE, SMALL_SQUARES


def apply_update(
    state: State,
    accumulator: Accumulator,
    hyper: Mapping[str, jax.Array],
    *,
    task: Task,
    optimizer: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
) -> tuple[State, Accumulator, Sums]:
    """Does what `step.apply_update` does, for a state from `divide`."""

    def reduce_on_device(params: PyTree, accumulator: Accumulator) -> tuple[PyTree, ...]:
        own = jax.tree.map(lambda leaf: leaf[0], accumulator)
        total = jax.lax.psum(own._replace(gradients=()), DATA_AXIS)
        joined = jnp.concatenate([_rows(g, mesh.size) for g in jax.tree.leaves(own.gradients)], 1)
        part = jax.lax.psum_scatter(joined, DATA_AXIS) / total.sums["count"]
        device = jax.lax.axis_index(DATA_AXIS)
        own_params = jax.tree.map(lambda p: _as_part(_rows(p, mesh.size)[device], p), params)
        return _split(part, own_params), own_params, total

    gradients, params, total = jax.shard_map(
        reduce_on_device,
        mesh=mesh,
        in_specs=(REPLICATED, SHARDED),
        out_specs=(SHARDED, SHARDED, REPLICATED),
    )(state.params, accumulator)
    injected = state.optimizer._replace(hyperparams={**state.optimizer.hyperparams, **hyper})
    changes, optimizer_state = optimizer.update(
        gradients, injected, params, num_examples=total.sums["count"]
    )
    optimizer_state = jax.lax.with_sharding_constraint(
        optimizer_state, _shardings(optimizer, state.params, mesh)
    )

    def gather_on_device(parts: PyTree, params: PyTree) -> PyTree:
        joined = jnp.concatenate([part.ravel() for part in jax.tree.leaves(parts)])
        rows = jax.lax.all_gather(joined, DATA_AXIS)
        return jax.tree.map(in_shape_of, _split_rows(rows, parts), params)

    # The types do not know that an all-gather leaves the same on every device.
    new_params = jax.shard_map(
        gather_on_device,
        mesh=mesh,
        in_specs=(SHARDED, REPLICATED),
        out_specs=REPLICATED,
        check_vma=False,
    )(optax.apply_updates(params, changes), state.params)
    running = advance_running_statistics(
        state.running_statistics,
        total.ghost_statistics,
        total.ghost_batches,
        decay=task.running_decay,
    )
    emptied = jax.lax.with_sharding_constraint(
        jax.tree.map(jnp.zeros_like, accumulator), NamedSharding(mesh, SHARDED)
    )
    # A gradient that is not finite makes parameters that are not, and all devices hold those.
    sums = {**total.sums, GRADIENT_IS_FINITE: is_finite(new_params)}
    if SMALL_SQUARES in sums:
        sums |= {BIG_SQUARE: square(gradients)}
    return State(new_params, running, optimizer_state), emptied, sums


def divide(state: State, *, optimizer: optax.GradientTransformationExtraArgs, mesh: Mesh) -> State:
    """The same state, with the optimizer's divided over the devices."""

    def part(array: jax.Array, is_divided: bool) -> jax.Array:
        return _as_part(_rows(array, mesh.size), array) if is_divided else array

    follows = _follows_params(optimizer, state.params)
    divided = jax.tree.map(part, state.optimizer, follows)
    divided = jax.lax.with_sharding_constraint(divided, _shardings(optimizer, state.params, mesh))
    return state._replace(optimizer=divided)


def divided_shapes(
    state: State, *, optimizer: optax.GradientTransformationExtraArgs, mesh: Mesh
) -> State:
    """Shapes and shardings of what `divide` makes of a state with such shapes."""
    divided = jax.eval_shape(functools.partial(divide, optimizer=optimizer, mesh=mesh), state)
    shardings = _shardings(optimizer, state.params, mesh)

    def placed(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return state._replace(optimizer=jax.tree.map(placed, divided.optimizer, shardings))


def unite(state: State, *, optimizer: optax.GradientTransformationExtraArgs, mesh: Mesh) -> State:
    """The same state, every array in its own shape and whole on each device, as in a checkpoint."""
    shapes = jax.eval_shape(optimizer.init, state.params)
    united = jax.tree.map(in_shape_of, state.optimizer, shapes)
    united = jax.lax.with_sharding_constraint(united, NamedSharding(mesh, REPLICATED))
    return state._replace(optimizer=united)


def _follows_params(optimizer: optax.GradientTransformation, params: PyTree) -> PyTree:
    """For each array of the optimizer's state, whether its shape is that of a parameter."""

    def longer(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((leaf.size + 1, *[1] * (leaf.ndim - 1)), leaf.dtype)

    shapes = (jax.eval_shape(optimizer.init, p) for p in (params, jax.tree.map(longer, params)))
    return jax.tree.map(lambda leaf, longer: leaf.shape != longer.shape, *shapes)


def _shardings(optimizer: optax.GradientTransformation, params: PyTree, mesh: Mesh) -> PyTree:
    """Of the optimizer's state."""
    return jax.tree.map(
        lambda follows: NamedSharding(mesh, SHARDED if follows else REPLICATED),
        _follows_params(optimizer, params),
    )


def _rows(array: jax.Array, devices: int) -> jax.Array:
    """[devices, part]: the array flat, filled up with zeros."""
    return jnp.pad(array.ravel(), (0, -array.size % devices)).reshape(devices, -1)


def _as_part(rows: jax.Array, array: jax.Array) -> jax.Array:
    """Rows of an array on one axis, with as many axes as the array."""
    return rows.reshape(-1, *[1] * (array.ndim - 1))


def _split(joined: jax.Array, parts: PyTree) -> PyTree:
    """A device's row of all arrays, cut into arrays like `parts`."""
    rows = _split_rows(joined[None], parts)
    return jax.tree.map(lambda row, part: row.reshape(part.shape).astype(part.dtype), rows, parts)


def _split_rows(joined: jax.Array, parts: PyTree) -> PyTree:
    """[rows, part of all arrays] cut into [rows, part of each]."""
    leaves, structure = jax.tree.flatten(parts)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1].tolist()
    return jax.tree.unflatten(structure, jnp.split(joined, ends, axis=1))
