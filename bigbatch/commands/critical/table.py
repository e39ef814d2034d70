"""What `bigbatch critical` found, as a value, a table and sentences."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bigbatch.commands.critical.fit import Fit, Intervals
from bigbatch.schedule.adaptive.gradient_noise import DATA_DISTRIBUTION
from bigbatch.workdir import storage
from bigbatch.workdir.files import write_json

_HEADER = (
    "batch size",
    "learning rate",
    "updates",
    "of the fit",
    "of the noise scale",
    "examples",
    "noise scale on the way",
)


_FEW_UPDATES = 10
# Of a 95 % interval.
_DEVIATIONS = 1.96


class Noise(NamedTuple):
    """What is measured at a checkpoint, its parameters held.

    Attributes:
      loss: mean training loss, nats.
      scale: the gradient noise scale B_noise in examples; None where it has no estimate.
      error: its standard error; None with it.
      status: "ready", or why there is none.
      population: of which the noise scale speaks; see `gradient_noise`.
      metrics: the loss and the task's metrics in training, by name.
      geometries: noise scale and standard error by geometry; see `geometries`.
    """

    loss: float
    scale: float | None
    error: float | None
    status: str
    population: str = DATA_DISTRIBUTION
    metrics: Mapping[str, float] = {}
    geometries: Mapping[str, tuple[float, float]] = {}


class SizeResult(NamedTuple):
    """The branches of one batch size.

    Attributes:
      batch_size: B in examples.
      learning_rate: of the branches.
      updates: S of each branch; None where it did not reach the loss.
      noise_scale: mean over the way to the loss, in examples; None where it has no estimate.
    """

    batch_size: int
    learning_rate: float
    updates: tuple[float | None, ...]
    noise_scale: float | None

    @property
    def reached(self) -> list[float]:
        """S of the branches; empty unless all reached the loss."""
        return [] if None in self.updates else [s for s in self.updates if s is not None]


@dataclasses.dataclass(frozen=True)
class Point:
    """What branching from one checkpoint gave.

    Attributes:
      update: updates done at the checkpoint.
      epoch: likewise.
      batch_size: of the run at the checkpoint.
      learning_rate: likewise.
      noise: at the checkpoint.
      target_loss: which the branches were to reach.
      sizes: by batch size, rising; empty where the checkpoint has no noise scale.
      fit: None where fewer than three batch sizes reached the loss.
      intervals: with it.
      lr_factors: of the rule's learning rate that were tried.
      metric: that was to be `target_loss`: the loss, or one of the task's.
    """

    update: int
    epoch: float
    batch_size: int
    learning_rate: float
    noise: Noise
    target_loss: float
    sizes: tuple[SizeResult, ...]
    fit: Fit | None
    intervals: Intervals | None
    lr_factors: tuple[float, ...] = (1.0,)
    metric: str = "loss"

    @property
    def noise_on_the_way(self) -> tuple[float, float] | None:
        """Mean and standard deviation over the batch sizes; None for fewer than two."""
        known = [size.noise_scale for size in self.sizes if size.noise_scale is not None]
        return (float(np.mean(known)), float(np.std(known, ddof=1))) if len(known) > 1 else None


def write(points: Sequence[Point], directory: Path) -> str:
    """Writes critical.json and critical.md.

    Returns:
      The last point's section.
    """
    write_json(directory / "critical.json", [_plain(point) for point in points])
    sections = [section(point) for point in points]
    storage.put(directory / "critical.md", "\n\n".join([*sections, along(points)]).strip() + "\n")
    return sections[-1]


def along(points: Sequence[Point]) -> str:
    """Which noise scale predicts the critical batch size along a run, a table; empty without one.

    A cell has the noise scale, its standard error and measured / predicted with a 95 % interval of
    both. The last line has the geometric mean of these ratios, and the factor within which they are
    about it: one standard deviation of their logarithms.
    """
    fitted = [
        (point, point.fit.critical_batch_size, point.intervals.critical_batch_size)
        for point in points
        if point.fit and point.intervals and 0 < point.fit.critical_batch_size < math.inf
    ]
    names = list(dict.fromkeys(name for point, *_ in fitted for name in point.noise.geometries))
    if not names:
        return ""
    rows, logs = [], {name: list[float]() for name in names}
    for point, size, (low, high) in fitted:
        cells = [f"{point.epoch:.4g}", f"{size:,.0f} ({_span(low, high)})"]
        for name in names:
            if name not in point.noise.geometries:
                cells.append("")
                continue
            scale, error = point.noise.geometries[name]
            logs[name].append(math.log(size / scale))
            spread = _DEVIATIONS * error / scale
            below = math.hypot(math.log(size / low), spread) if low > 0 else math.inf
            above = math.hypot(math.log(high / size), spread)
            ends = [size / scale * math.exp(end) for end in (-below, above)]
            ratio = f"{size / scale:.2f} ({_span(ends[0], ends[1], '.2f')})"
            cells.append(f"{scale:,.0f} ± {error:,.0f}: {ratio}")
        rows.append(cells)
    means = (
        f"{np.exp(np.mean(log)):.2f}, within {np.exp(np.std(log)):.2f}" for log in logs.values()
    )
    header, last = ["epoch", "critical batch size", *names], ["all", "", *means]
    return "\n".join(["## Which noise scale predicts", "", *_table(header, [*rows, last])])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, as Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in [header, ["---:"] * len(header), *rows]]


def _plain(value: Any) -> Any:
    """Nested dictionaries and lists; JSON has no infinity, so None stands for it."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def section(point: Point) -> str:
    """A table and sentences, as Markdown."""
    noise = point.noise
    scale = f"no noise scale ({noise.status})"
    if noise.scale is not None and noise.error is not None:
        scale = (
            f"noise scale of the {noise.population} {noise.scale:,.0f} ± {noise.error:,.0f} "
            "examples"
        )
    head = [
        f"## Update {point.update:,}, epoch {point.epoch:.4g}",
        "",
        f"Batch size {point.batch_size:,}, learning rate {point.learning_rate:.4g}, training "
        f"{point.metric} {noise.metrics.get(point.metric, noise.loss):.4g}, {scale}.",
    ]
    if not point.sizes:
        return "\n".join([*head, "Without it there is no rule for the learning rate: no branches."])
    head[-1] += f" Branches to a training {point.metric} of {point.target_loss:.4g}:"
    rows = [_row(point, size) for size in point.sizes]
    return "\n".join([*head, "", *_table(_HEADER, rows), "", *_findings(point)])


def _row(point: Point, size: SizeResult) -> list[str]:
    cells = [f"{size.batch_size:,}", f"{size.learning_rate:.3g}"]
    reached, fit = size.reached, point.fit
    if not reached:
        missed = sum(updates is None for updates in size.updates)
        cells += [f"not reached by {missed} of {len(size.updates)}; left out", "", "", ""]
    else:
        mean, sd = np.mean(reached), np.std(reached, ddof=1)
        cells.append(f"{mean:,.1f} ± {sd:,.1f}")
        cells += ["", ""] if fit is None else [f"{fit.updates(size.batch_size):,.1f}"]
        if fit is not None:
            cells.append(_predicted(point, size.batch_size))
        cells.append(f"{mean * size.batch_size:,.0f}")
    cells.append("" if size.noise_scale is None else f"{size.noise_scale:,.0f}")
    return cells


def _predicted(point: Point, batch_size: int) -> str:
    """Updates by the noise scale at the checkpoint, with the one free number that it leaves."""
    noise = point.noise.scale
    reached = [(size.batch_size, np.mean(size.reached)) for size in point.sizes if size.reached]
    if noise is None:
        return ""
    # The best S_min in the sense of the fit: mean relative residual zero.
    ratios = [(1 + noise / size) / mean for size, mean in reached]
    fewest = sum(ratios) / sum(ratio**2 for ratio in ratios)
    return f"{fewest * (1 + noise / batch_size):,.1f}"


def _findings(point: Point) -> list[str]:
    fit, found = point.fit, point.intervals
    if fit is None or found is None:
        options = "--most-epochs, --loss-share, --target"
        return [f"No fit: fewer than three batch sizes reached the {point.metric} ({options})."]
    low, high = found.critical_batch_size
    reached = [size for size in point.sizes if size.reached]
    misses = [np.mean(s.reached) / fit.updates(s.batch_size) - 1 for s in reached]
    lines = [
        f"- (S/S_min - 1)(E/E_min - 1) = 1 with S_min = {fit.fewest_updates:,.1f} updates "
        f"({_span(*found.fewest_updates)}) and E_min = {fit.fewest_examples:,.0f} examples "
        f"({_span(*found.fewest_examples)}).",
        f"- **Critical batch size E_min / S_min: {_examples(fit.critical_batch_size)} "
        f"({_span(low, high)})**; in brackets 95 % intervals from the spread between branches.",
        f"- The branches' means lie {100 * min(misses):+.0f} % to {100 * max(misses):+.0f} % from "
        "the curve.",
    ]
    noise, way = point.noise.scale, point.noise_on_the_way
    if noise is not None:
        lines.append(
            f"- Predicted by the noise scale at the checkpoint: {noise:,.0f}; "
            + _compared(fit, (low, high), noise)
        )
    if way is not None:
        lines.append(
            f"- Predicted by the noise scale on the way to the loss: {way[0]:,.0f} ± {way[1]:,.0f} "
            "(standard deviation between batch sizes); " + _compared(fit, (low, high), way[0])
        )
    if len(point.lr_factors) == 1:
        lines.append(
            "- One learning rate was tried at each batch size, by a rule that the noise scale is "
            "put into; where another is better the critical batch size is another too "
            "(--lr-factors=0.25,0.5,1,2 takes the best)."
        )
    if min(float(np.mean(size.reached)) for size in reached) < _FEW_UPDATES:
        lines.append(
            f"- The largest batches need fewer than {_FEW_UPDATES} updates, too few to tell: a "
            "larger --loss-share tells more."
        )
    return lines


def _compared(fit: Fit, interval: tuple[float, float], predicted: float) -> str:
    low, high = interval
    if not math.isfinite(fit.critical_batch_size):
        return "larger batches still took as many times fewer updates, so no size is critical yet."
    ratio = f"measured / predicted = {fit.critical_batch_size / predicted:.2f} "
    ratio += f"({_span(low / predicted, high / predicted, '.2f')}): "
    if low <= predicted <= high:
        return ratio + "they agree within the interval."
    return ratio + "they disagree."


def _span(low: float, high: float, form: str = ",.0f") -> str:
    return " to ".join("no limit" if math.isinf(end) else f"{end:{form}}" for end in (low, high))


def _examples(size: float) -> str:
    return "no limit seen" if math.isinf(size) else f"{size:,.0f} examples"
