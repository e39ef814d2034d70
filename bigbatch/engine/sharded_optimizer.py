"""Optimizer state divided over the devices, for models whose state is too large to be on each.

Each device keeps one part in `devices` of the optimizer's state and updates that part of the
parameters (Rajbhandari et al. 2020, "ZeRO", stage 1). An update reduce-scatters the gradients,
updates the parts and all-gathers the new parameters: one collective each, whatever the number of
arrays, since all arrays are joined to one [devices, part]. Beside them there is the all-reduce of
the sums and ghost statistics, and one of a single number for every norm that the optimizer asks
for: the global one of clipping, those of each array for LARS and LAMB.

An array is divided as [padded length]: flat, filled up to a multiple of the devices. The optimizer
knows nothing of that. Its update is traced on the arrays' own shapes, and the program is followed
operation by operation (`_follow`): what is done to each element, to all or with one number is done
to the flat arrays, without what fills them up; for anything else (the matrix products of Muon, the
rows and columns of Adafactor) the array is made whole on every device, and the result is divided
again. So every Optax transformation gives what it gives undivided. A checkpoint holds the arrays in
their own shapes, whatever the devices.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import Literal
from jax.sharding import Mesh, NamedSharding

from bigbatch.engine.accumulator import Accumulator
from bigbatch.engine.functions import (
    DATA_AXIS,
    REPLICATED,
    SHARDED,
    State,
    Whole,
    is_finite,
)
from bigbatch.engine.task import PyTree
from bigbatch.engine.transformations import in_shape_of
from bigbatch.engine.update_rule import Rule
from bigbatch.errors import Problem

_ELEMENTWISE = re.compile(
    "abs|add|and|ceil|clamp|convert_element_type|copy|div|eq|erf|exp|expm1|floor|ge|gt|integer_pow|"
    "is_finite|le|log|log1p|logistic|lt|max|min|mul|ne|neg|not|or|pow|rem|round|rsqrt|select_n|"
    "sign|sqrt|square|stop_gradient|sub|tanh|xor"
)
# Reductions of bits and numbers, and what changes nothing in them.
_NEUTRAL = {"reduce_sum": 0, "reduce_and": True, "reduce_or": False}
# Keep the elements' order.
_IN_ORDER = ("broadcast_in_dim", "reshape", "squeeze")
# Programs within a program, and the parameter that holds them.
_CALLS = dict.fromkeys(["jit", "closed_call", "checkpoint"], "jaxpr") | dict.fromkeys(
    ["custom_jvp_call", "custom_vjp_call"], "call_jaxpr"
)


class Flat(NamedTuple):
    """An array that is divided.

    Attributes:
      array: [padded length], in parts over `data`.
      shape: its own.
    """

    array: jax.Array
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Parts(Whole):
    """An update of which every device computes one part, of states from `divide`.

    Attributes:
      optimizer: its rule.
      mesh: the devices, along `data`.
    """

    optimizer: Rule
    mesh: Mesh

    def specs(self, arrays: PyTree) -> PyTree:
        """How arrays that an update works on are spread: those of more than one number in parts."""
        return jax.tree.map(lambda leaf: SHARDED if _is_divided(leaf) else REPLICATED, arrays)

    def reduce(self, params: PyTree, own: Accumulator) -> tuple[PyTree, Accumulator]:
        """On a device: its parts of the parameters and of the gradients' sums; the other sums."""
        devices, device = self.mesh.size, jax.lax.axis_index(DATA_AXIS)
        leaves, structure = jax.tree.flatten(own.gradients)
        numbers = [leaf for leaf in leaves if not _is_divided(leaf)]
        rows = [_rows(leaf, devices) for leaf in leaves if _is_divided(leaf)]
        total = jax.lax.psum(own._replace(gradients=numbers), DATA_AXIS)
        row = jax.lax.psum_scatter(jnp.concatenate(rows, axis=1), DATA_AXIS)
        parts, numbers = iter(_split(row, [leaf[0] for leaf in rows])), iter(total.gradients)
        gradients = [next(parts if _is_divided(leaf) else numbers) for leaf in leaves]
        params = jax.tree.map(
            lambda leaf: _rows(leaf, devices)[device] if _is_divided(leaf) else leaf, params
        )
        return params, total._replace(gradients=jax.tree.unflatten(structure, gradients))

    def update(
        self, optimizer: Rule, state: State, gradients: PyTree, params: PyTree, *scalars: PyTree
    ) -> tuple[PyTree, optax.OptState]:
        """The changes of the parameters, divided like them, and the optimizer's next state."""
        own_gradients = jax.tree.map(
            lambda p, g: jax.ShapeDtypeStruct(p.shape, g.dtype), state.params, gradients
        )
        kept = jax.eval_shape(optimizer.init, state.params)
        program, results = jax.make_jaxpr(optimizer.update, return_shape=True)(
            own_gradients, kept, state.params, *scalars
        )
        given = jax.tree.leaves((gradients, state.optimizer, params, *scalars))
        found = self._follow(
            program,
            [
                Flat(leaf, shape.shape) if _is_divided(shape) else leaf
                for leaf, shape in zip(given, program.in_avals, strict=True)
            ],
        )
        shapes, structure = jax.tree.flatten(results)
        divided = [
            self._flat(leaf).array if _is_divided(shape) else self._whole(leaf)
            for leaf, shape in zip(found, shapes, strict=True)
        ]
        return jax.tree.unflatten(structure, divided)

    def collect(self, params: PyTree, gradients: PyTree, like: PyTree) -> tuple[PyTree, jax.Array]:
        """All parameters from their parts, and whether all gradients are finite."""

        def gather_on_device(
            params: PyTree, gradients: PyTree, like: PyTree
        ) -> tuple[PyTree, jax.Array]:
            leaves, structure = jax.tree.flatten(params)
            wholes = jax.tree.leaves(like)
            parts = [leaf for leaf, whole in zip(leaves, wholes, strict=True) if _is_divided(whole)]
            finite = is_finite(gradients)[None]
            joined = jnp.concatenate([*parts, finite.astype(parts[0].dtype)])
            rows = jax.lax.all_gather(joined, DATA_AXIS)
            gathered = iter(_split(rows, [*parts, finite]))
            whole = [
                in_shape_of(next(gathered), whole) if _is_divided(whole) else leaf
                for leaf, whole in zip(leaves, wholes, strict=True)
            ]
            return jax.tree.unflatten(structure, whole), jnp.min(next(gathered))

        # The types do not know that an all-gather leaves the same on every device.
        return jax.shard_map(
            gather_on_device,
            mesh=self.mesh,
            in_specs=(self.specs(like), self.specs(like), REPLICATED),
            out_specs=REPLICATED,
            check_vma=False,
        )(params, gradients, like)

    def divide(self, state: State) -> State:
        """The same state, with the optimizer's divided over the devices."""
        divided = [
            self._flat(leaf).array if _is_divided(leaf) else leaf
            for leaf in jax.tree.leaves(state.optimizer)
        ]
        structure = jax.tree.structure(state.optimizer)
        return state._replace(optimizer=jax.tree.unflatten(structure, divided))

    def unite(self, state: State) -> State:
        """The same state, every array in its own shape and on each device, as in a checkpoint."""
        shapes = jax.eval_shape(self.optimizer.init, state.params)
        united = jax.tree.map(in_shape_of, state.optimizer, shapes)
        return state._replace(optimizer=self._placed(united, REPLICATED))

    def shapes(self, state: State) -> State:
        """Shapes and shardings of what `divide` makes of a state with such shapes."""
        return jax.tree.map(
            lambda leaf, spec: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=NamedSharding(self.mesh, spec)
            ),
            jax.eval_shape(self.divide, state),
            jax.tree.map(lambda leaf: REPLICATED, state)._replace(
                optimizer=self.specs(state.optimizer)
            ),
        )

    def problems(self, params: PyTree) -> list[Problem]:
        """What keeps parameters of such shapes from being divided."""
        if any(map(_is_divided, jax.tree.leaves(params))):
            return []
        allowed = "False for parameters none of which is an array of more than one number"
        return [Problem("shard_optimizer", True, allowed, False)]

    def _follow(self, program: Any, values: Sequence[Any]) -> list[Any]:
        """What a program makes of values, some of them `Flat`; so may its results be."""
        jaxpr = getattr(program, "jaxpr", program)
        places = [*jaxpr.constvars, *jaxpr.invars]
        known = dict(zip(places, [*getattr(program, "consts", ()), *values], strict=True))

        def value(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else known[atom]

        for equation in jaxpr.eqns:
            results = self._results(equation, [value(atom) for atom in equation.invars])
            known.update(zip(equation.outvars, results, strict=True))
        return [value(atom) for atom in jaxpr.outvars]

    def _results(self, equation: Any, values: list[Any]) -> Sequence[Any]:
        """What one operation makes of values."""
        primitive, options = equation.primitive, equation.params
        name, result = primitive.name, equation.outvars[0].aval
        if name in _CALLS:
            return self._follow(options[_CALLS[name]], values)
        first, given = values[0], [atom.aval for atom in equation.invars]
        if name == "broadcast_in_dim" and given[0].size == 1 < result.size:
            length = -(-result.size // self.mesh.size) * self.mesh.size
            return [Flat(jnp.full(length, jnp.reshape(first, ()), result.dtype), result.shape)]
        if any(isinstance(value, Flat) for value in values):
            alike = all(kind.size == 1 or kind.shape == result.shape for kind in given)
            if _ELEMENTWISE.fullmatch(name) and alike:
                flat = list(map(self._flat_or_number, values, given))
                return [Flat(primitive.bind(*flat, **options), result.shape)]
            if name in _IN_ORDER and given[0].size == result.size:
                return [Flat(first.array, result.shape)]
            if name in _NEUTRAL and result.shape == ():
                own = jnp.arange(first.array.size) < given[0].size
                array = jnp.where(own, first.array, _NEUTRAL[name])
                return [primitive.bind(array, **{**options, "axes": (0,)})]
        results = primitive.bind(*map(self._whole, values), **options)
        return results if primitive.multiple_results else [results]

    def _flat_or_number(self, value: Any, kind: Any) -> Any:
        if kind.size > 1:
            return self._flat(value).array
        return jnp.reshape(value, ()) if kind.shape else value

    def _flat(self, value: Any) -> Flat:
        if isinstance(value, Flat):
            return value
        return Flat(self._placed(_rows(value, self.mesh.size).ravel(), SHARDED), value.shape)

    def _whole(self, value: Any) -> Any:
        if not isinstance(value, Flat):
            return value
        array = self._placed(value.array, REPLICATED)
        return array[: math.prod(value.shape)].reshape(value.shape)

    def _placed(self, arrays: PyTree, spec: jax.P) -> PyTree:
        return jax.lax.with_sharding_constraint(arrays, NamedSharding(self.mesh, spec))


def _is_divided(array: Any) -> bool:
    return array.size > 1 and not jnp.issubdtype(array.dtype, jax.dtypes.extended)


def _rows(array: jax.Array, devices: int) -> jax.Array:
    """[devices, part]: the array flat, filled up with zeros."""
    return jnp.pad(array.ravel(), (0, -array.size % devices)).reshape(devices, -1)


def _split(joined: jax.Array, parts: Sequence[jax.Array]) -> list[jax.Array]:
    """The last axis cut into parts of such lengths and dtypes."""
    ends = np.cumsum([part.size for part in parts])[:-1].tolist()
    pieces = jnp.split(joined, ends, axis=-1)
    return [piece.astype(part.dtype) for piece, part in zip(pieces, parts, strict=True)]
