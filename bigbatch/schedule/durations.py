"""Times given in epochs, examples, updates or tokens.

A constructor is written in epochs alone. `in_any_unit` lets its caller give the same time in
another unit, by the suffix of the argument: `boundaries_epochs`, `boundaries_examples`,
`boundaries_updates` or `boundaries_tokens`; `from_epoch` or `from_example`. Updates are those of
the recipe as it was written, with its own constant batch size: the argument `batch_size`, or that
of `policy`. Tokens are those of whole examples, of which each has `tokens_per_example`: T tokens
are T / tokens_per_example examples, and mean nothing where the data does not say how many it has.

>>> @in_any_unit("warmup_epochs")
... def show(batch_size: int, *, warmup_epochs: float) -> None:
...     print(warmup_epochs)
>>> show(batch_size=100, warmup_updates=25, train_examples=1000)
2.5
>>> show(batch_size=100, warmup_tokens=10e6, train_examples=1000, tokens_per_example=4000)
2.5

`size_in_examples` reads a batch size as people write it.

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
import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bigbatch import errors
from bigbatch.checks import Checks, is_number

# Of a plan: far more than anyone trains. So many take half a gigabyte, and as much again while they
# are made.
MOST_UPDATES = 2**24
TIME_UNITS = ("epochs", "examples", "updates", "tokens")
# A number as people write it: 4M is four million, 4Mi is 2^22, as "4M tokens" a batch often are.
QUANTITY = r"(\d*\.?\d+(?:e[-+]?\d\d?)?)(Ki|Mi|[kMGBT]?)"
_MULTIPLES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
_MULTIPLES |= {"Ki": 2**10, "Mi": 2**20}
_SIZE = re.compile(rf"{QUANTITY}(?:_(examples|sequences|tokens))?")
_LONGEST_SIZE = 32
NO_TOKENS = "another unit: how many tokens an example has (tokens_per_example) is not known"

# 1 - 8u, see above.
_EARLIER = Fraction(2**50 - 1, 2**50)


def short(count: float) -> str:
    """A number of tokens as people write it, to four digits.

    >>> short(14_800_000_000_000), short(4_194_304), short(12)
    ('14.8T', '4.194M', '12')
    """
    letters = [(letter, _MULTIPLES[letter]) for letter in "TBMk" if count >= _MULTIPLES[letter]]
    letter, multiple = letters[0] if letters else ("", 1)
    return f"{count / multiple:.4g}{letter}"


def in_epochs(number: float, digits: int = 6) -> str:
    """A time in words, to so many digits.

    >>> in_epochs(1.0), in_epochs(2.25, 2)
    ('1 epoch', '2.2 epochs')
    """
    text = f"{number:.{digits}g}"
    return f"{text} epoch{'s' * (text != '1')}"


def quantity(number: str, multiple: str) -> Fraction:
    """The number that the two parts of `QUANTITY` stand for, exactly."""
    return Fraction(number) * _MULTIPLES[multiple]


def size_in_examples(
    checks: Checks, field: str, text: str, tokens_per_example: int | None
) -> int | None:
    """A batch size as people write it: "768", "768_sequences", "0.5M_tokens" or "4Mi_tokens".

    Returns:
      Its examples; None, and a problem noted, where the text cannot be read, its tokens are no
      whole number of examples, or nobody knows how many an example has.
    """
    match = _SIZE.fullmatch(text) if len(text) < _LONGEST_SIZE else None
    allowed = "a whole number of examples, at least 1, such as 768, 768_sequences or 4Mi_tokens"
    if match is None:
        checks.require(False, field, text, allowed)
        return None
    number, multiple, unit = match.groups()
    per_example = 1
    if unit == "tokens":
        if not checks.require(bool(tokens_per_example), field, text, NO_TOKENS):
            return None
        per_example = tokens_per_example or 1
        allowed = f"tokens of whole examples, {per_example} each (M is 10^6, Mi is 2^20)"
    size = quantity(number, multiple) / per_example
    whole = max(1, round(size))
    nearest = f"{whole * per_example}_tokens" if unit == "tokens" else whole
    return whole if checks.require(size == whole, field, text, allowed, nearest) else None


def earliest(time: float | Fraction, examples: int) -> Fraction:
    """From where on a time is reached, in a unit of which the time's own has so many."""
    return Fraction(time if isinstance(time, Fraction) else float(time)) * examples * _EARLIER


def first_example_from(epoch: float, train_examples: int) -> int:
    """The first position that has reached a time in epochs."""
    return math.ceil(earliest(epoch, train_examples))


def num_reached(times_epochs: ArrayLike, epochs: ArrayLike) -> NDArray[np.int64]:
    """How many of the times each position has reached.

    Args:
      times_epochs: rising.
      epochs: of the positions, p / N, any shape.
    """
    earliest = np.asarray(times_epochs, np.float64) * float(_EARLIER)
    return np.searchsorted(earliest, epochs, side="right")


def in_any_unit(*names: str, updates: bool = True) -> Callable[[Callable[..., Any]], Any]:
    """Lets each of a function's times also be given in examples, updates or tokens.

    The function gains, for each name, keyword parameters in the other units, and `train_examples`
    and `tokens_per_example` (which only they need). Its signature and annotations say so. A problem
    with a time is reported for the argument that was given, in its unit.

    Args:
      *names: keyword-only parameters that hold a time in epochs, e.g. "boundaries_epochs".
      updates: whether updates are a time here.
    """
    units = [unit[:-1] for unit in TIME_UNITS if updates or unit != "updates"]

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)
        spellings = {name: {_in(unit, name): unit for unit in units} for name in names}
        fields = [field for fields in spellings.values() for field in fields]

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            times = {f: kwargs.pop(f) for f in fields if kwargs.get(f) is not None}
            kwargs = {f: value for f, value in kwargs.items() if f not in fields}
            context = [kwargs.get(name) for name in _CONTEXT]
            for name in _CONTEXT:
                if name not in signature.parameters:
                    kwargs.pop(name, None)
            arguments = signature.bind_partial(*args, **kwargs).arguments
            given: dict[str, tuple[str, _Unit]] = {}
            problems: list[errors.Problem] = []
            for name, spelled in spellings.items():
                found = [field for field in spelled if field in times]
                if len(found) == 1:
                    field, time = found[0], times[found[0]]
                    unit = _unit(field, spelled[field], context, time, arguments, problems)
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


# What the other units need: positions are counted in examples.
_CONTEXT = ("train_examples", "tokens_per_example")


@dataclasses.dataclass(frozen=True)
class _Unit:
    """A unit: `size` of what an epoch has `epoch` of."""

    size: float
    epoch: int

    def epochs(self, value: Any) -> Any:
        """A time, or a sequence of them, in epochs; what is no time is left to be refused."""
        # Multiplied first: position / N is then the same float for the same position.
        return self._map(value, lambda time: time * self.size / self.epoch)

    def back(self, value: Any) -> Any:
        """The inverse of `epochs`, rounded to a number as people write it."""
        return self._map(value, lambda epochs: _plain(epochs * self.epoch / self.size))

    def _map(self, value: Any, change: Callable[[float], float]) -> Any:
        if self.size == self.epoch:
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
    context: Sequence[int | None],
    time: Any,
    arguments: dict[str, Any],
    problems: list[errors.Problem],
) -> _Unit:
    """The unit of a field; where that fails, a problem and some unit."""
    if unit == "epoch":
        return _Unit(1, 1)
    train_examples, tokens_per_example = context
    if not train_examples:
        allowed = f"the number of training examples, which {field} needs"
        problems.append(errors.Problem("train_examples", train_examples or "nothing", allowed))
        return _Unit(1, 1)
    if unit == "example":
        return _Unit(1, train_examples)
    if unit == "token":
        if not tokens_per_example:
            problems.append(errors.Problem(field, time, NO_TOKENS))
        return _Unit(1, train_examples * (tokens_per_example or 1))
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
    stem, line, epochs = name.rpartition("_")
    return f"{stem}{line}{epochs.replace('epoch', unit)}"


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
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters += [
        inspect.Parameter(name, keyword, default=None, annotation=int | None)
        for name in _CONTEXT
        if name not in signature.parameters
    ]
    described = signature.replace(parameters=parameters)
    wrapper.__signature__ = described  # type: ignore[attr-defined]
    wrapper.__annotations__ = {
        **{p.name: p.annotation for p in parameters},
        "return": signature.return_annotation,
    }
