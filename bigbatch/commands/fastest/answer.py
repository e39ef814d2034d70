"""The fastest plan of a config, and what it is compared with, as values."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigbatch.checks import Checks
from bigbatch.commands.critical.limits import Limit
from bigbatch.commands.plan_time import gradient_bytes
from bigbatch.commands.report.runs import read_log, read_run
from bigbatch.config.config import Config
from bigbatch.errors import Problem, UserError
from bigbatch.layout import time_model
from bigbatch.layout.fastest import Choice, Hardware, cheapest, choice, frontier
from bigbatch.schedule.fastest import EDGES, Noise, Way, ladder, noise_along
from bigbatch.schedule.from_file import as_policy
from bigbatch.schedule.noise_scale import SEESAW, Rule
from bigbatch.schedule.plan import Plan
from bigbatch.schedule.transform import doubling_only, grow_batch, with_rule

Array = NDArray[np.float64]
FASTEST, THIS, ONE_SIZE = "fastest", "this recipe", "one batch size"
# Standard errors to either end of a 95 % interval.
_Z = 1.96
# So far above the largest noise scale a larger batch saves at most 6 % of the updates.
_LARGEST_OF_NOISE = 16
_MOST_OF_ITS_OWN = 16
# They scale their steps themselves, so that their learning rate does not follow B in proportion.
_ADAPTIVE = ("adam", "adamw", "lamb")


class Objective(NamedTuple):
    """What is to be least.

    Attributes:
      words: for the user.
      key: of hours and cost, what is compared in turn; numbers or arrays.
      weights: of hours and cost; None with a limit.
      limit: the flag and what it allows.
    """

    words: str
    key: Callable[..., tuple[Any, ...]]
    weights: tuple[float, float] | None = None
    limit: tuple[str, float] | None = None

    def value(self, taken: Any) -> float:
        """What is saved: the last of what is compared."""
        return float(self.key(taken.hours, taken.cost)[-1])

    def best(self, candidates: Iterable[Any]) -> Any:
        """That of which hours and cost are the best."""
        return min(candidates, key=lambda each: self.key(each.hours, each.cost))


class Recipe(NamedTuple):
    """A recipe on the number of devices that suits it best.

    Attributes:
      sizes: its smallest and largest batch.
      devices: how many.
      updates: that make the reference's progress, not whole.
      hours: of them.
      cost: of them.
    """

    sizes: tuple[int, int]
    devices: int
    updates: float
    hours: float
    cost: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was found.

    Attributes:
      config: of the reference.
      way: its way.
      hardware: what there is to choose from.
      goal: what is to be least.
      chosen: the sizes and devices of each part.
      plan: the fastest plan.
      rule: by which its hyperparameters follow.
      ends: the chosen sizes and devices where the noise is at either end of its 95 % interval, the
        better first.
      misled: by a factor on the noise, how many times as much a plan for that noise takes.
      recipes: the fastest and others at equal progress, by name.
      frontier: all choices that are best for some price of an hour.
      notes: sentences on where the noise is from.
    """

    config: Config
    way: Way
    hardware: Hardware
    goal: Objective
    chosen: Choice
    plan: Plan
    rule: Rule
    ends: tuple[Choice, Choice]
    misled: Mapping[float, float]
    recipes: Mapping[str, Recipe]
    frontier: list[Choice]
    notes: list[str]


def pilot(path: str, config: Config) -> tuple[Noise, list[str]]:
    """The noise along a run, and sentences on where it is from.

    Args:
      path: of the run's directory, or of a log like its metrics.jsonl.
      config: which it is to be used for.

    Raises:
      UserError: there is no such run, or it measured no noise.
    """
    total, notes = 0, []
    if Path(path).is_dir():
        run = read_run(path)
        columns, population, warnings = run.training, run.noise_population, run.warnings
        total = (run.plan or {}).get("num_examples") or 0
        differs = [
            name
            for name in ("data", "model", "task", "optimizer")
            if json.dumps(run.config.get(name)) != json.dumps(config.tree.get(name))
        ]
        if run.plan and not np.isclose(run.plan["epochs"], config.plan.epochs):
            differs.append("epochs")
        if differs:
            notes.append(
                f"assumed: the pilot's noise is this config's at the same share of the run, though "
                f"they differ in {', '.join(differs)}"
            )
    else:
        columns, _, population, found = read_log(Path(path), ("loss",))
        warnings = tuple(found)
    examples, sizes = columns["examples"], columns["batch_size"]
    total = total or (examples[-1] if examples.size else 1)
    shares = (examples - sizes / 2) / total
    # A run that grows shows its noise in few large updates; each counts by its examples.
    estimates = columns["gradient_square"], columns["gradient_variance"]
    noise = noise_along(shares, sizes, *estimates)
    known = noise.scales[noise.measured]
    first = (
        f"noise of {path}, of the {population}: B_noise {known[0]:,.0f} examples at the start, "
        f"{known[-1]:,.0f} at the end, standard error {np.median(noise.errors):.0%}, measured in "
        f"{len(known)} of {len(noise.scales)} parts of the run"
    )
    return noise, [first, *notes, *warnings]


def calibrated(noise: Noise, limits: list[Limit], epochs: float) -> Noise:
    """The noise brought to the critical batch sizes that branches have measured.

    The law's own number is the critical batch size, of which the noise scale is a prediction. Its
    course along the run is kept, times the ratio of the two at each checkpoint, interpolated. Where
    no end was found the low end of the interval counts.

    Args:
      noise: along the run.
      limits: by rising epochs.
      epochs: of the run.

    Raises:
      UserError: none of them has a number above 0.
    """
    used = [limit for limit in limits if 0 < limit.low < np.inf]
    if not used:
        allowed = "a critical batch size whose interval begins above 0"
        raise UserError(Problem("critical", [limit.low for limit in limits], allowed))
    middles = (EDGES[1:] + EDGES[:-1]) / 2
    shares = np.array([limit.epoch / epochs for limit in used])
    lows = np.log([limit.low for limit in used])
    sizes = np.log([x.examples if x.examples < np.inf else x.low for x in used])
    ratios = sizes - np.interp(shares, middles, np.log(noise.scales))
    errors = np.interp(middles, shares, (sizes - lows) / _Z)
    scales = noise.scales * np.exp(np.interp(middles, shares, ratios))
    return noise._replace(scales=scales, errors=np.hypot(noise.errors, errors))


def answer(
    config: Config,
    noise: Noise,
    notes: list[str],
    speeds: time_model.Speeds,
    limits: tuple[float, int, float],
    goal: Objective,
) -> Answer:
    """Finds the plan, and what it is to be compared with.

    Args:
      config: a validated config; its plan is the reference.
      noise: along it.
      notes: sentences on where that is from.
      speeds: of the hardware.
      limits: the largest batch, the devices that there are, and the seconds of a restart.
      goal: what is to be least.

    Raises:
      UserError: no layout can be formed, or no plan keeps the goal's limit.
    """
    reference, (most, devices, restart_s) = config.plan, limits
    own = np.unique(reference.batch_sizes)
    # No more than so much is gained past the noise scale.
    most = min(most, max(noise.scales.max() * _LARGEST_OF_NOISE, own[-1]))
    sizes = ladder(config.ghost_batch_examples, most, own[:_MOST_OF_ITS_OWN])
    there = hardware(config, speeds, sizes, devices, restart_s)
    way = Way.of(reference, noise)

    def under(factor: Any) -> Array:
        return dataclasses.replace(way, scales=way.scales * factor).updates(sizes)

    def decided(updates: Array) -> Choice:
        if goal.weights:
            return cheapest(updates, there, *goal.weights)
        return goal.best(frontier(updates, there))

    updates = under(1.0)
    chosen = decided(updates)
    if goal.limit:
        (name, limit), reached = goal.limit, goal.key(chosen.hours, chosen.cost)[0]
        allowed = f"at least {reached:.4g}, the least that any plan here takes"
        fits = reached <= limit * (1 + 1e-9)
        checks = Checks()
        checks.require(fits, name, limit, allowed, float(f"{1.01 * reached:.3g}"))
        checks.done()
    where = chosen.size, chosen.device
    ends = (choice(under(np.exp(z * noise.errors)), there, *where) for z in (-_Z, _Z))
    misled = {}
    for factor in (0.5, 2.0):
        wrong = decided(under(factor))
        really = choice(updates, there, wrong.size, wrong.device)
        misled[factor] = goal.value(really) / goal.value(chosen)
    rule = config.policy.rule
    if rule.learning_rate_power == 1 and config.tree["optimizer"].get("name") in _ADAPTIVE:
        rule = SEESAW
    plan = way.plan_of(sizes[chosen.size], rule)
    used = set(there.devices[chosen.device].tolist())
    ours = (int(plan.batch_sizes[0]), int(plan.batch_sizes[-1])), max(used), plan.num_updates
    return Answer(
        config,
        way,
        there,
        goal,
        chosen,
        plan,
        rule,
        tuple(sorted(ends, key=goal.value)),  # type: ignore[arg-type]
        misled,
        {FASTEST: Recipe(*ours, *chosen[2:]), **others(way, there, goal)},
        frontier(updates, there),
        notes,
    )


def hardware(
    config: Config,
    speeds: time_model.Speeds,
    sizes: NDArray[np.int64],
    devices: int,
    restart_s: float,
    likely: Plan | None = None,
) -> Hardware:
    """The seconds of an update of each size on powers of two of devices, and on all there are.

    Args:
      config: a validated config.
      speeds: of the hardware.
      sizes: the batch sizes, rising.
      devices: that there are.
      restart_s: as of `Hardware`.
      likely: the plan that the layouts are for; None: of each size over an equal share of the run.

    Raises:
      UserError: no layout can be formed on any number.
    """
    plan, unit = config.plan, config.unit_examples
    if config.microbatch_examples_per_device == "auto":
        fits = -(-int(plan.batch_sizes.max()) // unit) * unit
        config = dataclasses.replace(config, microbatch_examples_per_device=fits)
    if likely is None:
        counts = np.ceil(plan.num_examples / len(sizes) / sizes).astype(np.int64)
        likely = dataclasses.replace(plan, batch_sizes=np.repeat(sizes, counts), hypers={})
    sent = gradient_bytes(config)
    columns: dict[int, list[float]] = {}
    refused: UserError | None = None
    for count in sorted({*(2**i for i in range(devices.bit_length())), devices}):
        try:
            layout = config.layout(likely, count)
        except UserError as error:
            refused = error
            continue
        updates = (time_model.update_time(layout, int(b), count, sent, speeds) for b in sizes)
        columns[count] = [update.total_s for update in updates]
    if not columns and refused:
        raise refused
    price = speeds.cost_per_device_hour or 1.0
    seconds = np.array(list(columns.values())).T
    return Hardware(sizes, np.array(list(columns)), seconds, restart_s, price)


def others(way: Way, there: Hardware, goal: Objective) -> dict[str, Recipe]:
    """Known recipes at equal progress: their batch sizes at the same points of the way."""
    reference = way.reference
    most = int(there.sizes[-1])
    source = as_policy(reference)
    paper = grow_batch(with_rule(source, "linear"), most)
    policies = {
        "the paper's growth": paper,
        "Seesaw": grow_batch(with_rule(source, "seesaw"), most, factor=2),
        "doubling": doubling_only(paper),
    }
    epochs = reference.first_examples / reference.train_examples
    rows = {name: policy.at(epochs).batch_size for name, policy in policies.items()}

    def on_best(sizes: Any, updates: Array) -> Recipe:
        """On the devices that suit it best, with so many updates of those sizes."""
        ends = round(float(np.min(sizes))), round(float(np.max(sizes)))
        found = []
        for devices, seconds in zip(there.devices.tolist(), there.seconds.T, strict=True):
            hours = float(updates @ np.interp(sizes, there.sizes, seconds)) / 3600
            cost = hours * devices * there.price
            found.append(Recipe(ends, devices, float(updates.sum()), hours, cost))
        return goal.best(found)

    rows = {THIS: reference.batch_sizes.astype(np.float64), **rows}
    each = way.updates(there.sizes).sum(axis=0)
    constant = [on_best(there.sizes[[i]], each[[i]]) for i in range(len(each))]
    found = {name: on_best(row, way.updates_of_each(row)) for name, row in rows.items()}
    return found | {ONE_SIZE: goal.best(constant)}
