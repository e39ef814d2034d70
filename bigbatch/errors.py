"""Mistakes that the user can mend, as values: what was given, what is allowed, what is nearest.

Every layer of the project raises `UserError` for a mistake in its arguments. The layer above
prefixes the field with its own name and may collect the problems of several parts, so that a
config shows all of its mistakes at once. The command prints them and exits with status 2.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Sequence

# Of a value that was given, in a message.
_MOST_CHARACTERS = 1_000
# More names than these are told by so many of them.
_MOST_NAMES, _OF_MORE = 8, 4


@dataclasses.dataclass(frozen=True)
class Problem:
    """One mistake.

    Attributes:
      field: dotted name of the argument or config field, e.g. `policy.batch_size`.
      given: the value that was given.
      allowed: what would be allowed, in words, with its unit.
      nearest: the valid value nearest to what was given; None where there is no such thing.
    """

    field: str
    given: object
    allowed: str
    nearest: object = None

    def __str__(self) -> str:
        given = repr(self.given)
        if len(given) > _MOST_CHARACTERS:
            given = f"{given[:_MOST_CHARACTERS]}..."
        nearest = "" if self.nearest is None else f"; nearest: {self.nearest!r}"
        return f"{self.field}: given {given}{nearest}; allowed: {self.allowed}"

    def under(self, prefix: str) -> "Problem":
        """The same problem seen from one level further out: `prefix.field`."""
        return dataclasses.replace(self, field=f"{prefix}.{self.field}" if self.field else prefix)


class UserError(ValueError):
    """One or more mistakes that the user can mend.

    Attributes:
      problems: the mistakes, at least one.
    """

    def __init__(self, problems: Problem | Iterable[Problem]):
        self.problems: tuple[Problem, ...] = (
            (problems,) if isinstance(problems, Problem) else tuple(problems)
        )
        super().__init__("\n".join(map(str, self.problems)))

    def __reduce__(self) -> tuple[type, tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)


class RunError(RuntimeError):
    """A run that cannot go on, in words for the user: what happened, where, and what to try."""


class StoppedError(Exception):
    """A run that was told to stop and has saved its state; the same command continues.

    Attributes:
      exit_status: what a shell reports of a program that the signal has ended (128 + number).
    """

    def __init__(self, text: str, exit_status: int):
        super().__init__(text)
        self.exit_status = exit_status


def nearest_name(name: str, names: Sequence[str]) -> str | None:
    """The entry of `names` that is spelled most like `name`, or None if none is close.

    >>> nearest_name("increse", ["decay", "increase"])
    'increase'
    """
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.5)), None)


def among(name: object, names: Iterable[str], words: str = "one of ") -> tuple[str, str | None]:
    """What is allowed in place of a name that is none of `names`, and the nearest of them.

    Where one is near, it is the first of a few. Else whoever gave the name needs them all.

    >>> among("increse", ["decay", "increase"])
    ('one of increase, decay', 'increase')
    """
    known = list(names)
    nearest = nearest_name(str(name), known)
    if nearest is None:
        return words + ", ".join(known), None
    return words + listed(difflib.get_close_matches(str(name), known, len(known), 0)), nearest


def listed(names: Iterable[str]) -> str:
    """Names with commas between, the first few of many.

    >>> listed("abcde"), listed("abcdefghij")
    ('a, b, c, d, e', 'a, b, c, d and 6 more')
    """
    known = list(names)
    if len(known) <= _MOST_NAMES:
        return ", ".join(known)
    return f"{', '.join(known[:_OF_MORE])} and {len(known) - _OF_MORE} more"
