"""Calls a constructor with values from a config, and says everything that is wrong with them.

The signature of the constructor (a function or a dataclass) is the only description of a part of a
config: its parameters are the fields, its annotations their types, its defaults their defaults.
"""

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bigbatch.checks import MOST_WHOLE
from bigbatch.errors import Problem, UserError, among, nearest_name


def bind(
    constructor: Callable[..., Any],
    fields: Mapping[str, Any],
    problems: list[Problem],
    *,
    prefix: str = "",
    context: Mapping[str, Any] | None = None,
) -> Any:
    """Builds `constructor(**fields)` and adds to `problems` all that is wrong with the fields.

    Where a wrong value has a nearest valid one the building goes on with that, so that one mistake
    does not hide those behind it. What is built is to be used only if there are no problems.

    Args:
      constructor: annotated keyword parameters, which raises `UserError` for values out of range.
      fields: values by parameter name, as read from a config.
      problems: grows by what is wrong.
      prefix: dotted name of this part of the config.
      context: values that the caller knows and the config does not give; those that the constructor
        has no parameter for are left out. None stands for a value that another mistake has made
        unknown: a constructor that needs it is not called, but its fields are checked.

    Returns:
      What the constructor returns; None if it was not or could not be called.
    """
    hints = typing.get_type_hints(constructor)
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(constructor).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    given_context = {k: v for k, v in (context or {}).items() if k in parameters}
    names = [name for name in parameters if name not in given_context]
    found: list[Problem] = []
    values: dict[str, Any] = {}
    mended: set[str] = set()
    for name, value in fields.items():
        if name not in names:
            allowed, nearest = among(name, names)
            found.append(Problem(name, value, allowed if names else "no field at all", nearest))
            continue
        converted = convert(value, hints.get(name, Any))
        if not isinstance(converted, Mismatch):
            values[name] = converted
            continue
        found.append(Problem(name, value, converted.allowed, converted.nearest))
        if converted.nearest is not None:
            values[name] = converted.nearest
            mended.add(name)
    required = [n for n in names if parameters[n].default is inspect.Parameter.empty]
    found += [
        Problem(name, "nothing", f"{describe(hints.get(name, Any))}; the field is required")
        for name in required
        if name not in fields
    ]
    result = None
    known = None not in given_context.values()
    if known and all(name in values for name in required):
        refused: list[Problem] = []
        result = _call(constructor, values, given_context, refused)
        found = _joined(found, [p for p in refused if p.field in mended])
        found += [p for p in refused if p.field not in mended]
    problems.extend(problem.under(prefix) if prefix else problem for problem in found)
    return result


def _joined(found: list[Problem], refused: list[Problem]) -> list[Problem]:
    """One problem where a value is of the wrong type and what was meant by it is out of range."""
    later = {problem.field: problem for problem in refused}

    def join(first: Problem) -> Problem:
        if first.field not in later:
            return first
        allowed = f"{first.allowed}, and {later[first.field].allowed}"
        return dataclasses.replace(first, allowed=allowed, nearest=later[first.field].nearest)

    return [join(problem) for problem in found]


def _call(
    constructor: Callable[..., Any],
    values: Mapping[str, Any],
    context: Mapping[str, Any],
    found: list[Problem],
) -> Any:
    """Calls the constructor; where values are out of range, once more with the nearest valid ones.

    The second result serves only to find the mistakes that lie behind the first ones.
    """
    try:
        return constructor(**values, **context)
    except UserError as error:
        found.extend(error.problems)
        mended = {p.field: p.nearest for p in error.problems}
    if None in mended.values() or not mended.keys() <= values.keys():
        return None
    try:
        return constructor(**{**values, **mended}, **context)
    except UserError:
        return None


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """A value that is not of the annotated type.

    Attributes:
      allowed: the type in words.
      nearest: the value of that type that was probably meant, or None.
    """

    allowed: str
    nearest: Any = None


def convert(value: Any, hint: Any) -> Any:
    """The value as the type that `hint` names, or a `Mismatch`.

    Only conversions that lose nothing are made: an integer to a float, a list to a tuple.

    >>> convert([1, 2], tuple[float, ...])
    (1.0, 2.0)
    >>> convert(32.0, int)
    Mismatch(allowed='a whole number', nearest=32)
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            converted = convert(value, option)
            if not isinstance(converted, Mismatch):
                return converted
        nearest = convert(value, arguments[0])
        return Mismatch(describe(hint), nearest.nearest)
    if origin is typing.Literal:
        # By type too: True is no 1.
        if any(type(value) is type(a) and value == a for a in arguments):
            return value
        return Mismatch(describe(hint), _nearest_of(value, arguments))
    if origin in (tuple, Sequence, list):
        return _convert_sequence(value, hint, origin, arguments)
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        return dict(value) if isinstance(value, Mapping) else Mismatch(describe(hint))
    if hint in (int, float) and isinstance(value, int):
        if isinstance(value, bool) or abs(value) >= MOST_WHOLE:
            return Mismatch(describe(hint))
        return hint(value)
    if hint is type(None):
        return None if value is None else Mismatch("nothing")
    if isinstance(value, hint):
        return value
    return Mismatch(describe(hint), _probably_meant(value, hint))


def _convert_sequence(value: Any, hint: Any, origin: Any, arguments: tuple[Any, ...]) -> Any:
    any_length = origin is not tuple or arguments[-1] is Ellipsis
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        converted = convert(value, arguments[0])
        if isinstance(converted, Mismatch):
            return Mismatch(describe(hint))
        return Mismatch(describe(hint), (converted,) * (1 if any_length else len(arguments)))
    if any_length:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        return Mismatch(describe(hint))
    converted_all = [convert(v, a) for v, a in zip(value, arguments, strict=True)]
    if not any(isinstance(converted, Mismatch) for converted in converted_all):
        return tuple(converted_all)
    meant = tuple(c.nearest if isinstance(c, Mismatch) else c for c in converted_all)
    return Mismatch(describe(hint), None if None in meant else meant)


def _probably_meant(value: Any, hint: Any) -> Any:
    """What a text such as "0.1" or "true", or a float such as 32.0, stands for, or None."""
    if hint is bool and isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower())
    if hint not in (int, float) or not _is_float(value):
        return None
    if hint is float:
        return float(value)
    return round(float(value)) if abs(float(value)) < MOST_WHOLE else None


def _is_float(value: Any) -> bool:
    """Whether the value stands for a number that a float can hold."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _nearest_of(value: Any, options: Sequence[Any]) -> Any:
    """The option nearest to the value, as a number or else as it is spelled, or None."""
    if isinstance(value, int | float) and all(isinstance(option, int) for option in options):
        return min(options, key=lambda option: abs(option - value))
    spelled = {str(option): option for option in options}
    return spelled.get(nearest_name(str(value), list(spelled)) or "")


_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    Any: "a value",
    bool: "True or False",
    type(None): "None",
}


def describe(hint: Any) -> str:
    """A type in words.

    >>> describe(tuple[float, ...])
    'a tuple, each entry a number'
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(a) for a in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (tuple, Sequence, list):
        if origin is tuple and arguments[-1] is not Ellipsis:
            return f"a tuple of {len(arguments)} entries, each {describe(arguments[0])}"
        return f"a tuple, each entry {describe(arguments[0])}"
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        return "a group of fields"
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))
