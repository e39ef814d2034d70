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
        text = f"{self.field}: given {given}; allowed: {self.allowed}"
        return text if self.nearest is None else f"{text}; nearest: {self.nearest!r}"

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
      exit_status: what a shell reports of a program that the signal has ended (128 + number), or
        that of a start that was to end there.
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
