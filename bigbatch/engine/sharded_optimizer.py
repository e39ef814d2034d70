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
ordinary sharded ones, so that any Optax transformation that treats all elements of an array alike
gives what it gives undivided; others are refused, see `divisible`. A checkpoint holds the arrays in
their own shapes, whatever the devices.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from bigbatch.engine import divisible
from bigbatch.engine.functions import (
    DATA_AXIS,
    REPLICATED,
    SHARDED,
    Accumulator,
    State,
    Whole,
    is_finite,
)
from bigbatch.engine.task import PyTree
from bigbatch.engine.transformations import in_shape_of
from bigbatch.engine.update_rule import Rule
from bigbatch.errors import Problem


@dataclasses.dataclass(frozen=True)
class Parts(Whole):
    """An update of which every device computes one part, for states from `divide`.

    Attributes:
      optimizer: its rule.
      mesh: the devices, along `data`.
    """

    optimizer: Rule
    mesh: Mesh

    spec = SHARDED

    def reduce(self, params: PyTree, own: Accumulator) -> tuple[PyTree, Accumulator]:
        """On a device: its parts of the parameters and the summed gradients, and the other sums."""
        devices, device = self.mesh.size, jax.lax.axis_index(DATA_AXIS)
        total = jax.lax.psum(own._replace(gradients=()), DATA_AXIS)
        joined = jnp.concatenate([_rows(g, devices) for g in jax.tree.leaves(own.gradients)], 1)
        parts = jax.tree.map(lambda p: _as_part(_rows(p, devices)[device], p), params)
        row = jax.lax.psum_scatter(joined, DATA_AXIS)
        gradients = jax.tree.map(
            lambda row, part, whole: row.reshape(part.shape).astype(whole.dtype),
            _split_rows(row[None], parts),
            parts,
            own.gradients,
        )
        return parts, total._replace(gradients=gradients)

    def collect(self, params: PyTree, gradients: PyTree, like: PyTree) -> tuple[PyTree, jax.Array]:
        """All parameters from their parts, and whether all gradients are finite."""

        def gather_on_device(
            parts: PyTree, gradients: PyTree, like: PyTree
        ) -> tuple[PyTree, jax.Array]:
            flat = [part.ravel() for part in jax.tree.leaves(parts)]
            finite = is_finite(gradients)[None]
            joined = jnp.concatenate([*flat, finite.astype(flat[0].dtype)])
            rows = jax.lax.all_gather(joined, DATA_AXIS)
            whole = jax.tree.map(in_shape_of, _split_rows(rows[:, :-1], parts), like)
            return whole, jnp.min(rows[:, -1]).astype(finite.dtype)

        # The types do not know that an all-gather leaves the same on every device.
        return jax.shard_map(
            gather_on_device,
            mesh=self.mesh,
            in_specs=(SHARDED, SHARDED, REPLICATED),
            out_specs=REPLICATED,
            check_vma=False,
        )(params, gradients, like)

    def specs(self, state: State) -> State:
        """How each array of a state is spread over the devices."""
        replicated = jax.tree.map(lambda leaf: REPLICATED, state)
        follows = self._follows_params(state.params)
        divided = jax.tree.map(lambda follows: SHARDED if follows else REPLICATED, follows)
        return replicated._replace(optimizer=divided)

    def divide(self, state: State) -> State:
        """The same state, with the optimizer's divided over the devices."""

        def part(array: jax.Array, is_divided: bool) -> jax.Array:
            return _as_part(_rows(array, self.mesh.size), array) if is_divided else array

        divided = jax.tree.map(part, state.optimizer, self._follows_params(state.params))
        shardings = jax.tree.map(self._sharding, self.specs(state).optimizer)
        return state._replace(optimizer=jax.lax.with_sharding_constraint(divided, shardings))

    def unite(self, state: State) -> State:
        """The same state, every array in its own shape and whole on each device, as in a checkpoint."""
        shapes = jax.eval_shape(self.optimizer.init, state.params)
        united = jax.tree.map(in_shape_of, state.optimizer, shapes)
        replicated = self._sharding(REPLICATED)
        return state._replace(optimizer=jax.lax.with_sharding_constraint(united, replicated))

    def shapes(self, state: State) -> State:
        """Shapes and shardings of what `divide` makes of a state with such shapes."""

        def placed(leaf: jax.ShapeDtypeStruct, spec: jax.P) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._sharding(spec))

        return jax.tree.map(placed, jax.eval_shape(self.divide, state), self.specs(state))

    def problems(self, params: PyTree) -> list[Problem]:
        """What keeps the optimizer from working on parts of these parameters; shapes are enough."""
        found = divisible.obstacle(
            self.optimizer.update,
            jax.eval_shape(self.optimizer.init, params),
            self._follows_params(params),
            params,
            dict.fromkeys(self.optimizer.hyper_names, 0.0),
            1.0,
            devices=self.mesh.size,
        )
        if found is None:
            return []
        allowed = (
            f"False with {self.optimizer.name}: an operation of its update ({found}) needs more of "
            "an array than the part that a device holds"
        )
        return [Problem("shard_optimizer", True, allowed, False)]

    def _sharding(self, spec: jax.P) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def _follows_params(self, params: PyTree) -> PyTree:
        """For each array of the optimizer's state, whether its shape is that of a parameter."""

        def longer(leaf: jax.Array) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((leaf.size + 1, *[1] * (leaf.ndim - 1)), leaf.dtype)

        each = (params, jax.tree.map(longer, params))
        shapes = (jax.eval_shape(self.optimizer.init, p) for p in each)
        return jax.tree.map(lambda leaf, longer: leaf.shape != longer.shape, *shapes)


def _rows(array: jax.Array, devices: int) -> jax.Array:
    """[devices, part]: the array flat, filled up with zeros."""
    return jnp.pad(array.ravel(), (0, -array.size % devices)).reshape(devices, -1)


def _as_part(rows: jax.Array, array: jax.Array) -> jax.Array:
    """Rows of an array on one axis, with as many axes as the array."""
    return rows.reshape(-1, *[1] * (array.ndim - 1))


def _split_rows(joined: jax.Array, parts: PyTree) -> PyTree:
    """[rows, part of all arrays] cut into [rows, part of each]."""
    leaves, structure = jax.tree.flatten(parts)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1].tolist()
    return jax.tree.unflatten(structure, jnp.split(joined, ends, axis=1))
