"""Whether an optimizer may work on arrays that are flat, with zeros at their ends.

Most rules treat all elements of an array alike, and ask at most for its norm. Others look at rows
and columns (Muon, Adafactor) or count the elements: on a flat array they would fail or, worse, go
on with other numbers. So an update is traced twice, on the arrays as they are and on the flat ones,
and the two programs are compared operation by operation. They have to be the same but for shapes,
and every operation that meets an array of another shape has to be one of these: on each element by
itself, a sum of all elements, a number spread over all. What the padding holds is followed on the
way, as far as it is known: where elements are summed, it has to be zero.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from bigbatch.engine.task import PyTree

_ELEMENTWISE = frozenset(
    "abs add and atan2 cbrt ceil clamp convert_element_type copy cos div eq erf erfc exp exp2 expm1 "
    "floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg not or pow rem "
    "round rsqrt select_n sign sin sqrt square stop_gradient sub tan tanh xor".split()
)
_IN_ORDER = ("broadcast_in_dim", "reshape", "squeeze")
# What changes nothing in a reduction.
_NEUTRAL = {"reduce_sum": 0, "reduce_and": True, "reduce_or": False}
# Programs within a program, by the names of their parameters.
_CALLS = {
    **dict.fromkeys(["jit", "closed_call", "remat"], "jaxpr"),
    **dict.fromkeys(["custom_jvp_call", "custom_vjp_call"], "call_jaxpr"),
}


class _MixedError(Exception):
    """An operation, its name the message, that flat arrays would give other results."""


def flat(leaf: Any, devices: int) -> jax.ShapeDtypeStruct:
    """The shape of an array that is divided over so many devices, with as many axes, at least 1."""
    length = -(-math.prod(leaf.shape) // devices) * devices
    return jax.ShapeDtypeStruct((length, *[1] * (len(leaf.shape) - 1)), leaf.dtype)


def obstacle(
    update: Callable[..., tuple[PyTree, PyTree]],
    state: PyTree,
    follows: PyTree,
    params: PyTree,
    *scalars: PyTree,
    devices: int,
) -> str | None:
    """What keeps an update from being computed on flat arrays.

    Args:
      update: (gradients, state, parameters, *scalars) -> (changes of the parameters, state).
      state: shapes of the optimizer's.
      follows: like it, True for the arrays that are divided.
      params: shapes of the parameters, all of which are divided.
      scalars: what else `update` takes.
      devices: how many the arrays are divided over.

    Returns:
      The name of the first operation that would give other results; None: there is no such thing.
    """
    is_divided = jax.tree.leaves((jax.tree.map(lambda leaf: True, params), follows))

    def traced(shape: Callable[[Any], Any]) -> Any:
        own = jax.tree.map(shape, params)
        kept = jax.tree.map(lambda leaf, follows: shape(leaf) if follows else leaf, state, follows)
        return jax.make_jaxpr(update)(own, kept, own, *scalars)

    whole = traced(lambda leaf: jax.ShapeDtypeStruct(leaf.shape or (1,), leaf.dtype))
    try:
        divided = traced(lambda leaf: flat(leaf, devices))
    except (TypeError, ValueError, IndexError, ZeroDivisionError):
        return "one that needs the arrays' own shapes"
    own, kept = len(jax.tree.leaves(params)), len(jax.tree.leaves(state))
    known = [0.0 if divided else None for divided in is_divided]
    rest = len(whole.in_avals) - own - kept
    try:
        while True:
            paddings = [*known, *known[:own], *[None] * (rest - own)]
            after = _results(whole, divided, paddings, devices)
            # A state whose padding moves away from zero does so in every update.
            still = known[:own] + [
                _same(pair) for pair in zip(known[own:], after[own:], strict=True)
            ]
            if [value is None for value in still] == [value is None for value in known]:
                return None
            known = still
    except _MixedError as error:
        return str(error)


def _results(whole: Any, divided: Any, paddings: Sequence[Any], devices: int) -> list[Any]:
    """Follows the padding through a program.

    Args:
      whole: the program of arrays as they are.
      divided: that of flat ones.
      paddings: for each argument, what its padding holds; None where that is not known, or there is
        none. For a number, what it is.
      devices: how many the arrays are divided over.

    Returns:
      Likewise for each result.
    """
    for one, two in zip(getattr(whole, "consts", ()), getattr(divided, "consts", ()), strict=True):
        if one is not two and not np.array_equal(one, two):
            raise _MixedError("constant")
    whole, divided = (getattr(program, "jaxpr", program) for program in (whole, divided))
    places = [*whole.constvars, *whole.invars], [*divided.constvars, *divided.invars]
    values = [*[None] * len(whole.constvars), *paddings]
    known = dict(zip(places[0], zip(places[1], values, strict=True), strict=True))

    def padding(name: str, one: Any, two: Any) -> Any:
        if isinstance(one, Literal):
            # A mean divides by the number of elements.
            alike, value = isinstance(two, Literal) and np.array_equal(one.val, two.val), one.val
        else:
            twin, value = known[one]
            alike = twin is two
        if not alike:
            raise _MixedError(name)
        return value

    for one, two in zip(whole.eqns, divided.eqns, strict=False):
        name = one.primitive.name
        if one.primitive is not two.primitive or len(one.invars) != len(two.invars):
            raise _MixedError(name)
        pairs = zip(one.invars, two.invars, strict=True)
        found = _operation(one, two, [padding(name, *pair) for pair in pairs], devices)
        twins = zip(two.outvars, found, strict=True)
        known.update(zip(one.outvars, twins, strict=True))
    ends = zip(whole.outvars, divided.outvars, strict=True)
    return [padding("result", *pair) for pair in ends]


def _operation(one: Any, two: Any, paddings: list[Any], devices: int) -> list[Any]:
    """The padding of what an operation of both programs results in."""
    name = one.primitive.name
    if name in _CALLS:
        inner = (equation.params[_CALLS[name]] for equation in (one, two))
        return _results(*inner, paddings, devices)
    if name == "cond":
        branches = zip(one.params["branches"], two.params["branches"], strict=True)
        each = [_results(*branch, paddings[1:], devices) for branch in branches]
        return [_same(values) for values in zip(*each, strict=True)]
    shapes = [
        [v.aval.shape for v in (*equation.invars, *equation.outvars)] for equation in (one, two)
    ]
    sizes = [[math.prod(shape) for shape in of_one] for of_one in shapes]
    alike = str(one.params) == str(two.params)
    if alike and name in _ELEMENTWISE:
        return [_elementwise(one, paddings)]
    if name in _NEUTRAL and sizes[0][-1] == sizes[1][-1] == 1:
        if shapes[0][0] == shapes[1][0] or paddings[0] == _NEUTRAL[name]:
            return [None]
    if name in _IN_ORDER and shapes[1][-1] in (
        shapes[0][-1],
        flat(one.outvars[0].aval, devices).shape,
    ):
        # A number is spread, or all elements stay where they are.
        if sizes[0][0] == sizes[1][0] == 1 or all(size[0] == size[-1] for size in sizes):
            return [paddings[0]]
    if alike and shapes[0] == shapes[1]:
        return [None] * len(one.outvars)
    raise _MixedError(name)


def _elementwise(equation: Any, paddings: list[Any]) -> Any:
    """The padding of one operation's result."""
    name = equation.primitive.name
    if all(value is not None for value in paddings):
        typed = zip(paddings, equation.invars, strict=True)
        numbers = [np.asarray(value, variable.aval.dtype) for value, variable in typed]
        return np.asarray(equation.primitive.bind(*numbers, **equation.params))
    if name == "select_n":
        return _same(paddings[1:])
    # Nothing divides by what is zero everywhere, or multiplies with what is not finite.
    zeros = [value is not None and value == 0 for value in paddings]
    is_zero = zeros[0] if name == "div" else name in ("and", "mul") and any(zeros)
    return np.zeros((), equation.outvars[0].aval.dtype) if is_zero else None


def _same(values: Sequence[Any]) -> Any:
    """The value that all of them are; None where one is not known, or they differ."""
    first, *others = values
    is_same = all(value is not None and np.array_equal(value, first) for value in values)
    return first if is_same else None
