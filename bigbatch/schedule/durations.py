"""Times given in epochs, examples or updates.

A constructor is written in epochs alone. `in_any_unit` lets its caller give the same time in
another unit, by the suffix of the argument: `boundaries_epochs`, `boundaries_examples` or
`boundaries_updates`; `from_epoch` or `from_example`. Updates are those of the recipe as it was
written, with its own constant batch size: the argument `batch_size`, or that of `policy`.

>>> @in_any_unit("warmup_epochs")
... def show(batch_size: int, *, warmup_epochs: float) -> None:
...     print(warmup_epochs)
>>> show(batch_size=100, warmup_updates=25, train_examples=1000)
2.5

`Every` is an interval in one of these units.

*A position against a time.* Let u = 2^-53. A time t in epochs stands for a fraction, 0.07 for 7/100
and 3 * 0.1 for 3/10, to a few u. A position p has reached it where p >= t (1 - 8u) N, computed
exactly. That forgives the few u, and no position lies in between while p times the denominator of
t N stays below 2^49. A policy knows no N: there p / N stands for p, rounded to one u, and the same
holds. No position is compared with a time in another way.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bigbatch import errors
from bigbatch.checks import Checks, is_number

# Of a plan: far more than anyone trains. So many take half a gigabyte, and as much again while they
# are made.
MOST_UPDATES = 2**24
TIME_UNITS = ("epochs", "examples", "updates")

# 1 - 8u, see above.
_EARLIER = Fraction(2**50 - 1, 2**50)


@dataclasses.dataclass(frozen=True)
class Every:
    """An interval in epochs, examples or updates.

    Attributes:
      value: how many of the unit.
      unit: "epochs", "examples" or "updates".
    """

    value: float
    unit: str

    def due(self, first_example: int, batch_size: int, update: int, train_examples: int) -> bool:
        """Whether an interval ends within an update.

        Args:
          first_example: position at which the update starts.
          batch_size: its examples.
          update: its number, from 0.
          train_examples: of an epoch.
        """
        start, end = first_example, first_example + batch_size
        if self.unit == "updates":
            start, end = update, update + 1
        length = _earliest(self.value, train_examples if self.unit == "epochs" else 1)
        return end // length > start // length


class Intervals(NamedTuple):
    """When a run logs, evaluates and saves.

    Attributes:
      log_every: interval of the training records.
      evaluate_every: of the evaluations.
      checkpoint_every: of the checkpoints.
      keep_every: of the checkpoints that are kept for good; None for none.
    """

    log_every: Every
    evaluate_every: Every
    checkpoint_every: Every
    keep_every: Every | None = None

    @classmethod
    def of(
        cls, given: Mapping[str, float | None], otherwise: Mapping[str, Every] | None = None
    ) -> "Intervals":
        """The intervals of fields such as `log_every_epochs`, each in one of its units.

        Args:
          given: values by the fields' names; None counts as not given, other names are left alone.
          otherwise: where nothing is given, by the attributes' names.

        Raises:
          UserError: with each interval that is given not at all, twice, or not above 0.
        """
        checks, found = Checks(), dict(otherwise or {})
        for stem in cls._fields:
            names = {f"{stem}_{unit}": unit for unit in TIME_UNITS}
            values = {name: given[name] for name in names if given.get(name) is not None}
            fits = len(values) == 1 or (not values and (stem in found or stem == "keep_every"))
            allowed = "exactly one of " + ", ".join(names)
            checks.require(fits, stem, values or "nothing", allowed)
            for name, value in values.items():
                checks.number(name, value, "a number above 0", above=0)
                found[stem] = Every(value, names[name])  # type: ignore[arg-type]
        checks.done()
        return cls(**found)


def _earliest(time: float, examples: int) -> Fraction:
    """From where on a time is reached, in a unit of which the time's own has so many."""
    return Fraction(float(time)) * examples * _EARLIER


def first_example_from(epoch: float, train_examples: int) -> int:
    """The first position that has reached a time in epochs."""
    return math.ceil(_earliest(epoch, train_examples))


def num_reached(times_epochs: ArrayLike, epochs: ArrayLike) -> NDArray[np.int64]:
    """How many of the times each position has reached.

    Args:
      times_epochs: rising.
      epochs: of the positions, p / N, any shape.
    """
    earliest = np.asarray(times_epochs, np.float64) * float(_EARLIER)
    return np.searchsorted(earliest, epochs, side="right")


def in_any_unit(*names: str, updates: bool = True) -> Callable[[Callable[..., Any]], Any]:
    """Lets each of a function's times also be given in examples or in updates.

    The function gains, for each name, keyword parameters in the other units, and `train_examples`
    (which only they need). Its signature and annotations say so. A problem with a time is reported
    for the argument that was given, in its unit.

    Args:
      *names: keyword-only parameters that hold a time in epochs, e.g. "boundaries_epochs".
      updates: whether updates are a time here.
    """
    units = ("epoch", "example", "update") if updates else ("epoch", "example")

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)
        spellings = {name: {_in(unit, name): unit for unit in units} for name in names}
        fields = [field for fields in spellings.values() for field in fields]

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            times = {f: kwargs.pop(f) for f in fields if kwargs.get(f) is not None}
            kwargs = {f: value for f, value in kwargs.items() if f not in fields}
            train_examples = kwargs.get("train_examples")
            if "train_examples" not in signature.parameters:
                kwargs.pop("train_examples", None)
            arguments = signature.bind_partial(*args, **kwargs).arguments
            given: dict[str, tuple[str, _Unit]] = {}
            problems: list[errors.Problem] = []
            for name, spelled in spellings.items():
                found = [field for field in spelled if field in times]
                if len(found) == 1:
                    field, time = found[0], times[found[0]]
                    unit = _unit(field, spelled[field], train_examples, time, arguments, problems)
                    given[name] = (field, unit)
                    kwargs[name] = unit.epochs(time)
                elif found or signature.parameters[name].default is inspect.Parameter.empty:
                    allowed = "exactly one of " + ", ".join(spelled)
                    problems.append(errors.Problem(name, found or "nothing", allowed))
            if problems:
                raise errors.UserError(problems)
            try:
                return function(*args, **kwargs)
            except errors.UserError as error:
                raise errors.UserError(_as_given(error.problems, given)) from None

        _describe(wrapper, signature, spellings)
        return wrapper

    return decorate


@dataclasses.dataclass(frozen=True)
class _Unit:
    """A unit of so many examples, of which `train_examples` are an epoch."""

    examples: float
    train_examples: int

    def epochs(self, value: Any) -> Any:
        """A time, or a sequence of them, in epochs; what is no time is left to be refused."""
        # Multiplied first: position / N is then the same float for the same position.
        return self._map(value, lambda time: time * self.examples / self.train_examples)

    def back(self, value: Any) -> Any:
        """The inverse of `epochs`, rounded to a number as people write it."""
        return self._map(value, lambda epochs: _plain(epochs * self.train_examples / self.examples))

    def _map(self, value: Any, change: Callable[[float], float]) -> Any:
        if self.examples == self.train_examples:
            return value
        if isinstance(value, list | tuple | np.ndarray):
            return [self._map(v, change) for v in value]
        is_time = isinstance(value, int | float) and not isinstance(value, bool)
        return change(value) if is_time else value


def _plain(value: float) -> float:
    rounded = round(value, 6)
    return int(rounded) if rounded.is_integer() else rounded


def _unit(
    field: str,
    unit: str,
    train_examples: int | None,
    time: Any,
    arguments: dict[str, Any],
    problems: list[errors.Problem],
) -> _Unit:
    """The unit of a field; where that fails, a problem and some unit."""
    if unit == "epoch":
        return _Unit(1, 1)
    if not train_examples:
        allowed = f"the number of training examples, which {field} needs"
        problems.append(errors.Problem("train_examples", train_examples or "nothing", allowed))
        return _Unit(1, 1)
    if unit == "example":
        return _Unit(1, train_examples)
    batch_size: Any = arguments.get("batch_size")
    if "policy" in arguments and is_number(time) and time <= MOST_UPDATES:
        batch_size = float(arguments["policy"].at(0.0).batch_size[0])
        starts = np.arange(max(0, math.ceil(time))) * batch_size / train_examples
        if (arguments["policy"].at(np.r_[0.0, starts]).batch_size != batch_size).any():
            allowed = "a time in epochs or examples, because the batch size changes before its end"
            problems.append(errors.Problem(field, time, allowed))
    usable = isinstance(batch_size, int | float) and batch_size > 0
    # Where the batch size is no number, the function itself will refuse it.
    return _Unit(batch_size if usable else 1, train_examples)


def _in(unit: str, name: str) -> str:
    """The argument's name in another unit: ("update", "warmup_epochs") -> "warmup_updates"."""
    stem, _, epochs = name.rpartition("_")
    return f"{stem}_{epochs.replace('epoch', unit)}"


def _as_given(
    problems: Iterable[errors.Problem], given: dict[str, tuple[str, _Unit]]
) -> Iterable[errors.Problem]:
    """The problems, under the arguments' names and in the units that the caller used."""
    for problem in problems:
        name, bracket, index = problem.field.partition("[")
        if name in given:
            field, unit = given[name]
            problem = dataclasses.replace(
                problem,
                field=field + bracket + index,
                given=unit.back(problem.given),
                nearest=unit.back(problem.nearest),
            )
        yield problem


def _describe(
    wrapper: Callable[..., Any],
    signature: inspect.Signature,
    spellings: dict[str, dict[str, str]],
) -> None:
    """Writes the added parameters into the wrapper's signature and annotations."""
    parameters = []
    for parameter in signature.parameters.values():
        for field in spellings.get(parameter.name, {}):
            hint = parameter.annotation | None
            default = parameter.default if field == parameter.name else None
            if default is inspect.Parameter.empty:
                default = None
            parameters.append(parameter.replace(name=field, annotation=hint, default=default))
        if parameter.name not in spellings:
            parameters.append(parameter)
    if "train_examples" not in signature.parameters:
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters.append(
            inspect.Parameter("train_examples", keyword, default=None, annotation=int | None)
        )
    described = signature.replace(parameters=parameters)
    wrapper.__signature__ = described  # type: ignore[attr-defined]
    wrapper.__annotations__ = {
        **{p.name: p.annotation for p in parameters},
        "return": signature.return_annotation,
    }
