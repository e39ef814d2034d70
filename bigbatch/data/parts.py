"""Examples to train or to evaluate on, read by their numbers from whatever holds them.

What is of no use to JAX, or unlike the first example, is refused with its name. Nothing here needs
JAX but its rules of types, so that a process that reads examples starts quickly.
"""

import dataclasses
import mmap
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bigbatch.checks import Checks
from bigbatch.data.fingerprint import is_read_whole
from bigbatch.errors import Problem, UserError, among

Example = dict[str, np.ndarray]
Shapes = Mapping[str, tuple[tuple[int, ...], np.dtype]]

# What training puts beside the examples.
_RESERVED = ("key", "ghost_mask")
# More cannot be numbered by a permutation of 32-bit words.
_MOST_EXAMPLES = 2**32 - 1
# Of a file that is mapped into memory so much is resident at a time. The system may map a page of
# 2 MiB around a byte that is read. To map one anew costs about 5 us a row.
_RESIDENT_BYTES, _MAPPED_AROUND_BYTES = 2**25, 2**21


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """The examples to train or to evaluate on, read by their numbers.

    Attributes:
      name: "train" or "test".
      source: has `read`, or gives single examples; None in a process that is sent rows.
      names: see `Data`.
      augment: likewise.
      shapes: what every example must have; empty: not known yet.
    """

    name: str
    source: Any
    names: Sequence[str] | None
    augment: Callable[[Example, np.ndarray], Mapping[str, Any]] | None
    shapes: Shapes = dataclasses.field(default_factory=dict)

    def rows(self, numbers: np.ndarray) -> Example | None:
        """Examples as they are, stacked; None where they are read one by one."""
        if not hasattr(self.source, "read"):
            return None
        made = self._named(self.source.read(numbers), self.names, "the result of read()")
        checks = Checks()
        for name, array in made.items():
            allowed = f"[{len(numbers)}, ...], a row for each number given to read()"
            fits = array.shape[:1] == (len(numbers),)
            checks.require(fits, f"{self.name}.{name}", array.shape, allowed)
        checks.done()
        return made

    def examples(
        self, numbers: np.ndarray, keys: np.ndarray | None, rows: Example | None = None
    ) -> Example:
        """Examples as they are shown, made one after the other, stacked.

        Args:
          numbers: of the examples.
          keys: uint32[n, 2], for `augment`.
          rows: the examples as they are, where they have been read.
        """
        rows = self.rows(numbers) if rows is None else rows
        made = []
        for i, number in enumerate(numbers.tolist()):
            what = f"example {number}"
            if rows is not None:
                example = {name: array[i] for name, array in rows.items()}
            else:
                example = self._named(self.source[number], self.names, what)
            if self.augment is not None and keys is not None:
                # One that changes arrays in place must not change the source's own.
                own = {name: np.array(array) for name, array in example.items()}
                example = self._named(self.augment(own, keys[i]), None, f"{what} augmented")
            made.append({name: np.asarray(array)[None] for name, array in example.items()})
            if self.shapes:
                self.checked(made[-1], numbers[i:])
        if not made:
            return {n: np.zeros((0, *shape), dtype) for n, (shape, dtype) in self.shapes.items()}
        return {name: np.concatenate([example[name] for example in made]) for name in made[0]}

    def checked(self, stacked: Example, numbers: np.ndarray) -> Example:
        """Examples that begin with the given numbers, which must be like the first one of all."""
        found = {name: (array.shape[1:], array.dtype) for name, array in stacked.items()}
        if found != self.shapes:
            checks = Checks()
            check_entries(self.name, found, self.shapes, checks, f" in example {numbers[0]}")
            checks.done()
        return stacked

    def _named(self, given: Any, names: Sequence[str] | None, what: str) -> Example:
        """Arrays by name, of whatever an example was given as."""
        if isinstance(given, Mapping):
            for name in names or ():
                if name not in given:
                    found = among(name, given, f"entries of {self.name}: ")
                    raise UserError(Problem("names", name, *found))
            return {name: np.asarray(given[name]) for name in names or given}
        if names is None:
            allowed = "arrays by name, or a tuple of arrays, whose names the argument `names` gives"
            raise UserError(Problem(self.name, f"{type(given).__name__} as {what}", allowed))
        values = given if isinstance(given, tuple | list) else (given,)
        if len(values) != len(names):
            allowed = f"{len(values)} names, one for each entry of {what} in {self.name}"
            raise UserError(Problem("names", names, allowed))
        return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}


class ArraysByName:
    """Arrays by name as something with `len()` and `read`."""

    def __init__(self, arrays: Mapping[str, Any]):
        self.arrays = {n: a if hasattr(a, "shape") else np.asarray(a) for n, a in arrays.items()}

    @property
    def are_read_whole(self) -> bool:
        """Whether a fingerprint is of all of them."""
        return all(map(is_read_whole, self.arrays.values()))

    def __len__(self) -> int:
        return min((array.shape[0] for array in self.arrays.values()), default=0)

    def read(self, numbers: np.ndarray) -> Example:
        """The rows of all arrays."""
        return {name: rows_of(array, numbers) for name, array in self.arrays.items()}


def rows_of(array: Any, numbers: np.ndarray) -> np.ndarray:
    """Rows of an array; of a file that is mapped into memory, few pages stay resident.

    Args:
      array: [n, ...].
      numbers: of the rows; of more than one axis where neighbours along the others lie together.
    """
    mapped: Any = array
    while not (mapped is None or isinstance(mapped, np.memmap)):
        mapped = getattr(mapped, "base", None)
    pages: Any = getattr(mapped, "_mmap", None)
    # The pages of a private copy hold what was changed in it; a small file may stay.
    if mapped is None or mapped.mode == "c" or len(pages) <= _RESIDENT_BYTES:
        return np.asarray(array[numbers])
    row_bytes = array.itemsize * int(np.prod(array.shape[1:]))
    step = max(1, _RESIDENT_BYTES // (row_bytes + _MAPPED_AROUND_BYTES))
    pieces = [np.asarray(array[numbers[:0]])]
    for first in range(0, len(numbers), step):
        pieces.append(np.asarray(array[numbers[first : first + step]]))
        pages.madvise(mmap.MADV_DONTNEED)
    return np.concatenate(pieces)


def part_of(
    name: str,
    source: Any,
    names: Sequence[str] | None,
    augment: Callable[..., Any] | None,
    checks: Checks,
) -> Part:
    """A part of the data; what is wrong with it as a whole is noted."""
    if isinstance(source, np.ndarray) and names is not None and len(names) == 1:
        source = {names[0]: source}
    before = len(checks.problems)
    if isinstance(source, Mapping):
        source = ArraysByName({n: a for n, a in source.items() if names is None or n in names})
        lengths = {f"{name}.{n}": tuple(a.shape[:1]) for n, a in source.arrays.items()}
        first = next(filter(None, lengths.values()), None)
        for entry, length in lengths.items():
            allowed = f"an array of as many examples as the first one: {first}"
            checks.require(length == first, entry, length, allowed)
    read = any(hasattr(source, method) for method in ("read", "__getitem__"))
    allowed = "arrays by name, or anything with len() and [number] or read(numbers)"
    checks.require(read and hasattr(source, "__len__"), name, type(source).__name__, allowed)
    if len(checks.problems) == before:
        allowed = "from 1 to 2^32 - 1 examples; epochs are counted here, nothing need be repeated"
        fits = 1 <= len(source) <= _MOST_EXAMPLES
        checks.require(fits, name, f"{len(source):,} examples", allowed)
    return Part(name, source, names, augment)


def check_entries(
    part: str, found: Shapes, expected: Shapes, checks: Checks, where: str = ""
) -> None:
    """Notes entries that are not those of the first training example, or of no use to JAX."""
    allowed = "the entries " + ", ".join(expected)
    checks.require(found.keys() == expected.keys(), part, ", ".join(found) + where, allowed)
    for name, (shape, dtype) in found.items():
        field, given = f"{part}.{name}", f"{dtype}{list(shape)}{where}"
        if not checks.require(name not in _RESERVED, field, name, "another name: training has it"):
            continue
        allowed = "numbers; with `names`, entries are left out"
        if checks.require(_is_numeric(dtype), field, given, allowed) and name in expected:
            wanted, kind = expected[name]
            fits = shape == wanted and jax_dtype(name, dtype) == jax_dtype(name, kind)
            allowed = f"{kind}{list(wanted)}, as the first example to train on has"
            checks.require(fits, field, given, allowed)


def _is_numeric(dtype: np.dtype) -> bool:
    import jax

    return dtype == np.dtype(bool) or bool(jax.dtypes.issubdtype(dtype, np.number))


def jax_dtype(name: str, dtype: np.dtype) -> np.dtype:
    """The type that an entry has in JAX's present mode; weights are float32, as masks are."""
    import jax

    if name == "weight":
        return np.dtype(np.float32)
    return np.dtype(jax.dtypes.canonicalize_dtype(dtype.newbyteorder("=")))


def as_jax_has_them(part: str, arrays: Example) -> Example:
    """The arrays of a part of the data in the types of `jax_dtype`.

    Raises:
      UserError: a whole number does not fit.
    """
    checks = Checks()
    made = {n: array.astype(jax_dtype(n, array.dtype), copy=False) for n, array in arrays.items()}
    for name, array in made.items():
        given = arrays[name]
        if array.dtype.kind in "iu" and array.itemsize < given.itemsize:
            lost = given[array != given]
            allowed = f"numbers that {array.dtype} holds, unless jax_enable_x64 is set"
            checks.require(not lost.size, f"{part}.{name}", lost[:1].tolist(), allowed)
    checks.done()
    return made


def is_grain(source: Any) -> bool:
    """Whether it is a Grain MapDataset, without importing Grain."""
    return isinstance(source, getattr(sys.modules.get("grain"), "MapDataset", ()))


# So long a process that reads examples lives on after SIGTERM.
_LATER_S = 30

# In a process that reads examples: the parts of its data.
_parts_here: dict[str, Part] = {}


def begin_process(parts: dict[str, Part]) -> None:
    """Once in each process that reads examples: takes the parts of its data."""
    _parts_here.update(parts)
    # The one that started it ends it, also where it is killed. What tells a whole job to stop comes
    # here too, and examples are needed until the state is saved; a pool that breaks ends its own by
    # SIGTERM.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_LATER_S))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def in_process(part: str, work: tuple[Any, ...]) -> Example:
    """The examples of a part of the data that `begin_process` was given."""
    return _parts_here[part].examples(*work)
