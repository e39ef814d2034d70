"""Reads the directory of one run into a value, and names what it could not read.

A run is killed at any moment and its log may lose lines, so everything but config.json may be
missing, cut or damaged. What is left is read; what is not is said in `LoggedRun.warnings`.
"""

import dataclasses
import io
import itertools
import json
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bigbatch.checks import is_number, parsed, text_of
from bigbatch.errors import Problem, UserError
from bigbatch.places.paths import expect_bucket, place
from bigbatch.schedule.adaptive.gradient_noise import DATA_DISTRIBUTION
from bigbatch.workdir import starts, storage

POSITION_FIELDS = (
    "update",
    "examples",
    "epoch",
    "batch_size",
    "learning_rate",
    "momentum",
    "noise_scale",
)
TRAINING_FIELDS = (
    *POSITION_FIELDS,
    "train_loss",
    "examples_per_s",
    "input_wait_s",
    "gradient_noise_scale",
    "gradient_noise_scale_error",
    "gradient_square",
    "gradient_variance",
)

_STAGE_FIELDS = (
    "first_update",
    "num_updates",
    "first_example",
    "epoch",
    "batch_size",
    "learning_rate",
    "last_learning_rate",
    "momentum",
    "noise_scale",
)
_PLAN = {
    "train_examples": int,
    "epochs": float,
    "num_updates": int,
    "stages": [dict.fromkeys(_STAGE_FIELDS, float)],
}
# Lines parsed by one call of the JSON parser: enough to hide the call, few enough for memory.
_CHUNK_LINES = 4096

Columns = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class LoggedRun:
    """What one run directory says.

    Attributes:
      path: the directory, as it was given.
      experiment: name of the experiment, from config.json.
      seed: the run's seed; None if config.json has none.
      config: config.json, nested.
      plan: the plan's summary (train_examples, epochs, num_updates, stages, fingerprint); None if
        plan.json could not be read.
      training: the training records, one float64[records] a field of `TRAINING_FIELDS`, in the
        order of the examples, and `since_examples`: the position at which a record's range
        begins. A record's train_loss is the mean over examples [since_examples, examples). NaN
        where the log lacks the field; since_examples is NaN where lines before were lost.
      noise_population: of which the measured noise speaks, as the log says last. What was measured
        before the log said it speaks of the data distribution.
      metrics: names of what the run is judged by, the main one first: the metrics of its task, or
        "loss" if it has none.
      evaluations: the evaluation records, one float64[records] a field of `POSITION_FIELDS`, the
        test loss and the metrics, each as `test_NAME`.
      result: result.json; None if the run is not finished.
      starts: when, where and by which command it was started, as starts.json says.
      warnings: what could not be read, one sentence each.
    """

    path: Path
    experiment: str
    seed: int | None
    config: Mapping[str, Any]
    plan: Mapping[str, Any] | None
    training: Columns
    noise_population: str
    metrics: tuple[str, ...]
    evaluations: Columns
    result: Mapping[str, Any] | None
    starts: tuple[Mapping[str, Any], ...]
    warnings: tuple[str, ...]

    @property
    def finished(self) -> bool:
        """Whether the run wrote its result."""
        return self.result is not None

    @property
    def usable(self) -> bool:
        """Whether there is a training record, and its place in an epoch is known."""
        return self.training["update"].size > 0 and self.train_examples > 0

    @property
    def evaluated(self) -> bool:
        """Whether there is an evaluation, in the log or in the result."""
        logged = self.evaluations["update"].size > 0
        return logged or not math.isnan(self.final("test_loss", math.nan))

    @property
    def decides(self) -> bool:
        """Whether the run decided its own plan, which then differs from seed to seed."""
        policy = self.config.get("policy")
        return isinstance(policy, Mapping) and policy.get("name") == "adaptive"

    @property
    def train_examples(self) -> int:
        """Number of training examples, from the plan or else from the records; 0 if unknown."""
        if self.plan is not None:
            return self.plan["train_examples"]
        known = self.training["epoch"] > 0
        if not known.any():
            return 0
        return round(self.training["examples"][known][-1] / self.training["epoch"][known][-1])

    @property
    def tokens_per_example(self) -> int | None:
        """As the plan says; None where examples have no tokens."""
        found = (self.plan or {}).get("tokens_per_example")
        return found if isinstance(found, int) and found > 0 else None

    @property
    def epochs(self) -> float:
        """Epochs done, at most those that the plan asks for."""
        examples, size = self.training["examples"], self.train_examples
        done = float(examples[-1] / size) if examples.size and size else 0.0
        return min(done, float(self.plan["epochs"])) if self.plan is not None else done

    def final(self, field: str, otherwise: float) -> float:
        """A number of the result, or `otherwise` where there is none."""
        value = (self.result or {}).get(field)
        return float(value) if is_number(value) else otherwise


def read_run(run_dir: str | Path) -> LoggedRun:
    """Reads a directory written by `bigbatch train`.

    Args:
      run_dir: the run's working directory. It is only read.

    Returns:
      The run; `LoggedRun.warnings` names each part that is missing or damaged.

    Raises:
      UserError: the directory is no run: it has no readable config.json with an experiment.
    """
    path = expect_bucket(place(run_dir, "run_dir"), "run_dir")
    config = _read_object(path / "config.json")
    if config is None or not isinstance(config.get("experiment"), str):
        allowed = (
            "a directory written by `bigbatch train`, with a config.json that names its experiment"
        )
        raise UserError(Problem("run_dir", str(run_dir), allowed))
    warnings: list[str] = []

    plan = _plan_summary(_read_object(path / "plan.json", _PLAN))
    if plan is None:
        warnings.append("plan.json is missing or damaged: no stage table")
    result = _read_object(path / "result.json")
    if result is None:
        state = "damaged" if (path / "result.json").exists() else "missing"
        warnings.append(f"result.json is {state}: the run counts as not finished")
    metrics = _metrics(path / "run.json", warnings)
    training, evaluations, population, log_warnings = read_log(path / "metrics.jsonl", metrics)
    warnings.extend(log_warnings)
    if training["train_loss"].size == 0:
        warnings.append("there are no training records")
    else:
        bad = np.flatnonzero(~np.isfinite(training["train_loss"]))
        if bad.size:
            update = int(training["update"][bad[0]])
            warnings.append(f"the training loss is not finite from update {update:,} on")

    seed = config.get("seed")
    return LoggedRun(
        path=path,
        experiment=_printable(config["experiment"]),
        seed=seed if type(seed) is int else None,
        config=config,
        plan=plan,
        training=training,
        noise_population=population,
        metrics=metrics,
        evaluations=evaluations,
        result=result,
        starts=tuple(starts.before(path / "starts.json")),
        warnings=tuple(warnings),
    )


def _read_object(path: Path, kind: Any = dict) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is none of that kind."""
    try:
        value: dict[str, Any] = parsed(text_of(path), kind)
    except (OSError, ValueError):
        return None
    return value


def _printable(name: str) -> str:
    """A name on one line."""
    return "".join(c if c.isprintable() else " " for c in name)


def _metrics(path: Path, warnings: list[str]) -> tuple[str, ...]:
    """What a run is judged by, as run.json says; bigbatch 0.1 wrote none and knew accuracy only."""
    described = _read_object(path) if path.exists() else {"metrics": ["accuracy"]}
    names = (described or {}).get("metrics", "")
    if not isinstance(names, list | None):
        warnings.append("run.json is damaged: the run is judged by its test loss")
        names = None
    return tuple(dict.fromkeys(_printable(str(name)) for name in names or ["loss"]))


def _plan_summary(plan: dict[str, Any] | None) -> dict[str, Any] | None:
    """The plan without its columns; None unless all its numbers are finite and it has an end."""
    fields = (*_PLAN, "num_examples", "fingerprint", "tokens_per_example")
    summary = {field: (plan or {}).get(field) for field in fields}
    try:
        json.dumps(summary, allow_nan=False)
    except ValueError:
        return None
    return summary if plan and plan["train_examples"] > 0 < plan["epochs"] else None


def read_log(path: Path, metrics: Sequence[str]) -> tuple[Columns, Columns, str, list[str]]:
    """Training columns, evaluation columns, noise population and warnings of a metrics.jsonl.

    Args:
      path: of the file.
      metrics: whose `test_NAME` the evaluation columns hold.
    """
    population = DATA_DISTRIBUTION
    training = _Table(TRAINING_FIELDS, needed=("update", "examples", "train_loss"))
    tested = dict.fromkeys(f"test_{name}" for name in ("loss", *metrics))
    evaluations = _Table((*POSITION_FIELDS, *tested), needed=("update", "examples", "test_loss"))
    damaged: list[int] = []  # line numbers, from 1
    num_lines = 0
    ends_cut = False
    warnings = []
    try:
        # A damaged byte must cost its line and no more.
        log = io.TextIOWrapper(storage.opened(path), "utf-8", errors="replace", newline="\n")
        with log as file:
            for lines in _chunks(file):
                rows = _parse(lines)
                training.add(rows, "train_loss", num_lines + 1, damaged)
                evaluations.add(rows, "test_loss", num_lines + 1, damaged)
                damaged.extend(num_lines + 1 + i for i, row in enumerate(rows) if row is None)
                for row in rows:
                    population = str((row or {}).get("gradient_noise_population", population))
                num_lines += len(lines)
                ends_cut = not lines[-1].endswith("\n")
    except OSError:
        warnings.append("metrics.jsonl is missing or cannot be read: no curves")
    # A line without its end is one that the run was writing when it was killed (or is writing).
    if ends_cut and damaged and max(damaged) == num_lines:
        warnings.append(f"metrics.jsonl: line {num_lines:,} is half-written and was left out")
        damaged = [number for number in damaged if number != num_lines]
    if damaged:
        count = len(set(damaged))
        noun = "line is" if count == 1 else "lines are"
        warnings.append(
            f"metrics.jsonl: {count:,} {noun} damaged and left out, the first is line "
            f"{min(damaged):,}; a loss average that spans one is left out too"
        )
    columns = training.columns()
    kept = _without_repeats(columns)
    if kept["update"].size < columns["update"].size:
        warnings.append(
            f"metrics.jsonl: {columns['update'].size - kept['update'].size:,} training records "
            "were written again by a later part of the run; the later ones count"
        )
    kept["since_examples"] = _since_examples(kept["examples"], kept.pop("line"), damaged)
    evaluated = _without_repeats(evaluations.columns())
    del evaluated["line"]
    return kept, evaluated, population, warnings


def _chunks(lines: Iterator[str]) -> Iterator[list[str]]:
    while chunk := list(itertools.islice(lines, _CHUNK_LINES)):
        yield chunk


def _parse(lines: Sequence[str]) -> list[dict[str, Any] | None]:
    """One object a line, None for a damaged one; an empty line is an empty object."""
    try:
        # One call of the parser for all lines is about twice as fast as one a line.
        rows = json.loads(f"[{','.join(lines)}]")
        if len(rows) == len(lines) and all(type(row) is dict for row in rows):
            return rows
    except (ValueError, RecursionError):
        pass
    return [_parse_line(line) for line in lines]


def _parse_line(line: str) -> dict[str, Any] | None:
    if not line.strip():
        return {}
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


class _Table:
    """Collects rows of one kind as arrays, chunk by chunk, so that no chunk's objects stay."""

    def __init__(self, fields: Sequence[str], needed: Sequence[str]):
        self._fields = fields
        self._needed = needed
        self._parts: list[np.ndarray] = [np.empty((0, len(fields) + 1))]

    def add(
        self,
        rows: Sequence[dict[str, Any] | None],
        mark: str,
        first_line: int,
        damaged: list[int],
    ) -> None:
        """Takes the rows that have the field `mark`; adds the lines it cannot use to `damaged`."""
        numbers = [i for i, row in enumerate(rows) if row is not None and mark in row]
        own: list[dict[str, Any]] = [rows[i] for i in numbers]  # type: ignore[misc]
        if not own:
            return
        try:
            # Most logs lack a field or two, and lack them everywhere. A row in between that lacks
            # another ends the quick way.
            there = [i for i, f in enumerate(self._fields) if f in own[0] or f in own[-1]]
            get = operator.itemgetter(*(self._fields[i] for i in there))
            values = np.full((len(own), len(self._fields)), np.nan)
            values[:, there] = np.array([get(row) for row in own], dtype=np.float64)
            if not set(self._needed) <= {self._fields[i] for i in there}:
                raise KeyError(mark)
        except (KeyError, TypeError, ValueError, OverflowError):
            values = np.array([self._values(row) for row in own], dtype=np.float64)
        # NaN marks an unusable row; a loss may be NaN, the position may not.
        usable = np.isfinite(values[:, 0]) & np.isfinite(values[:, 1])
        lines = np.asarray(numbers) + first_line
        damaged.extend(int(line) for line in lines[~usable])
        self._parts.append(np.column_stack([values, lines])[usable])

    def _values(self, row: dict[str, Any]) -> list[float]:
        """The row's numbers, NaN for a field that it lacks; all NaN if a needed one is unusable."""
        if all(_is_number_or_null(row.get(field, "")) for field in self._needed):
            values = (row.get(field) for field in self._fields)
            return [float(v) if is_number(v) else math.nan for v in values]
        return [math.nan] * len(self._fields)

    def columns(self) -> dict[str, np.ndarray]:
        values = np.concatenate(self._parts)
        return {name: values[:, i].copy() for i, name in enumerate((*self._fields, "line"))}


def _is_number_or_null(value: object) -> bool:
    """A loss that is not finite may be written as null."""
    return value is None or is_number(value) or value != value


def _without_repeats(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Drops the records that a later one overtakes: a resumed run's last word counts."""
    examples = columns["examples"]
    if examples.size == 0:
        return dict(columns)
    later = np.minimum.accumulate(examples[::-1])[::-1]
    keep = examples < np.append(later[1:], np.inf)
    return {name: values[keep] for name, values in columns.items()}


def _since_examples(examples: np.ndarray, line: np.ndarray, damaged: list[int]) -> np.ndarray:
    """The first example of each record's range; NaN where a line before it was lost."""
    since = np.append(0.0, examples)[:-1]
    if damaged:
        lost_before = np.searchsorted(np.unique(damaged), line)
        since[np.diff(lost_before, prepend=0) > 0] = np.nan
    return since
