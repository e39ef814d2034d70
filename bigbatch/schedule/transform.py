"""Transformations: from one policy to another that trains alike, in fewer and larger updates.

Each is a pure function Policy -> Policy of a few lines that keeps the noise scale (or what the
policy's rule keeps) at every point in time. They compose: the paper's "increased initial learning
rate" is

>>> from bigbatch.schedule.policy import step_decay
>>> paper = step_decay(0.1, 128, 0.9, boundaries_epochs=[60, 120, 160], factor=0.2)
>>> increase_lr = grow_batch(scale(paper, 5), max_batch_size=5120)
>>> settings = increase_lr.at([0, 60, 120, 160])
>>> settings.batch_size.round(6).tolist()
[640.0, 3200.0, 5120.0, 5120.0]
>>> settings.hyper["learning_rate"].round(6).tolist()
[0.5, 0.5, 0.16, 0.032]

Nothing is rounded here: batch sizes become whole when a plan is made.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import numpy as np

from bigbatch import errors
from bigbatch.checks import Checks
from bigbatch.schedule.durations import in_any_unit, num_reached
from bigbatch.schedule.noise_scale import RULES, Array, make_rule
from bigbatch.schedule.policy import Policy, Settings, StatedSize, batch_ramp, batch_stages, warmup

# Just before a point in time, as a share of it. Far above the rounding of position / N, far below
# one example in any run.
_JUST_BEFORE = 1 - 1e-12
# A ratio of batch sizes this close below a power of two is that power.
_ROUNDINGS = 1 + 9e-13
# The bottom of what is in use for language models.
_B2_FLOOR = 0.95


def with_rule(
    policy: Policy,
    rule: Literal["linear", "linear_exact", "square_root", "seesaw", "muon", "sign"],
    *,
    b1_floor: float | None = None,
    b2_floor: float | None = None,
    eps: Literal["moved", "held"] | None = None,
    weight_decay: Literal["held", "time_constant"] = "held",
    train_examples: int | None = None,
) -> Policy:
    """Chooses what the transformations after it keep, and how hyperparameters absorb rounding.

    - "linear" (default): lr/((1-m) B), the approximate noise scale. Smith et al. 2018.
    - "linear_exact": lr/(1-m) (N/B - 1). Needs every batch size below N.
    - "square_root": lr/sqrt(B), (1-b2)/B and eps sqrt(B), for Adam (see `adam`), and (1-b1)/B where
      b1 has a floor. A decay by d becomes growth by d^2. Malladi et al. 2022.
    - "seesaw": lr/sqrt(B). A decay by d becomes growth by d and a decay by sqrt(d). Seesaw, 2025.
    - "muon", "sign": the arithmetic of Seesaw, believed for Muon, and for Lion and Signum.

    Where the evidence for each ends is its `Rule.evidence`, which `bigbatch plan` prints.

    The square-root rule taken at its word moves b1 from 0.9 to 0.2 at 8 times the batch size, and
    below 0 at 10 times. Practice holds b1, and lets b2 fall no further than 0.95: below that large
    runs had spikes (marin, pull request 2447). A plan says from which update on a floor holds.

    Args:
      policy: the policy.
      rule: one of the names above.
      b1_floor: down to where "square_root" moves b1; None holds b1.
      b2_floor: likewise for b2; None is 0.95. A b2 that starts below its floor is held.
      eps: whether "square_root" divides eps by the root of the growth; None is "moved".
      weight_decay: "time_constant" moves the weight decay of AdamW's form (see `adam`), so that
        its time constant B/(lr weight_decay) in examples stays what it would have been (Wang and
        Aitchison 2024, arXiv 2405.13698, found the best one constant between runs of fixed batch
        size; for a batch that grows it is believed). "held" leaves it as it is.
      train_examples: N (context), for "linear_exact".

    Raises:
      UserError: there is no such rule, or it needs something that is missing.
    """
    checks = Checks()
    checks.require(rule in RULES, "rule", rule, *errors.among(rule, RULES))
    if rule == "linear_exact":
        given = "nothing" if train_examples is None else train_examples
        checks.whole("train_examples", given, "the number of training examples")
    hyper = policy.at(0.0).hyper
    allowed = "a rule for a policy without b1, b2 and eps; the transformation `adam` gives it them"
    checks.require(rule != "square_root" or "b1" in hyper, "rule", rule, allowed, "linear")
    for name, value in (("b1_floor", b1_floor), ("b2_floor", b2_floor)):
        if value is not None:
            allowed = "a number from 0 to below 1, or None"
            checks.number(name, value, allowed, at_least=0, below=1)
    moves = {"b1_floor": b1_floor, "b2_floor": b2_floor, "eps": eps}
    for name, moved in moves.items():
        allowed = "None but for square_root, which alone moves b1, b2 and eps"
        checks.require(moved is None or rule == "square_root", name, moved, allowed)
    keeps = weight_decay == "time_constant"
    allowed = '"held" in a policy without weight decay; the transformation `adam` gives it one'
    checks.require(not keeps or "weight_decay" in hyper, "weight_decay", weight_decay, allowed)
    checks.done()
    made = dataclasses.replace(make_rule(rule, train_examples), keeps_time_constant=keeps)
    if rule == "square_root":
        floors = {"b1": b1_floor, "b2": _B2_FLOOR if b2_floor is None else b2_floor}
        made = dataclasses.replace(
            made,
            moves_eps=eps != "held",
            floors={n: min(f, float(hyper[n][0])) for n, f in floors.items() if f is not None},
        )
    return dataclasses.replace(policy, rule=made)


def adam(
    policy: Policy,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float | None = None,
) -> Policy:
    """Gives a policy Adam's hyperparameters, so that the square-root rule can move them.

    Args:
      policy: a policy with momentum 0: b1 is an average, which leaves the noise scale alone.
      b1: from 0 to below 1.
      b2: from 0 to below 1.
      eps: from 0 on.
      weight_decay: AdamW's, from 0 on, in place of the optimizer's own; None leaves it there.

    Raises:
      UserError: an argument is out of its range, or the policy has momentum.
    """
    momentum = float(policy.at(0.0).hyper["momentum"][0])
    checks = Checks()
    checks.number("b1", b1, "a number from 0 to below 1", at_least=0, below=1)
    checks.number("b2", b2, "a number from 0 to below 1", at_least=0, below=1)
    checks.number("eps", eps, "a number from 0 on", at_least=0)
    if weight_decay is not None:
        checks.number("weight_decay", weight_decay, "a number from 0 on, or None", at_least=0)
    allowed = "0 in a policy for Adam, whose b1 takes its place"
    checks.require(momentum == 0, "momentum", momentum, allowed, 0.0)
    checks.done()
    given = {"b1": b1, "b2": b2, "eps": eps, "weight_decay": weight_decay}
    constants = {name: float(value) for name, value in given.items() if value is not None}

    def settings_at(epochs: Array) -> Settings:
        batch_size, hyper = policy.at(epochs)
        columns = {name: np.full(epochs.shape, value) for name, value in constants.items()}
        return Settings(batch_size, hyper | columns)

    return dataclasses.replace(policy, settings_at=settings_at)


def scale(policy: Policy, factor: float) -> Policy:
    """(lr, B) -> (c lr, c B), which leaves lr/B and so the noise scale alone.

    Smith et al. 2018 ("increased initial learning rate"); Goyal et al. 2017. Under
    another rule the batch size is multiplied by `factor` and the rest follows by the rule.

    Args:
      policy: the policy to scale.
      factor: above 0.

    Raises:
      UserError: `factor` is not a number above 0.
    """
    checks = Checks()
    checks.number("factor", factor, "a number above 0", above=0)
    checks.done()

    def settings_at(epochs: Array) -> Settings:
        batch_size, hyper = policy.at(epochs)
        scaled = batch_size * factor
        return Settings(scaled, policy.rule.move(hyper, batch_size, scaled))

    stated = tuple(StatedSize("factor", factor, s.size * factor) for s in policy.stated_batch_sizes)
    return dataclasses.replace(policy, settings_at=settings_at, stated_batch_sizes=stated)


def raise_momentum(
    policy: Policy, momentum: float, by: Literal["batch_size", "learning_rate"] = "batch_size"
) -> Policy:
    """Momentum m0 -> m at equal noise scale: B (1-m0)/(1-m), or lr (1-m)/(1-m0).

    Smith et al. 2018 ("increased momentum coefficient").

    Args:
      policy: a policy for heavy-ball SGD.
      momentum: the new coefficient, from the policy's own to below 1.
      by: what pays for it: "batch_size" grows at fixed learning rate, or "learning_rate" falls at
        fixed batch size.

    Raises:
      UserError: an argument is out of its range, or the policy's rule is not linear.
    """
    start = float(policy.at(0.0).hyper["momentum"][0])
    checks = Checks()
    allowed = f"a number from the policy's own, {start:g}, to below 1"
    checks.number("momentum", momentum, allowed, at_least=start, below=1)
    ways = ("batch_size", "learning_rate")
    checks.require(by in ways, "by", by, " or ".join(map(repr, ways)), "batch_size")
    allowed = "linear or linear_exact: only heavy-ball SGD trades momentum for batch size"
    linear = policy.rule.name in ("linear", "linear_exact")
    checks.require(linear, "rule", policy.rule.name, allowed, "linear")
    checks.done()

    def settings_at(epochs: Array) -> Settings:
        batch_size, hyper = policy.at(epochs)
        ratio = (1 - hyper["momentum"]) / (1 - momentum)
        raised = hyper | {"momentum": np.full(epochs.shape, float(momentum))}
        if by == "batch_size":
            return Settings(policy.rule.grow(batch_size, ratio), raised)
        return Settings(batch_size, raised | {"learning_rate": hyper["learning_rate"] / ratio})

    # The new sizes follow from a momentum, which nobody chooses to make them whole.
    stated = () if by == "batch_size" else policy.stated_batch_sizes
    return dataclasses.replace(policy, settings_at=settings_at, stated_batch_sizes=stated)


@in_any_unit("from_epoch", "until_epoch", updates=False)
def grow_batch(
    policy: Policy,
    max_batch_size: int | None = None,
    factor: float | None = None,
    *,
    from_epoch: float = 0.0,
    until_epoch: float = math.inf,
) -> Policy:
    """Learning-rate decay becomes batch growth; the learning rate takes what B_max leaves over.

    Smith et al. 2018. With d = lr_peak / lr from the peak on,

        B' = min(B_max, B d),    lr' = lr B'/B,

    so that lr'/B' = lr/B. Before the peak (warm-up) the batch size is the policy's own. Under
    another rule the batch size is what the rule makes of d, or B_max, and the rest follows by it.

    With a `factor` f the decay counts in steps: d is rounded down to a power of f, for the batch
    size and for the learning rate, which holds between the steps. With the rule seesaw this is
    Seesaw's algorithm: where the schedule has divided the learning rate by f once more, it is
    divided by sqrt(f) and the batch size multiplied by f.

    With `from_epoch` or `until_epoch` (the paper's hybrid) d counts only the decay inside
    [from, until): what decayed before stays in the learning rate, and from `until_epoch` on the
    batch size keeps what it reached while further decay is the learning rate's.

    Args:
      policy: the policy whose decay is to become growth.
      max_batch_size: B_max in examples; None for no limit, which needs a learning rate that stays
        above 0.
      factor: of the steps, above 1; None for no steps.
      from_epoch: decay before it stays decay.
      until_epoch: decay from it on stays decay.

    Raises:
      UserError: B_max is below the policy's own batch size, or missing where the learning rate
        reaches 0; the epochs are out of order.
    """
    checks = Checks()
    if max_batch_size is not None:
        base = policy.stated_peak_batch_size
        allowed = f"at least the policy's own batch size of {base:g} examples"
        most = policy.rule.train_examples
        fits = checks.number("max_batch_size", max_batch_size, allowed) and checks.require(
            max_batch_size * _ROUNDINGS >= base,
            "max_batch_size",
            max_batch_size,
            allowed,
            math.ceil(base),
        )
        if fits and most:
            allowed = f"below the {most} training examples, where the exact noise scale is above 0"
            checks.number("max_batch_size", max_batch_size, allowed, at_most=most - 1)
    elif policy.zero_epoch <= until_epoch and policy.zero_epoch < math.inf:
        allowed = (
            f"a number of examples: the learning rate reaches 0 at epoch {policy.zero_epoch:g}, "
            "and no batch size without a limit stands for that"
        )
        checks.require(False, "max_batch_size", "nothing", allowed)
    if factor is not None:
        checks.number("factor", factor, "a number above 1, or None", above=1)
    if checks.number("from_epoch", from_epoch, "a point in time from 0 on", at_least=0):
        allowed = f"a point in time after from_epoch, {from_epoch:g}"
        if until_epoch != math.inf:
            checks.number("until_epoch", until_epoch, allowed, above=from_epoch)
    checks.done()

    peak, peak_epoch = policy.peak_learning_rate, policy.peak_epoch

    def counted(epochs: Array, rates: Array) -> Array:
        """The learning rates as far as they count as decayed: warm-up does not."""
        return np.where(epochs < peak_epoch, peak, np.minimum(rates, peak))

    def just_before(epoch: float) -> float:
        before = np.array([epoch * _JUST_BEFORE])
        return float(counted(before, policy.at(before).hyper["learning_rate"])[0])

    start = just_before(from_epoch)
    lowest = 0.0 if until_epoch == math.inf else just_before(until_epoch)

    def settings_at(epochs: Array) -> Settings:
        batch_size, hyper = policy.at(epochs)
        rates = counted(epochs, hyper["learning_rate"])
        # Where the learning rate rises again after `until_epoch`, the batch size gives way: the
        # learning rate would pass its peak otherwise.
        rates = np.where(num_reached([until_epoch], epochs), np.maximum(rates, lowest), rates)
        with np.errstate(divide="ignore", invalid="ignore"):
            # fmax: 0/0, a learning rate of 0 that started at 0, is no decay.
            decay = np.fmax(start / rates, 1.0)
        decay = np.where(num_reached([from_epoch], epochs), decay, 1.0)
        if factor is not None:
            steps = np.floor(np.log(decay * _ROUNDINGS) / math.log(factor))
            # Where the learning rate is 0 there is no last step: B_max takes all.
            stepped = np.where(np.isfinite(decay), factor**steps, decay)
            ratio = np.divide(decay, stepped, out=np.ones_like(decay), where=np.isfinite(decay))
            hyper = hyper | {"learning_rate": hyper["learning_rate"] * ratio}
            decay = stepped
        grown = policy.rule.grow(batch_size, decay)
        if max_batch_size is not None:
            grown = np.minimum(grown, max_batch_size)
        return Settings(grown, policy.rule.move(hyper, batch_size, grown))

    stated = policy.stated_batch_sizes
    if max_batch_size is not None:
        stated += (StatedSize("max_batch_size", max_batch_size, max_batch_size),)
    return dataclasses.replace(policy, settings_at=settings_at, stated_batch_sizes=stated)


def doubling_only(policy: Policy) -> Policy:
    """Rounds batch sizes down to the first one times powers of two; the rest follows by the rule.

    As large language models grow theirs (Merrill et al. 2025: 1024, 2048, 4096). The learning rate
    falls between the doublings and comes back to the policy's at each.

    Args:
      policy: usually one that grows.
    """
    first = float(policy.at(0.0).batch_size[0])

    def settings_at(epochs: Array) -> Settings:
        batch_size, hyper = policy.at(epochs)
        # frexp: ratio = mantissa * 2^exponent with mantissa in [1/2, 1), without a logarithm.
        _, exponent = np.frexp(batch_size / first * _ROUNDINGS)
        doubled = np.ldexp(first, exponent - 1)
        return Settings(doubled, policy.rule.move(hyper, batch_size, doubled))

    return dataclasses.replace(policy, settings_at=settings_at)


TRANSFORMATIONS: dict[str, Callable[..., Policy]] = {
    "warmup": warmup,
    "batch_stages": batch_stages,
    "batch_ramp": batch_ramp,
    "with_rule": with_rule,
    "adam": adam,
    "scale": scale,
    "raise_momentum": raise_momentum,
    "grow_batch": grow_batch,
    "doubling_only": doubling_only,
}
"""By the name that a config gives them; the parameters after `policy` are its fields."""
