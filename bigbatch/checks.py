"""Checks of arguments that collect every problem of one call before it fails.

>>> checks = Checks()
>>> checks.number("momentum", 1.0, "a number from 0 to below 1", at_least=0, below=1)
False
>>> checks.whole("batch_size", 0, "a whole number of examples, at least 1")
False
>>> checks.done()
Traceback (most recent call last):
...
bigbatch.errors.UserError: momentum: given 1.0; nearest: 0.999; allowed: a number from 0 to below 1
batch_size: given 0; nearest: 1; allowed: a whole number of examples, at least 1
"""

import dataclasses
import json
import math
import numbers
from pathlib import Path
from typing import Any, TypeGuard

from bigbatch import errors
from bigbatch.places.paths import place

# Metadata of a dataclass's field that may differ at every start of a run: it has no influence on
# the result. All other fields are statistical.
HARDWARE = {"kind": "hardware"}

# A momentum that someone could mean; the float next to 1 is not.
_JUST_BELOW_1 = 0.999
# Whole numbers are below it: no array holds more.
MOST_WHOLE = 2**63


class Checks:
    """The problems found so far in the arguments of one call."""

    def __init__(self) -> None:
        self.problems: list[errors.Problem] = []

    def require(
        self, ok: bool, field: str, given: object, allowed: str, nearest: object = None
    ) -> bool:
        """Notes a problem unless `ok`; gives `ok` back."""
        if not ok:
            self.problems.append(errors.Problem(field, given, allowed, nearest))
        return ok

    def number(
        self,
        field: str,
        value: object,
        allowed: str,
        *,
        above: float = -math.inf,
        at_least: float = -math.inf,
        below: float = math.inf,
        at_most: float = math.inf,
    ) -> bool:
        """Notes a problem unless `value` is a finite number in the range.

        The nearest value is the end of the range that was passed. An open end has none, but for 1,
        the end of momenta and shares.
        """
        if not is_number(value):
            return self.require(False, field, value, allowed)
        x = float(value)
        nearest = None
        if x < at_least > -math.inf:
            nearest = at_least
        elif x > at_most < math.inf:
            nearest = at_most
        elif x >= below == 1:
            nearest = _JUST_BELOW_1
        inside = math.isfinite(x) and above < x < below and at_least <= x <= at_most
        return self.require(inside, field, value, allowed, nearest)

    def whole(self, field: str, value: object, allowed: str, *, at_least: int = 1) -> bool:
        """Notes a problem unless `value` is a whole number of at least `at_least`.

        A float that holds a whole number passes; the caller converts it with `int`.
        """
        if not is_number(value) or not abs(value) < MOST_WHOLE:
            return self.require(False, field, value, allowed)
        nearest = max(at_least, round(float(value)))
        return self.require(float(value) == nearest, field, value, allowed, nearest)

    def done(self) -> None:
        """Ends the checks.

        Raises:
          errors.UserError: with every problem noted, if there is one.
        """
        if self.problems:
            raise errors.UserError(self.problems)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number that a float can hold; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return not math.isnan(float(value))
    except OverflowError:
        return False


def parsed(text: str | bytes, kind: Any) -> Any:
    """The value of a JSON text, of the kind that is expected.

    Args:
      text: whatever a file holds.
      kind: `dict`, `list`, `str`, `int` or `float` (any number, NaN too); `[kind]` for a list of
        them; `{name: kind}` for an object with these names and perhaps others.

    Raises:
      ValueError: it is no JSON or of another kind, in words.

    >>> parsed('{"updates": [1, "two"]}', {"updates": [int]})
    Traceback (most recent call last):
    ...
    ValueError: updates[1]: 'two' is no int
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _expect(value, kind, "")
    return value


def text_of(path: str | Path) -> str:
    """The text of a user's file; one that has no end or is waited for is none.

    Raises:
      OSError: there is no such file, or it cannot be read.
      ValueError: it is no UTF-8.
    """
    found = place(path)
    if not found.is_file():
        raise OSError("there is no such file")
    return found.read_text(encoding="utf-8")


def _expect(value: Any, kind: Any, where: str) -> None:
    if isinstance(kind, dict):
        _expect(value, dict, where)
        for name, each in kind.items():
            if name not in value:
                raise ValueError(f"{where}.{name} is missing".lstrip("."))
            _expect(value[name], each, f"{where}.{name}".lstrip("."))
    elif isinstance(kind, list):
        _expect(value, list, where)
        for i, each in enumerate(value):
            _expect(each, kind[0], f"{where}[{i}]")
    else:
        fits = isinstance(value, int | float if kind is float else kind)
        if fits and isinstance(value, int) and kind in (int, float):
            # What no array can hold is no number of a run.
            fits = not isinstance(value, bool) and abs(value) < MOST_WHOLE
        if not fits:
            given = f"{value!r:.40}"
            raise ValueError(f"{where or 'it'}: {given} is no {kind.__name__}")


def statistical(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that decide a result, by name, defaults included.

    >>> statistical(dataclasses.make_dataclass("Settings", [("seed", int)])(seed=3))
    {'seed': 3}
    """
    fields = [field for field in dataclasses.fields(value) if field.metadata != HARDWARE]
    return {field.name: getattr(value, field.name) for field in fields if field.init}
