"""Values of a config against the constructors that they are for."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.checks import Checks
from bigbatch.config import binding
from bigbatch.config.binding import Mismatch, bind, convert
from bigbatch.engine.optimizer import OPTIMIZERS
from bigbatch.errors import Problem, UserError
from bigbatch.models import MODELS
from bigbatch.schedule.policy import POLICIES
from bigbatch.schedule.transform import TRANSFORMATIONS

HUGE = 10**400

KEPT = [
    (3, int, 3),
    (3, float, 3.0),
    (0.5, float, 0.5),
    ("a", str, "a"),
    (True, bool, True),
    (None, int | None, None),
    (3, int | None, 3),
    (3, float | str, 3.0),
    ("0:1", float | str, "0:1"),
    ("sgd", Literal["sgd", "adam"], "sgd"),
    (50, Literal[18, 50], 50),
    ([1, 2], tuple[int, int], (1, 2)),
    ([1, 2.5], tuple[float, ...], (1.0, 2.5)),
    ((), Sequence[float], ()),
    ([1], list[float] | None, (1.0,)),
    ({"a": 1}, dict[str, Any], {"a": 1}),
    ({"a": 1}, Mapping, {"a": 1}),
    ([{}], Any, [{}]),
]


@pytest.mark.parametrize(("value", "hint", "expected"), KEPT, ids=str)
def test_a_value_of_the_type_is_kept(value, hint, expected):
    converted = convert(value, hint)
    assert converted == expected
    assert type(converted) is type(expected)


REFUSED = [
    (32.0, int, "a whole number", 32),
    (31.6, int, "a whole number", 32),
    ("32", int, "a whole number", 32),
    ("large", int, "a whole number", None),
    ("nan", int, "a whole number", None),
    (math.nan, int, "a whole number", None),
    (math.inf, int, "a whole number", None),
    (True, int, "a whole number", None),
    (None, int, "a whole number", None),
    ([1], int, "a whole number", None),
    (1j, float, "a number", None),
    ("0.1", float, "a number", 0.1),
    ("inf", float, "a number", None),
    (False, float, "a number", None),
    (HUGE, float, "a number", None),
    (HUGE, int, "a whole number", None),
    ("true", bool, "True or False", True),
    ("False", bool, "True or False", False),
    ("yes", bool, "True or False", None),
    (1, bool, "True or False", None),
    (1, str, "a text", None),
    ("3", int | None, "a whole number or None", 3),
    ("sdg", Literal["sgd", "adam"], "one of sgd, adam", "sgd"),
    ("x", Literal["sgd", "adam"], "one of sgd, adam", None),
    (34, Literal[18, 50], "one of 18, 50", 18),
    (50.0, Literal[18, 50], "one of 18, 50", 50),
    ("50", Literal[18, 50], "one of 18, 50", 50),
    (True, Literal[1, 2], "one of 1, 2", 1),
    (5, tuple[float, ...], "a tuple, each entry a number", (5.0,)),
    (2, tuple[int, int, int], "a tuple of 3 entries, each a whole number", (2, 2, 2)),
    ([2], tuple[int, int], "a tuple of 2 entries, each a whole number", None),
    ([1.0, 2], tuple[int, int], "a tuple of 2 entries, each a whole number", (1, 2)),
    ([1, "x"], Sequence[float], "a tuple, each entry a number", None),
    ("12", Sequence[float], "a tuple, each entry a number", None),
    (b"12", Sequence[int], "a tuple, each entry a whole number", None),
    ("ab", tuple[str, ...], "a tuple, each entry a text", ("ab",)),
    (3, dict[str, Any], "a group of fields", None),
]


@pytest.mark.parametrize(
    ("value", "hint", "allowed", "nearest"), REFUSED, ids=lambda v: str(v)[:20]
)
def test_a_value_of_another_type_is_refused(value, hint, allowed, nearest):
    mismatch = convert(value, hint)
    assert mismatch == Mismatch(allowed, nearest)
    assert type(mismatch.nearest) is type(nearest)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(HUGE),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
HINTS = [hint for _, hint, _ in KEPT] + [hint for _, hint, *_ in REFUSED]


@settings(deadline=None)
@given(VALUES, st.sampled_from(HINTS))
def test_what_is_meant_is_of_the_type(value, hint):
    converted = convert(value, hint)
    if isinstance(converted, Mismatch):
        assert converted.allowed == binding.describe(hint)
        if converted.nearest is None:
            return
        converted = converted.nearest
    # A converted value is kept as it is (nan is no problem of its type).
    again = convert(converted, hint)
    assert again == converted or str(again) == str(converted)


@dataclasses.dataclass(frozen=True)
class Part:
    """A constructor that checks its ranges."""

    size: int
    rate: float = 0.5
    name: Literal["a", "b"] = "a"

    def __post_init__(self):
        checks = Checks()
        checks.whole("size", self.size, "at least 1")
        checks.number("rate", self.rate, "from 0 to 1", at_least=0, at_most=1)
        checks.done()


def bound(constructor, fields, **keywords):
    problems = []
    return bind(constructor, fields, problems, **keywords), problems


def test_good_fields_are_bound():
    assert bound(Part, {"size": 3, "rate": 1}) == (Part(3, 1.0), [])
    assert bound(lambda: 7, {}) == (7, [])


def test_all_mistakes_are_found_at_once():
    fields = {"rate": "0.1", "nmae": "a", "name": "c", "epochs": 3}
    result, problems = bound(Part, fields, prefix="part")
    assert result is None
    names = "one of size, rate, name"
    assert problems == [
        Problem("part.rate", "0.1", "a number", 0.1),
        Problem("part.nmae", "a", "one of name, rate, size", "name"),
        Problem("part.name", "c", "one of a, b"),
        Problem("part.epochs", 3, names),
        Problem("part.size", "nothing", "a whole number; the field is required"),
    ]


def test_one_mistake_does_not_hide_another():
    # The type of one field, the range of another.
    assert bound(Part, {"size": 2.0, "rate": 3}) == (
        Part(2, 1.0),
        [
            Problem("size", 2.0, "a whole number", 2),
            Problem("rate", 3.0, "from 0 to 1", 1),
        ],
    )


def test_a_value_with_two_mistakes_is_said_once():
    assert bound(Part, {"size": -2.0}) == (
        Part(1),
        [Problem("size", -2.0, "a whole number, and at least 1", 1)],
    )


@pytest.mark.parametrize("value", [None, "many", [], math.nan, math.inf, HUGE])
def test_a_constructor_is_not_called_with_another_type(value):
    def never(size: int):
        raise AssertionError(size)

    assert bound(never, {"size": value})[0] is None


def test_context():
    def scaled(size: int, factor: float = 1.0, *, train_examples: int, epochs: float | None = None):
        if train_examples < size:
            raise UserError(Problem("size", size, f"at most {train_examples}", train_examples))
        return size, factor, train_examples, epochs

    context = {"train_examples": 10, "epochs": 2.0, "policy": None}
    assert bound(scaled, {"size": 3}, context=context) == ((3, 1.0, 10, 2.0), [])
    # Context is no field: it cannot be given, and is not offered.
    result, problems = bound(scaled, {"size": 3, "epochs": 1}, context=context)
    assert result == (3, 1.0, 10, 2.0)
    assert problems == [Problem("epochs", 1, "one of size, factor")]
    assert bound(scaled, {"size": 30}, context=context) == (
        (10, 1.0, 10, 2.0),
        [Problem("size", 30, "at most 10", 10)],
    )
    # What another mistake has made unknown keeps it from being called, not from being checked.
    unknown = {"train_examples": None, "epochs": 2.0}
    result, problems = bound(scaled, {"size": 30, "factor": "x"}, context=unknown)
    assert result is None
    assert problems == [Problem("factor", "x", "a number")]


def test_a_field_where_there_are_none():
    assert bound(lambda: 7, {"a": 1})[1] == [Problem("a", 1, "no field at all")]


def test_other_errors_are_not_swallowed():
    def broken(size: int):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        bound(broken, {"size": 1})


CONSTRUCTORS = {**POLICIES, **TRANSFORMATIONS, **OPTIMIZERS, **MODELS}


@pytest.mark.parametrize("name", CONSTRUCTORS)
@settings(deadline=None)
@given(st.data())
def test_no_value_of_a_field_ends_in_another_error(name, data):
    constructor = CONSTRUCTORS[name]
    # Found from its own message: every field that a misspelt one is compared with.
    context = {
        "train_examples": 1_000,
        "epochs": 10.0,
        "policy": POLICIES["constant"](learning_rate=0.1, batch_size=10),
    }
    allowed = bound(constructor, {"no such field": 1}, context=context)[1][0].allowed
    fields = allowed.removeprefix("one of ").split(", ") if "one of" in allowed else []
    # Policies of 10^9 updates are no matter of types.
    numbers = st.integers(-3, 40) | st.floats(-3, 40) | st.sampled_from([math.nan, math.inf, HUGE])
    texts = st.sampled_from(["", "0:32", "0:32 5_epochs:64", "linear", "adam", "32", "nan"])
    scalars = st.none() | st.booleans() | numbers | texts
    values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(texts, scalars, max_size=2)
    given_fields = data.draw(st.fixed_dictionaries({}, optional=dict.fromkeys(fields, values)))
    result, problems = bound(constructor, given_fields, context=context)
    assert problems or result is not None
    assert all(problem.allowed for problem in problems)
