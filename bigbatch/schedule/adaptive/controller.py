r"""The controller of an adaptive run: it grows the batch as the measured gradient noise asks for.

A hand-made recipe lowers the noise g = lr N / (B (1 - m)) at times that somebody chose. Here the
gradients choose. At a fixed g, training first descends and then hovers: the squared gradient falls
until the noise of the updates holds it up, and the noise scale B_noise = tr(S) / |G|^2 (McCandlish
et al. 2018) ends in a fixed proportion to the batch size, 2 (1 - m) / (lr h) times B on a quadratic
of curvature h. Updates much smaller than B_noise spend their way on averaging noise. There less of
it pays, and one larger update teaches nearly as much as its examples would in small ones.

*The ladder.* Level i stands for the noise that the base learning rate would make with a batch of
V_i = B_0 growth_factor^i examples. Its batch size is B_i = min(V_i, max_batch_size), rounded down
to whole ghost batches, its learning rate lr_i = lr_0 B_i / V_i: constant while B can grow; past the
cap it decays instead, by the same factor for the same noise (Smith et al. 2018). So g falls by
growth_factor from level to level, whichever of the two takes it. So it is under the linear rule.
Another rule says what batch size stands for which decay (`schedule.noise_scale.Rule`): the levels'
batch sizes are the same, the decay that a level stands for and its hyperparameters are the rule's.
The square-root rule keeps the learning rate while B grows and moves b1, b2 and eps; Seesaw lets it
fall by the root of what B grows by.

*The rule.* V follows sqrt(B_0 multiple B_noise), the mean of the base batch and of the noise scale
in powers: with B_noise less two standard errors, level i + 1 begins when the root has passed the
middle between V_i and V_{i+1},

    multiple (B_noise - 2 standard errors) >= V_i V_{i+1} / B_0.

With updates of B examples a unit of progress takes 1 + B_noise / B updates and B + B_noise examples
(McCandlish et al. 2018, section 2.3). Where an update is worth r examples, their sum is least at
B = sqrt(r B_noise), whatever B_noise has become (their appendix D). The base recipe tells r: it is
right where its own batch is the noise scale, so r = B_0, times `multiple`. The root is also what
makes the rule stable. Where training hovers, B_noise is k V: to follow a multiple of it directly
is to grow without end if k is large enough, as fast as it can be measured, and else never, while
the root has one level at which it stays, V = multiple k B_0, until flatter directions of the loss
raise k. And it halves the error of what was measured, in powers.

Levels never fall, they rise one at a time, and what was measured on a lower one is no evidence for
the next rise: the averages start anew at each. The standard error is the hysteresis. An estimate
that is not positive or not yet warm raises nothing. Of which population the noise scale is,
training set or data distribution, is the measurement's (`gradient_noise`).

*The cooldown.* A run that ends while it tracks the noise ends with the noise of its last level.
What is left at the end is best removed whatever was measured, as the decay at the end of a
warm-up-stable-decay schedule does (Hu et al. 2024). So in the last `cooldown_epochs` the levels
rise by the clock instead of the measurements: g is held at the lowest level on or above a straight
line from where the cooldown found it to zero at the end. Batches grow first here too.

*The delay.* What update k measured is known when update k + 1 runs already, so it decides for
update k + 2.

The state is a value of plain numbers, and every decision a pure function of it: a run that was
killed continues with the same decisions, and whatever computes equal measurements decides equally.

>>> controller = Controller(0.1, 32, 0.9, max_batch_size=100, batch_multiple_examples=16,
...                         small_batch_examples=16, train_examples=1_000, epochs=2)
>>> [(size, round(rate, 6)) for size, rate in map(controller.level, range(4))]
[(32, 0.1), (64, 0.1), (96, 0.075), (96, 0.0375)]
>>> controller.plan(Decisions(growths=(10,))).batch_sizes[8:12].tolist()
[32, 32, 64, 64]
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bigbatch.checks import HARDWARE, Checks
from bigbatch.errors import among
from bigbatch.schedule.adaptive.gradient_noise import (
    Estimate,
    Measurement,
    Smoothed,
    estimate,
    measurement_from,
    smooth,
)
from bigbatch.schedule.durations import first_example_from, in_epochs
from bigbatch.schedule.noise_scale import RULES, Array
from bigbatch.schedule.plan import Plan
from bigbatch.schedule.policy import Policy, Settings, constant
from bigbatch.schedule.policy.base import check_base
from bigbatch.schedule.positions import rounded
from bigbatch.schedule.transform import adam, with_rule

# A decision after update k is for update k + 2: its measurement comes while k + 1 runs.
DELAY_UPDATES = 2
# What is this close (relative) below a whole number of levels is that number.
_SNAP = 9e-13
# One-sided, 98 of 100 noise scales are not as far below their estimate.
_STANDARD_ERRORS = 2
_NOTHING = 1e-12


class Level(NamedTuple):
    """One rung of the ladder."""

    batch_size: int
    learning_rate: float


class Decisions(NamedTuple):
    """The decisions so far, and what the next one will be made from.

    Attributes:
      updates: whose measurements are in.
      growths: the first update of each level after the lowest, rising.
      smoothed: averages of the measurements on the highest level decided so far.
    """

    updates: int = 0
    growths: tuple[int, ...] = ()
    smoothed: Smoothed = Smoothed()

    def to_json(self) -> dict[str, Any]:
        """Plain values from which `from_json` makes equal ones."""
        return self._asdict() | {"smoothed": self.smoothed._asdict()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Decisions":
        """What `to_json` wrote."""
        smoothed = Smoothed(**values["smoothed"])
        return cls(values["updates"], tuple(values["growths"]), smoothed)


@dataclasses.dataclass(frozen=True)
class Controller:
    """An adaptive recipe; `observe` decides, from the `Decisions` so far and a measurement.

    Attributes:
      learning_rate: lr_0, which stays while the batch grows.
      batch_size: B_0, the base batch.
      momentum: m, constant.
      max_batch_size: the cap, after which the learning rate decays instead.
      multiple: of the measured noise scale, which with the base batch gives the batch; see above.
      growth_factor: from one level to the next.
      cooldown_epochs: at the end of the run; None for a fifth of it, 0 for none.
      smoothing: share of the examples seen so far that an average remembers.
      train_examples: N.
      epochs: length of the run.
      batch_multiple_examples: batch sizes are rounded down to multiples of it.
      small_batch_examples: of which an update must hold two or more, so that there is a
        measurement.
      tokens_per_example: tokens of an example, for its plans; None: it has none.
      rule: how the learning rate follows the batch size; see `schedule.transform.with_rule`.
      b1: of Adam at the base batch, as are b2 and eps; for the square-root rule alone.
      b2: likewise.
      eps: likewise.

    Raises:
      UserError: an argument is out of its range.
    """

    learning_rate: float
    batch_size: int
    momentum: float
    _: dataclasses.KW_ONLY
    max_batch_size: int
    multiple: float = 1.0
    growth_factor: float = 2.0
    cooldown_epochs: float | None = None
    smoothing: float = 0.5
    train_examples: int
    epochs: float
    batch_multiple_examples: int
    small_batch_examples: int
    # For those who count in them: no decision hangs on it.
    tokens_per_example: int | None = dataclasses.field(default=None, metadata=HARDWARE)
    rule: str = "linear"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        checks = Checks()
        check_base(checks, self.learning_rate, self.batch_size, self.momentum)
        ghost, small = self.batch_multiple_examples, self.small_batch_examples
        base = max(2 * small, ghost * round(self.batch_size / ghost))
        if self.batch_size >= 1:
            checks.require(
                self.batch_size >= 2 * small,
                "batch_size",
                self.batch_size,
                f"at least {2 * small} examples, two small batches of {small} "
                "(noise_small_batch_examples): a single one tells nothing of the noise",
                base,
            )
            checks.require(
                self.batch_size < 2 * small or self.batch_size % ghost == 0,
                "batch_size",
                self.batch_size,
                f"a multiple of {ghost} examples (the ghost batch)",
                base,
            )
        checks.whole(
            "max_batch_size",
            self.max_batch_size,
            f"a whole number of examples, at least the base batch of {self.batch_size}",
            at_least=self.batch_size,
        )
        checks.number("multiple", self.multiple, "a number above 0", above=0)
        checks.number("growth_factor", self.growth_factor, "a number above 1", above=1)
        checks.number("smoothing", self.smoothing, "a share above 0", above=0)
        if self.cooldown_epochs is not None:
            allowed = f"a time from 0 to the run's {in_epochs(self.epochs)}"
            limits = {"at_least": 0, "at_most": self.epochs}
            checks.number("cooldown_epochs", self.cooldown_epochs, allowed, **limits)
        # The exact rule has no batch larger than the training set, as its levels may be.
        rules = [name for name in RULES if name != "linear_exact"]
        checks.require(self.rule in rules, "rule", self.rule, *among(self.rule, rules))
        for name in ("b1", "b2", "eps"):
            default, given = getattr(Controller, name), getattr(self, name)
            allowed = f"{default:g} but with the rule square_root, which alone reads it"
            fits = self.rule == "square_root" or given == default
            checks.require(fits, name, given, allowed, default)
        checks.done()

    @property
    def _cooldown_length_epochs(self) -> float:
        return self.epochs / 5 if self.cooldown_epochs is None else self.cooldown_epochs

    @property
    def cooldown_epoch(self) -> float:
        """When the cooldown begins."""
        return self.epochs - self._cooldown_length_epochs

    @functools.cached_property
    def base_policy(self) -> Policy:
        """The recipe without any growth."""
        policy = constant(self.learning_rate, self.batch_size, self.momentum)
        if self.rule == "square_root":
            policy = adam(policy, self.b1, self.b2, self.eps)
        return with_rule(policy, self.rule)  # type: ignore[arg-type]

    def virtual_batch_size(self, level: int) -> float:
        """V_i: with the base learning rate, this batch would make the level's noise."""
        return self.batch_size * self.growth_factor**level

    def threshold(self, level: int) -> float:
        """What `multiple` times the noise scale must reach on a level for the next one to begin."""
        here, following = self.virtual_batch_size(level), self.virtual_batch_size(level + 1)
        return here * following / self.batch_size

    def decay(self, level: int) -> float:
        """By what the learning rate would be divided, at the base batch, for the level's noise."""
        return self.growth_factor ** (level / self.base_policy.rule.growth_power)

    def level(self, level: int) -> Level:
        """The batch size and learning rate of a level, from 0 on."""
        size, hyper = _settings(self, level)
        return Level(int(size[0]), float(hyper["learning_rate"][0]))

    @functools.cached_property
    def ladder(self) -> tuple[Level, ...]:
        """The levels up to the first whose batch size cannot grow any more."""
        levels = [self.level(0)]
        while self.virtual_batch_size(len(levels) - 1) * (1 + _SNAP) < self.max_batch_size:
            levels.append(self.level(len(levels)))
        return tuple(levels)

    @property
    def likely_batch_sizes(self) -> np.ndarray:
        """Batch sizes for a layout, int64: each that can come, over an equal share of the run."""
        sizes = np.unique([level.batch_size for level in self.ladder])
        share = self.epochs * self.train_examples / len(sizes)
        return np.repeat(sizes, np.ceil(share / sizes).astype(np.int64))

    def plan(self, decisions: Decisions = Decisions()) -> Plan:  # noqa: B008 - a constant value
        """The run as far as it is decided, going on at the last level to the end.

        Its rows before `known_updates(decisions)` are final, and so is which of them is the last.
        """
        end = first_example_from(self.epochs, self.train_examples)
        position, levels, counts = 0, [], []
        edges = (0, *decisions.growths, math.inf)
        for index, (first, following) in enumerate(itertools.pairwise(edges)):
            size = self.level(index).batch_size
            # The last decision may be for an update that the run does not reach.
            count = int(min(following - first, max(0, -(-(end - position) // size))))
            position += count * size
            levels.append(_settings(self, index))
            counts.append(count)
        batch_sizes = np.repeat([int(level.batch_size[0]) for level in levels], counts)
        hypers = {
            name: np.repeat([float(level.hyper[name][0]) for level in levels], counts)
            for name in levels[0].hyper
        }
        size, epochs, tokens = self.train_examples, float(self.epochs), self.tokens_per_example
        return Plan(size, epochs, self.rule, batch_sizes, hypers, tokens or None)

    def known_updates(self, decisions: Decisions) -> int:
        """How many updates from the start on are decided."""
        return decisions.updates + DELAY_UPDATES

    def observe(self, decisions: Decisions, measurement: Measurement) -> Decisions:
        """Takes the measurement of update `decisions.updates` and decides for the one two later.

        Args:
          decisions: with the measurements of all updates before.
          measurement: of this update, in examples; numbers, or arrays that hold one.

        Returns:
          The decisions with it.
        """
        update, growths, smoothed = decisions
        measurement = Measurement(*map(float, measurement))
        if update >= (growths[-1] if growths else 0):
            examples = self._first_example(growths, update + 1)
            smoothed = smooth(
                smoothed,
                estimate(measurement),
                measurement,
                memory_examples=self.smoothing * examples,
            )
            if self._asks_for_growth(decisions, smoothed):
                growths, smoothed = (*growths, update + DELAY_UPDATES), Smoothed()
        return Decisions(update + 1, growths, smoothed)

    def fewest_updates(self) -> Plan:
        """The plan of a run whose every decision is to grow."""
        # The same gradient every time, with next to nothing in it beside the noise.
        return self._where_always(gradient_square=_NOTHING, variance=1.0)

    def most_updates(self) -> Plan:
        """The plan of a run in which no measurement asks for growth."""
        return self._where_always(gradient_square=1.0, variance=_NOTHING)

    def _where_always(self, *, gradient_square: float, variance: float) -> Plan:
        decisions, plan = Decisions(), self.plan()
        always = Estimate(gradient_square, variance)
        while decisions.updates + DELAY_UPDATES < plan.num_updates:
            size = float(plan.batch_sizes[decisions.updates])
            grown = self.observe(decisions, measurement_from(always, 2.0, size))
            plan = plan if grown.growths == decisions.growths else self.plan(grown)
            decisions = grown
        return plan

    def _first_example(self, growths: Sequence[int], update: int) -> int:
        """Where an update on the last of the levels starts."""
        size = self.level(len(growths)).batch_size
        return self._first_examples(growths)[-1] + size * (update - (0, *growths)[-1])

    def _first_examples(self, growths: Sequence[int]) -> list[int]:
        """Where each level starts."""
        lengths = (
            self.level(index).batch_size * (following - first)
            for index, (first, following) in enumerate(itertools.pairwise((0, *growths)))
        )
        return list(itertools.accumulate(lengths, initial=0))

    def _asks_for_growth(self, decisions: Decisions, smoothed: Smoothed) -> bool:
        """Whether the update two later is to be on the next level."""
        cooled = self._cooldown_level(decisions)
        if cooled is not None:
            return len(decisions.growths) < cooled
        noise_scale, error = smoothed.noise_scale, smoothed.standard_error
        if noise_scale is None or error is None:
            return False
        return self.multiple * (noise_scale - _STANDARD_ERRORS * error) >= self.threshold(
            len(decisions.growths)
        )

    def _cooldown_level(self, decisions: Decisions) -> int | None:
        """The level that the cooldown gives the update to decide for; None before it begins."""
        end = first_example_from(self.epochs, self.train_examples)
        start = end - first_example_from(self._cooldown_length_epochs, self.train_examples)
        position = self._first_example(decisions.growths, decisions.updates + DELAY_UPDATES)
        if not start <= position < end:
            return None
        found = sum(first < start for first in self._first_examples(decisions.growths)[1:])
        shares = math.log((end - start) / (end - position)) / math.log(self.decay(1))
        return found + math.floor(shares * (1 + _SNAP))


@functools.lru_cache(maxsize=1024)
def _settings(controller: Controller, level: int) -> Settings:
    """A level's batch size and hyperparameters by the controller's rule, arrays of one."""
    base = controller.base_policy
    rule = base.rule
    # What the rule leaves of the decay where the batch has taken its part; 1 where all of it.
    left = level * (rule.learning_rate_power - 1 / rule.growth_power)

    def settings_at(epochs: Array) -> Settings:
        size, hyper = base.at(epochs)
        virtual = np.full(epochs.shape, controller.virtual_batch_size(level))
        capped = np.minimum(virtual, controller.max_batch_size)
        moved = rule.move(hyper, size, virtual)
        moved["learning_rate"] = hyper["learning_rate"] * controller.growth_factor**left
        return Settings(capped, rule.move(moved, virtual, capped))

    policy = dataclasses.replace(base, settings_at=settings_at)
    return rounded(policy, np.zeros(1), controller.batch_multiple_examples)
