"""Layers that are whole only while they are computed.

With `shard` {"layer": F} each of F devices has a part of the parameters. A network calls `whole` on
each of them, at the head of the layer that reads it: a gather, whose transpose scatters. So each
device gets its part of the gradient's sum over the group (Zhao et al. 2023, "PyTorch FSDP"), in
float32 at least. With `jax.checkpoint` around the layer the whole is gathered again in the backward
pass, and in memory for no longer than the layer needs it.

Noise is measured of a device's own gradient, and exact sums round it, so both come before the
scatter. What they find leaves the backward pass as the gradient by *room* beside the part, rows of
zeros that nothing reads:

    none      part                                       gradient: sum
    noise     part, 0                                    sum, square
    exact     part, exponent of the bound, 0, 0, 0       digits (3), largest magnitude, square

A parameter that is made whole twice would have two squares and two roundings: `layer_checks`
refuses it.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bigbatch.engine import exact_sums
from bigbatch.engine.parts import LAYER_AXIS, cut_axis
from bigbatch.engine.task import PyTree, wide
from bigbatch.errors import Problem, UserError
from bigbatch.noise.sums import square

_NOISE, _EXACT = 2, 5
WHOLE = "_whole"
"""The name of its program in one that is traced."""


def whole(part: jax.Array, shape: Sequence[int], dtype: Any = None) -> jax.Array:
    """A parameter whole, for a network that may be trained with `shard` {"layer": F}.

    Call it once on each parameter, in the layer that reads it, and on nothing else. Without such
    parts it changes nothing but the dtype.

    Args:
      part: what the network was given as the parameter.
      shape: of the whole parameter.
      dtype: in which it travels, and is wanted; None for its own. Gradients travel in float32 at
        least.

    Returns:
      The parameter, of that shape.

    Raises:
      UserError: `part` is no part of an array of that shape.
    """
    shape = tuple(shape)
    try:
        devices = jax.lax.axis_size(LAYER_AXIS)
    except NameError:
        devices = 1
    axis = cut_axis(shape, devices) if devices > 1 else None
    expected = tuple(size // devices if n == axis else size for n, size in enumerate(shape))
    has_room = axis is not None and part.ndim > len(shape)
    given = part.shape[1:] if has_room else part.shape
    if given != expected:
        allowed = f"{expected}, the part of a parameter of shape {shape} on one of {devices}"
        raise UserError(Problem("whole", f"an array of shape {given}", allowed))
    dtype = jnp.dtype(part.dtype if dtype is None else dtype)
    if axis is None:
        return part.astype(dtype)
    return _whole(part, axis, dtype, has_room)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _whole(part: jax.Array, axis: int, dtype: Any, has_room: bool) -> jax.Array:
    gathered: jax.Array = _gathered(part, axis, dtype, has_room)
    return gathered


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(part: jax.Array, axis: int, dtype: Any, has_room: bool) -> jax.Array:
    own = (part[0] if has_room else part).astype(dtype)
    return jax.lax.all_gather(own, LAYER_AXIS, axis=axis, tiled=True)


def _forward(
    part: jax.Array, axis: int, dtype: Any, has_room: bool
) -> tuple[jax.Array, jax.Array | None]:
    # Nothing of the part is kept but the exponent, one number.
    exponent = part[1].ravel()[0] if has_room and len(part) == _EXACT else None
    return _gathered(part, axis, dtype, has_room), exponent


def _backward(
    axis: int, dtype: Any, has_room: bool, exponent: jax.Array | None, gradient: jax.Array
) -> tuple[jax.Array]:
    def scattered(array: jax.Array) -> jax.Array:
        place = axis + array.ndim - gradient.ndim
        return jax.lax.psum_scatter(array, LAYER_AXIS, scatter_dimension=place, tiled=True)

    if not has_room:
        return (scattered(wide(gradient)),)
    gradient = wide(jax.lax.optimization_barrier(gradient))
    rows = [jnp.sum(gradient * gradient)]
    if exponent is None:
        summed = scattered(gradient)[None]
    else:
        rows.insert(0, exact_sums.magnitude(gradient))
        summed = scattered(exact_sums.digits(gradient, exponent.astype(jnp.int32)))
    taken = jnp.stack(rows).reshape(-1, *[1] * gradient.ndim)
    taken = jnp.broadcast_to(taken, (len(rows), *summed.shape[1:]))
    return (jnp.concatenate([summed, taken]),)


_gathered.defvjp(_forward, _backward)


def rows_of(exact: bool, measures_noise: bool) -> int:
    """How many rows a part comes with; 0: the part alone, without an axis of rows."""
    return _EXACT if exact else _NOISE if measures_noise else 0


def with_room(params: PyTree, is_cut: PyTree, rows: int, exponents: Any = None) -> PyTree:
    """The parameters as a network is given them.

    Args:
      params: those of a device.
      is_cut: for each, whether it is a part.
      rows: from `rows_of`.
      exponents: of the parameters' bounds, in their order, where sums are exact.
    """
    leaves, structure = jax.tree.flatten(params)
    for n, cut in enumerate(jax.tree.leaves(is_cut)):
        if cut and rows:
            rest = jnp.zeros((rows - 1, *leaves[n].shape), leaves[n].dtype)
            if exponents is not None:
                rest = rest.at[0].set(exponents[n].astype(rest.dtype))
            leaves[n] = jnp.concatenate([leaves[n][None], rest])
    return jax.tree.unflatten(structure, leaves)


def without_room(gradients: PyTree, is_cut: PyTree, rows: int) -> tuple[PyTree, Any]:
    """What is added to the accumulator, and the square of the device's own gradient.

    Args:
      gradients: by what `with_room` gave.
      is_cut: as there.
      rows: as there.

    Returns:
      Gradients, parts of sums or `exact_sums.Digits`; and the square, None where `rows` is 0.
    """
    if not rows:
        return gradients, None
    leaves, structure = jax.tree.flatten(gradients)
    squares = []
    for n, cut in enumerate(jax.tree.leaves(is_cut)):
        found = leaves[n]
        if not cut:
            squares.append(square(found))
        else:
            numbers = found.reshape(rows, -1)[:, 0]
            squares.append(numbers[-1])
            leaves[n] = exact_sums.Digits(found[:3], numbers[3]) if rows == _EXACT else found[0]
    return jax.tree.unflatten(structure, leaves), sum(squares)
