"""Checks of arguments that collect every problem of one call before it fails.

>>> checks = Checks()
>>> checks.number("momentum", 1.0, "a number from 0 to below 1", at_least=0, below=1)
False
>>> checks.whole("batch_size", 0, "a whole number of examples, at least 1")
False
>>> checks.done()
Traceback (most recent call last):
...
bigbatch.errors.UserError: momentum: given 1.0; allowed: a number from 0 to below 1; nearest: 0.999
batch_size: given 0; allowed: a whole number of examples, at least 1; nearest: 1
"""

import dataclasses
import math
import numbers
from typing import Any

from bigbatch import errors

# Metadata of a dataclass's field that may differ at every start of a run: it has no influence on
# the result. All other fields are statistical.
HARDWARE = {"kind": "hardware"}

# A momentum that someone could mean; the float next to 1 is not.
_JUST_BELOW_1 = 0.999


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
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
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
        if (
            isinstance(value, bool)
            or not isinstance(value, numbers.Real)
            or not math.isfinite(float(value))
        ):
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


def statistical(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that decide a result, by name, defaults included.

    >>> statistical(dataclasses.make_dataclass("Settings", [("seed", int)])(seed=3))
    {'seed': 3}
    """
    fields = [field for field in dataclasses.fields(value) if field.metadata != HARDWARE]
    return {field.name: getattr(value, field.name) for field in fields if field.init}
