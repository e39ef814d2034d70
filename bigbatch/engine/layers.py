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

Where M devices compute a layer together, each multiplies a part of its matrices (Shoeybi et al.
2019, "Megatron-LM"), of as many heads or features as the others, for the examples of all M. So the
layer begins with `all_examples` and ends with `own_examples`, and what is between is 1/M of the
work and of the parameters, for M times the examples. All else knows nothing of it. The gradient of
such a part is of the examples of all, so no device's own noise is in it, and sums are rounded in
another order: neither the noise nor exact sums go with it.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bigbatch.engine import exact_sums
from bigbatch.engine.parts import LAYER_AXIS, MODEL, MODEL_AXIS, cut_axis
from bigbatch.engine.task import PyTree, wide
from bigbatch.errors import Problem, UserError
from bigbatch.noise.sums import square

_NOISE, _EXACT = 2, 5
WHOLE, PART, ALL, OWN = "_whole", "_part", "_all", "_own"
"""The names of its programs in one that is traced."""


def whole(
    part: jax.Array, shape: Sequence[int], dtype: Any = None, together: int | None = None
) -> jax.Array:
    """A parameter whole, for a network that may be trained with `shard` {"layer": F}.

    Call it once on each parameter, in the layer that reads it, and on nothing else. Without such
    parts it changes nothing but the dtype.

    Args:
      part: what the network was given as the parameter.
      shape: of the whole parameter.
      dtype: in which it travels, and is wanted; None for its own. Gradients travel in float32 at
        least.
      together: the axis along which each of the devices that compute the layer together takes a
        part; None where each takes all of it.

    Returns:
      The parameter, of that shape; with `together` this device's part along that axis.

    Raises:
      UserError: `part` is no part of an array of that shape, or that axis is none of as many equal
        parts.
    """
    shape, model = tuple(shape), devices_together()
    devices = (_size(LAYER_AXIS) or 1) * model
    axis = cut_axis(shape, devices) if devices > 1 else None
    expected = tuple(size // devices if n == axis else size for n, size in enumerate(shape))
    has_room = axis is not None and part.ndim > len(shape)
    given = part.shape[1:] if has_room else part.shape
    if given != expected:
        allowed = f"{expected}, the part of a parameter of shape {shape} on one of {devices}"
        raise UserError(Problem("whole", f"an array of shape {given}", allowed))
    dtype = jnp.dtype(part.dtype if dtype is None else dtype)
    if together is not None and model > 1:
        together %= len(shape)
        if shape[together] % model:
            allowed = f"a divisor of {shape[together]}, of the axis {together} of {shape}"
            raise UserError(Problem("shard", f"{model} devices as {MODEL!r}", allowed))
        return _part(part, axis, together, dtype)
    if axis is None:
        return part.astype(dtype)
    return _whole(part, axis, dtype, has_room)


def devices_together() -> int:
    """How many devices compute a layer together."""
    # Others have meshes with an axis of that name.
    return (_size(LAYER_AXIS) and _size(MODEL_AXIS)) or 1


def all_examples(x: jax.Array) -> jax.Array:
    """The examples of all devices that compute a layer together, of each device's [examples, ...].

    On each device that computes layers by itself these are its own.
    """
    if devices_together() == 1:
        return x
    return _all(x)


def own_examples(y: jax.Array) -> jax.Array:
    """A device's own examples, of the sum of what each device has made of `all_examples`."""
    if devices_together() == 1:
        return y
    return _own(y)


@jax.jit
def _all(x: jax.Array) -> jax.Array:
    gathered: jax.Array = jax.lax.all_gather(x, MODEL_AXIS, tiled=True)
    return gathered


@jax.jit
def _own(y: jax.Array) -> jax.Array:
    own: jax.Array = jax.lax.psum_scatter(y, MODEL_AXIS, tiled=True)
    return own


def _size(axis: str) -> int:
    """The number of devices along an axis of the mesh; 0 without it."""
    try:
        return int(jax.lax.axis_size(axis))
    except NameError:
        return 0


def _axes() -> Any:
    """Those over which an array's parts lie, in their order."""
    return (MODEL_AXIS, LAYER_AXIS) if devices_together() > 1 else LAYER_AXIS


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _whole(part: jax.Array, axis: int, dtype: Any, has_room: bool) -> jax.Array:
    gathered: jax.Array = _gathered(part, axis, dtype, has_room)
    return gathered


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(part: jax.Array, axis: int, dtype: Any, has_room: bool) -> jax.Array:
    own = (part[0] if has_room else part).astype(dtype)
    return jax.lax.all_gather(own, _axes(), axis=axis, tiled=True)


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
        return jax.lax.psum_scatter(array, _axes(), scatter_dimension=place, tiled=True)

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


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _part(part: jax.Array, axis: int | None, together: int, dtype: Any) -> jax.Array:
    taken: jax.Array = _taken(part, axis, together, dtype)
    return taken


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _taken(part: jax.Array, axis: int | None, together: int, dtype: Any) -> jax.Array:
    return _moved(part.astype(dtype), axis, together)


def _moved(part: jax.Array, axis: int | None, together: int) -> jax.Array:
    """A device's part along `together`, of one that lies in parts along `axis`."""
    model = devices_together()
    if axis is None:
        size = part.shape[together] // model
        begin = size * jax.lax.axis_index(MODEL_AXIS)
        return jax.lax.dynamic_slice_in_dim(part, begin, size, together)
    if axis == together:
        # Its pieces lie side by side.
        gathered: jax.Array = jax.lax.all_gather(part, LAYER_AXIS, axis=axis, tiled=True)
        return gathered
    part = jax.lax.all_to_all(part, MODEL_AXIS, together, axis, tiled=True)
    pieces = part.reshape(*part.shape[:axis], model, -1, *part.shape[axis + 1 :])
    pieces = jax.lax.all_gather(pieces, LAYER_AXIS, axis=axis + 1)
    return pieces.reshape(*part.shape[:axis], -1, *part.shape[axis + 1 :])


def _taken_forward(
    part: jax.Array, axis: int | None, together: int, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    # For its shape; nothing of it is kept.
    return _taken(part, axis, together, dtype), jnp.zeros((0, *part.shape), part.dtype)


def _taken_backward(
    axis: int | None, together: int, dtype: Any, like: jax.Array, gradient: jax.Array
) -> tuple[jax.Array]:
    given = jax.ShapeDtypeStruct(like.shape[1:], wide(like).dtype)
    moved = functools.partial(_moved, axis=axis, together=together)
    (scattered,) = jax.linear_transpose(moved, given)(wide(gradient))
    return (scattered.astype(like.dtype),)


_taken.defvjp(_taken_forward, _taken_backward)


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
