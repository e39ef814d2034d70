"""Logs of trainers and trackers: the settings of each update as they were written down."""

import contextlib
import csv
import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from bigbatch.checks import Checks
from bigbatch.errors import among
from bigbatch.schedule.noise_scale import Array


class Preset(NamedTuple):
    """What a trainer means by the numbers of its log.

    Attributes:
      first_update: its number of the first update.
      at_end: whether positions are those after the update.
      next_rate: whether the learning rate is that of the update to come.
      tokens: the columns that are in tokens.
    """

    first_update: int = 0
    at_end: bool = False
    next_rate: bool = False
    tokens: tuple[str, ...] = ()


PRESETS = {
    "table": Preset(),
    "bigbatch": Preset(1, at_end=True),
    "megatron": Preset(1, at_end=True, next_rate=True),
    "olmo_core": Preset(1, at_end=True, tokens=("batch_size", "examples")),
    "levanter": Preset(),
    "wandb": Preset(),
    "tensorboard": Preset(),
}
# Names of each column in the logs of trainers and trackers, hyphens for spaces.
_NAMES = {
    "update": "update step _step iteration Step global_step trainer/global_step train/global_step",
    "batch_size": "batch_size global_batch_size train/batch_size batch-size global-batch-size "
    "train/global-batch-size",
    "learning_rate": "learning_rate lr train/learning_rate train/lr learning-rate "
    "optim/learning_rate optim/LR-(group-0)",
    "momentum": "momentum train/momentum",
    "examples": "examples consumed_samples samples consumed-samples first_example "
    "throughput/total-tokens",
    "epoch": "epoch train/epoch",
}


class Column(NamedTuple):
    """What a log has of one quantity: float64[n], NaN where it says nothing, and how exactly."""

    values: Array
    tolerance: Array


def read_log(
    text: str, preset: str, columns: Mapping[str, str], sequence_length: int = 1
) -> dict[str, Column]:
    """The columns of a log by our names, one value an update, rising from the first; see `Preset`.

    Args:
      text: CSV, JSON lines, or Megatron's own lines.
      preset: one of `PRESETS`.
      columns: the log's names of columns, by ours, where they are not the usual ones.
      sequence_length: tokens of an example.

    Raises:
      UserError: it holds no updates, or nothing of them.
    """
    checks = Checks()
    for field, names, known in (("preset", [preset], PRESETS), ("columns", columns, _NAMES)):
        for name in names:
            checks.require(name in known, field, name, *among(name, known))
    checks.whole("sequence_length", sequence_length, "tokens of an example, at least 1")
    checks.done()
    records = _records(text)
    present = {name: None for record in records for name in record}
    theirs: dict[str, str] = {}
    for name, usual in _NAMES.items():
        given = [columns[name]] if name in columns else usual.split()
        found = [n for n in present if n in given or n.replace(" ", "-") in given]
        theirs |= {name: found[0]} if found else {}
        missing = name in columns and not found
        checks.require(not missing, f"columns.{name}", given[0], f"one of {sorted(present)}")
    enough = "update" in theirs and len(theirs) > 1
    allowed = f"names of the update and of something else, by --columns; there is {sorted(present)}"
    checks.require(enough, "columns", dict(columns) or "nothing", allowed)
    is_megatron = preset == "table" and theirs.get("update") == "iteration" and "|" in text
    checks.require(not is_megatron, "preset", preset, "megatron for its own lines", "megatron")
    checks.done()
    # What was done again after a resume replaces what came before.
    latest: dict[int, dict[str, Any]] = {}
    for record in records:
        if abs(number := _number(record.get(theirs["update"]))) < 2**53:
            told = {name: value for name, value in record.items() if value not in ("", None)}
            latest[int(number)] = latest.get(int(number), {}) | told
    updates = sorted(latest)
    found_columns = {"update": Column(np.array(updates) * 1.0, np.zeros(len(updates)))}
    for name in theirs.keys() - {"update"}:
        texts = [latest[update].get(theirs[name]) for update in updates]
        unit = sequence_length if name in PRESETS[preset].tokens else 1
        values = np.array([_number(each) for each in texts]) / unit
        found_columns[name] = Column(values, _tolerance(texts, values))
    return found_columns


def _records(text: str) -> list[dict[str, Any]]:
    """Every line's values by name, as they are written."""
    lines = [line for line in text.splitlines() if line.strip()]
    found: list[dict[str, Any]] = []
    if any("iteration" in line and "|" in line for line in lines):
        pair = re.compile(r"([a-z][a-z ]*?):? +([-+.\deE]+)(?:/ *\d+)? *\|")
        found = [dict(pair.findall(line)) for line in lines]
        return [record for record in found if "iteration" in record]
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line[line.index("{") :], parse_float=str, parse_int=str)
            metrics = record.get("metrics")
            found.append(record | (metrics if isinstance(metrics, dict) else {}))
    if found:
        return found
    # A tracker writes the run's name before a column's.
    with contextlib.suppress(csv.Error):
        found = list(csv.DictReader(lines))
    return [{str(n).rpartition(" - ")[2]: value for n, value in row.items()} for row in found]


def _number(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def _tolerance(texts: list[Any], values: Array) -> Array:
    """Half of the last digit that a column is written to, float32's at the least."""
    texts = [str(text) for text in texts if text is not None]
    mantissas = [re.sub(r"[eE].*|[-+.]", "", text).lstrip("0") for text in texts]
    digits = min(7, max(3, *map(len, mantissas), 3))
    tolerance = np.abs(np.nan_to_num(values, posinf=0, neginf=0)) * 0.51 * 10.0 ** (1 - digits)
    decimals = [len(text.partition(".")[2]) for text in texts if "e" not in text.lower()]
    if len(decimals) == len(texts) and max(decimals, default=0) >= 4:
        tolerance = np.maximum(tolerance, 0.51 * 10.0 ** -max(decimals))
    return tolerance
