"""Programs whose results are the same, to the bit, however their arrays lie in parts.

What is done to each element is that already, and so are sums of whole numbers, largest elements and
copies. A sum of floats is not: its order is that of the parts. So a program is followed operation
by operation, and the sum of all elements of an array (a norm, a mean square) is taken exactly, by
`exact_sums.whole_sum`. What else adds floats, such as a product of matrices, stays as it is;
`ordered` names it.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from bigbatch.engine import exact_sums

_FREE = re.compile(
    "abs|add|add_any|and|argmax|argmin|broadcast_in_dim|cbrt|ceil|clamp|concatenate|"
    "convert_element_type|copy|copy_p|cos|cosh|div|dynamic_slice|dynamic_update_slice|eq|erf|"
    "erf_inv|exp|exp2|expand_dims|expm1|floor|ge|gt|integer_pow|iota|is_finite|le|log|log1p|"
    "logistic|lt|max|min|mul|ne|neg|nextafter|not|optimization_barrier|or|pad|population_count|"
    "pow|random_\\w+|real|reduce_and|reduce_max|reduce_min|reduce_or|rem|reshape|rev|round|rsqrt|"
    "select_n|shift_\\w+|sign|sin|sinh|slice|split|sqrt|square|squeeze|stop_gradient|sub|tan|tanh|"
    "threefry2x32|transpose|xor"
)
# Programs within a program, and the parameter that holds them.
_CALLS = dict.fromkeys(["jit", "closed_call", "checkpoint", "remat2"], "jaxpr") | dict.fromkeys(
    ["custom_jvp_call", "custom_vjp_call"], "call_jaxpr"
)


def in_any_order(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with exact sums of all elements of an array."""

    def exactly(*arguments: Any) -> Any:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        results = _follow(program, jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return exactly


def ordered(program: Any) -> set[str]:
    """The operations of a traced program whose results depend on an order, by name."""
    found: set[str] = set()
    for equation in getattr(program, "jaxpr", program).eqns:
        name = equation.primitive.name
        if name in _CALLS or name == "cond":
            inner = equation.params.get("branches") or [equation.params[_CALLS[name]]]
            found = found.union(*map(ordered, inner))
        elif not (_FREE.fullmatch(name) or _is_whole_sum(equation) or not _adds_floats(equation)):
            found.add(name)
    return found


def _adds_floats(equation: Any) -> bool:
    """Whether it may: some of what it takes are floats, in more than one element."""
    taken = [atom.aval for atom in equation.invars]
    return any(jnp.issubdtype(kind.dtype, jnp.floating) and kind.size > 1 for kind in taken)


def _is_whole_sum(equation: Any) -> bool:
    is_sum = equation.primitive.name == "reduce_sum" and equation.outvars[0].aval.shape == ()
    return is_sum and jnp.issubdtype(equation.invars[0].aval.dtype, jnp.floating)


def _follow(program: Any, values: list[Any]) -> list[Any]:
    """What a traced program makes of values."""
    jaxpr = getattr(program, "jaxpr", program)
    places = [*jaxpr.constvars, *jaxpr.invars]
    known = dict(zip(places, [*getattr(program, "consts", ()), *values], strict=True))

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else known[atom]

    for equation in jaxpr.eqns:
        results = _results(equation, [value(atom) for atom in equation.invars])
        known.update(zip(equation.outvars, results, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _results(equation: Any, values: list[Any]) -> list[Any]:
    """What one operation makes of values."""
    name, options = equation.primitive.name, equation.params
    if name in _CALLS:
        return _follow(options[_CALLS[name]], values)
    if name == "cond":
        index, *rest = values
        branches = [
            lambda *given, b=branch: _follow(b, list(given)) for branch in options["branches"]
        ]
        return list(jax.lax.switch(index, branches, *rest))
    if _is_whole_sum(equation):
        return [exact_sums.whole_sum(values[0])]
    results = equation.primitive.bind(*values, **options)
    return list(results) if equation.primitive.multiple_results else [results]
