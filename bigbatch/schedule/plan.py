"""The plan: a policy laid out over a training set, one row per update, before anything runs.

Time is counted in examples. Update k starts at example p_k, the sum of the batch sizes before it,
and takes its settings from the policy at epoch p_k / N. The run ends with the first update at whose
end the epochs are complete.

>>> from bigbatch.schedule.policy import step_decay
>>> paper = step_decay(0.1, 128, 0.9, boundaries_epochs=[60, 120, 160], factor=0.2)
>>> plan = make_plan(paper, train_examples=50_000, epochs=200)
>>> plan.num_updates, plan.num_examples
(78125, 10000000)
>>> plan.hyper(78_124)["batch_size"]
128
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bigbatch import errors
from bigbatch.checks import Checks, parsed
from bigbatch.schedule import positions
from bigbatch.schedule.durations import first_example_from, in_any_unit
from bigbatch.schedule.noise_scale import RULES, Array, make_rule
from bigbatch.schedule.policy import Policy
from bigbatch.schedule.run_lengths import column_of, joined, run_starts, runs_of

# Positions up to here can be told from times in any unit: see `durations`.
_MOST_EXAMPLES = 2**48
_LARGEST_HYPER = float(np.finfo(np.float32).max)
# What a plan's file must hold.
_JSON = {
    "train_examples": int,
    "epochs": float,
    "rule": str,
    "columns": dict.fromkeys(("batch_size", "learning_rate", "momentum"), list),
}


class Stage(NamedTuple):
    """A maximal run of updates with one batch size.

    The learning rate, momentum and noise scale are those of its first update.
    """

    first_update: int
    num_updates: int
    first_example: int
    epoch: float
    batch_size: int
    learning_rate: float
    last_learning_rate: float
    momentum: float
    noise_scale: float


class Row(NamedTuple):
    """One update of a plan, on the host."""

    update: int
    first_example: int
    epoch: float
    batch_size: int
    hyper: dict[str, float]
    noise_scale: float


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Every update's batch size and hyperparameters: an immutable value.

    Attributes:
      train_examples: size N of the training set.
      epochs: how long the run was to be; it ends with the update that completes it.
      rule: name of the rule whose noise scale is reported.
      batch_sizes: examples of each update, int64[K].
      hypers: float64[K] by name; always `learning_rate` and `momentum`.
      tokens_per_example: tokens of an example, for whoever counts in them; None: it has none. They
        do not belong to what is compared.
    """

    train_examples: int
    epochs: float
    rule: str
    batch_sizes: NDArray[np.int64]
    hypers: Mapping[str, Array]
    tokens_per_example: int | None = None

    def __post_init__(self) -> None:
        for column in (self.batch_sizes, *self.hypers.values()):
            column.flags.writeable = False

    @property
    def num_updates(self) -> int:
        """K, the number of updates."""
        return len(self.batch_sizes)

    @property
    def num_examples(self) -> int:
        """Examples that the whole run consumes, at least epochs * N."""
        return int(self.first_examples[-1] + self.batch_sizes[-1])

    @functools.cached_property
    def first_examples(self) -> NDArray[np.int64]:
        """Position of each update's first example, int64[K]."""
        positions = np.cumsum(self.batch_sizes)
        positions -= self.batch_sizes
        positions.flags.writeable = False
        return positions

    @functools.cached_property
    def noise_scales(self) -> Array:
        """What the plan's rule keeps, float64[K]; the paper's g for the linear rule."""
        noise_scales = self._kept(slice(None))
        noise_scales.flags.writeable = False
        return noise_scales

    def _kept(self, updates: Any) -> Array:
        """What the plan's rule keeps, at some of its updates."""
        hyper = {name: column[updates] for name, column in self.hypers.items()}
        sizes = self.batch_sizes[updates].astype(np.float64)
        return make_rule(self.rule, self.train_examples).kept(hyper, sizes, self.train_examples)

    @functools.cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The plan as runs of one batch size."""
        first = run_starts(self.batch_sizes)
        count = np.diff(first, append=self.num_updates)
        rates = self.hypers["learning_rate"]
        columns = (
            first,
            count,
            self.first_examples[first],
            self.first_examples[first] / self.train_examples,
            self.batch_sizes[first],
            rates[first],
            rates[first + count - 1],
            self.hypers["momentum"][first],
            self._kept(first),
        )
        return tuple(map(Stage._make, zip(*(column.tolist() for column in columns), strict=True)))

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of N, epochs, batch sizes and hyperparameters, in hexadecimal.

        Hyperparameters count to 30 bits (9 digits): processors differ in the last bits of exp.
        """
        digest = hashlib.sha256(json.dumps([self.train_examples, self.epochs]).encode())
        digest.update(np.ascontiguousarray(self.batch_sizes, "<i8").data)
        for name in sorted(self.hypers):
            digest.update(name.encode())
            # In parts, as copies of a whole column are large.
            parts = np.array_split(self.hypers[name], 1 + self.num_updates // 2**16)
            for part in parts:
                digest.update(np.rint(np.frexp(part)[0] * 2**30).astype("<i4").tobytes())
            for part in parts:
                digest.update(np.frexp(part)[1].astype("<i4").tobytes())
        return digest.hexdigest()

    def row(self, update: int) -> Row:
        """The update of that index, from 0 to num_updates - 1.

        Raises:
          IndexError: there is no such update.
        """
        if not 0 <= update < self.num_updates:
            raise IndexError(f"update {update} of a plan of {self.num_updates} updates")
        first_example = int(self.first_examples[update])
        return Row(
            update,
            first_example,
            first_example / self.train_examples,
            int(self.batch_sizes[update]),
            {name: float(column[update]) for name, column in self.hypers.items()},
            float(self.noise_scales[update]),
        )

    def hyper(self, update: int) -> dict[str, float | int]:
        """The update's hyperparameters and `batch_size`, as host numbers."""
        row = self.row(update)
        return row.hyper | {"batch_size": row.batch_size}

    def schedule(self, name: str) -> Callable[[Any], Any]:
        """An Optax schedule of one column: `batch_size` or a name in `hypers`.

        Returns:
          A function of the update count (integers of any shape) that JAX can trace. It gives
          float32 (int32 for the batch size), the host's value rounded once; past the last update
          the last value.

        Raises:
          UserError: a batch size has more than 31 bits.
        """
        column = self.batch_sizes if name == "batch_size" else self.hypers[name]
        starts = run_starts(column)
        dtype = np.int32 if name == "batch_size" else np.float32
        if name == "batch_size" and column.max() >= 2**31:
            allowed = "below 2^31 examples in an Optax schedule; `hyper` gives any on the host"
            raise errors.UserError(errors.Problem(name, int(column.max()), allowed))
        values, starts = column[starts].astype(dtype), starts.astype(np.int32)

        def value(count: Any) -> Any:
            import jax.numpy as jnp

            updates = jnp.asarray(count, jnp.int32)
            run = jnp.searchsorted(jnp.asarray(starts), updates, side="right") - 1
            return jnp.asarray(values)[run]

        return value

    @functools.cached_property
    def learning_rate(self) -> Callable[[Any], Any]:
        """Optax schedule: update count -> learning rate, float32."""
        return self.schedule("learning_rate")

    @functools.cached_property
    def momentum(self) -> Callable[[Any], Any]:
        """Optax schedule: update count -> momentum, float32."""
        return self.schedule("momentum")

    @functools.cached_property
    def batch_size(self) -> Callable[[Any], Any]:
        """Optax schedule: update count -> batch size in examples, int32."""
        return self.schedule("batch_size")

    def at_example(self, position: ArrayLike) -> Any:
        """The update that holds the example at `position`.

        Args:
          position: from 0 to num_examples - 1; an integer or an array of them.

        Returns:
          int, or int64 of the shape given.

        Raises:
          UserError: a position lies outside the run.
        """
        positions = np.asarray(position)
        last = self.num_examples - 1
        outside = positions[(positions < 0) | (positions > last)]
        if outside.size:
            raise errors.UserError(
                errors.Problem(
                    "position",
                    outside.flat[0].item(),
                    f"an example from 0 to {last}",
                    int(np.clip(outside.flat[0], 0, last)),
                )
            )
        updates = np.searchsorted(self.first_examples, positions, side="right") - 1
        return int(updates) if updates.ndim == 0 else updates

    def at_epoch(self, epoch: float) -> int:
        """The update that holds the first example at or after that point in time.

        Args:
          epoch: from 0 to below the end of the run.

        Raises:
          UserError: the run does not reach that epoch.
        """
        return int(self.at_example(first_example_from(epoch, self.train_examples)))

    def summary(self) -> dict[str, Any]:
        """Totals, stages and fingerprint: the object that `bigbatch plan --json` prints."""
        per_example = self.tokens_per_example
        return {
            "train_examples": self.train_examples,
            "epochs": self.epochs,
            "num_updates": self.num_updates,
            "num_examples": self.num_examples,
            **({"tokens_per_example": per_example} if per_example else {}),
            "stages": [stage._asdict() for stage in self.stages],
            "fingerprint": self.fingerprint,
        }

    def to_json(self) -> str:
        """The summary with every column, run-length encoded as [value, count] pairs."""
        columns = {"batch_size": self.batch_sizes, **self.hypers}
        parts = [f'"{name}": {json.dumps(value)}' for name, value in self.summary().items()]
        parts.append(f'"rule": {json.dumps(self.rule)}')
        runs = [f'  "{name}": {json.dumps(runs_of(column))}' for name, column in columns.items()]
        parts.append('"columns": {\n' + ",\n".join(runs) + "\n}")
        return "{\n" + ",\n".join(parts) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that `to_json` wrote, equal in every bit.

        Raises:
          UserError: the text is no such plan.
        """
        try:
            values = parsed(text, _JSON)
            columns = {name: column_of(name, runs) for name, runs in values["columns"].items()}
            batch_sizes = columns.pop("batch_size").astype(np.int64)
            num_updates, rule = len(batch_sizes), values["rule"]
            per_example = values.get("tokens_per_example")
            for name, fits in (
                ("train_examples", values["train_examples"] > 0),
                ("epochs", 0 < values["epochs"] < math.inf),
                ("tokens_per_example", per_example is None or 0 < int(per_example) < 2**53),
                ("rule", rule in RULES),
                ("batch_size", batch_sizes.min() > 0 and sum(batch_sizes.tolist()) < 2**53),
                *((name, len(column) == num_updates) for name, column in columns.items()),
            ):
                if not fits:
                    raise ValueError(f"{name} is out of its range")
            size, epochs = values["train_examples"], values["epochs"]
            return cls(size, epochs, rule, batch_sizes, columns, per_example)
        except (ValueError, TypeError) as error:
            raise errors.UserError(
                errors.Problem("plan", f"{text[:40]}...", f"a plan's JSON ({error})")
            ) from error

    def emit(self, name: str, **options: int) -> Any:
        """The plan in another trainer's words: see `bigbatch.schedule.trainers.emit`."""
        from bigbatch.schedule.trainers.emit import emit

        return emit(self, name, **options)

    def diff(self, other: "Plan") -> int | None:
        """The first update in which the plans differ, or None.

        Batch sizes are compared exactly, hyperparameters to 1e-9 relative. Where one plan is the
        other's beginning the answer is the shorter one's length. Plans for training sets of
        another size, or with other hyperparameters, differ from update 0 on.
        """
        if self.train_examples != other.train_examples or self.hypers.keys() != other.hypers.keys():
            return 0
        common = min(self.num_updates, other.num_updates)
        differs = self.batch_sizes[:common] != other.batch_sizes[:common]
        for name, column in self.hypers.items():
            ours, theirs = column[:common], other.hypers[name][:common]
            differs |= np.abs(ours - theirs) > 1e-9 * np.maximum(np.abs(ours), np.abs(theirs))
        if differs.any():
            return int(np.argmax(differs))
        return None if self.num_updates == other.num_updates else common


@in_any_unit("epochs", updates=False)
def make_plan(
    policy: Policy,
    *,
    train_examples: int,
    epochs: float,
    batch_multiple_examples: int = 1,
    tokens_per_example: int | None = None,
) -> Plan:
    """Lays a policy out over a training set.

    The batch size is rounded down to a multiple of `batch_multiple_examples` and the
    hyperparameters absorb that by the policy's rule, so that the noise scale holds.

    Args:
      policy: the recipe.
      train_examples: size N of the training set.
      epochs: length of the run, above 0; need not be whole. Or `examples`, or `tokens`.
      batch_multiple_examples: usually the ghost batch.
      tokens_per_example: tokens of an example, where it has any.

    Raises:
      UserError: an argument is out of its range, or the policy gives a batch size that no update
        can have (stated and no multiple, below the multiple, or without bound).
    """
    checks = Checks()
    allowed = "a whole number of examples, at least 1"
    sized = checks.whole("train_examples", train_examples, allowed)
    most = _MOST_EXAMPLES / train_examples if sized else math.inf
    allowed_epochs = "a number of epochs above 0, with at most 2^48 examples"
    checks.number("epochs", epochs, allowed_epochs, above=0, at_most=most)
    if tokens_per_example is not None:
        checks.whole("tokens_per_example", tokens_per_example, "a whole number of tokens, or None")
    if checks.whole("batch_multiple_examples", batch_multiple_examples, allowed):
        positions.check_stated_sizes(checks, policy, int(batch_multiple_examples))
    exact_for = policy.rule.train_examples
    allowed = f"{exact_for}, for which the policy's exact noise scale was made"
    fits = not sized or exact_for in (None, train_examples)
    checks.require(fits, "train_examples", train_examples, allowed, exact_for)
    checks.done()
    sizes = int(train_examples), float(epochs)
    parts = list(positions.rows_of(policy, *sizes, int(batch_multiple_examples)))
    # One column after the other, so that no second copy of the whole plan is alive.
    batch_sizes = joined([part.batch_size for part in parts]).astype(np.int64)
    names = list(parts[0].hyper)
    hypers = {name: joined([part.hyper.pop(name) for part in parts]) for name in names}
    for name, column in hypers.items():
        large = column[~(np.abs(column) <= _LARGEST_HYPER)][:1].tolist()
        checks.require(not large, name, large and large[0], "a number that float32 can hold")
    checks.done()
    return Plan(*sizes, policy.rule.name, batch_sizes, hypers, tokens_per_example)
