"""Transformations: from one policy to another that trains alike, in fewer and larger updates.

Each is a pure function Policy -> Policy of a few lines that keeps the noise scale (or what the
policy's rule keeps) at every point in time. They compose: the paper's "increased initial learning
rate" is

>>> from bigbatch.policy import step_decay
>>> paper = step_decay(0.1, 128, 0.9, boundaries_epochs=[60, 120, 160], factor=0.2)
>>> increase_lr = grow_batch(scale(paper, 5), max_batch_size=5120)
>>> settings = increase_lr.at(np.array([0.0, 60.0, 120.0, 160.0]))
>>> settings.batch_size.round(6).tolist()
[640.0, 3200.0, 5120.0, 5120.0]
>>> settings.hyper["learning_rate"].round(6).tolist()
[0.5, 0.5, 0.16, 0.032]
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from bigbatch.checks import Checks
from bigbatch.noise_scale import Array
from bigbatch.policy import Policy, Settings, StatedSize

# Just before a point in time, as a share of it. Far above the rounding of position / N, far below
# one example in any run.
_JUST_BEFORE = 1 - 1e-12


def scale(policy: Policy, factor: float) -> Policy:
    """(lr, B) -> (c lr, c B), which leaves lr/B and so the noise scale alone.

    Smith et al. 2018, section 5 ("increased initial learning rate"); Goyal et al. 2017. Under
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

    def at(epochs: Array) -> Settings:
        batch_size, hyper = policy.at(epochs)
        return Settings(
            batch_size * factor, policy.rule.move(hyper, batch_size, batch_size * factor)
        )

    stated = tuple(StatedSize("factor", factor, s.size * factor) for s in policy.stated_batch_sizes)
    return dataclasses.replace(policy, at=at, stated_batch_sizes=stated)


def raise_momentum(policy: Policy, momentum: float, by: str = "batch_size") -> Policy:
    """Momentum m0 -> m at equal noise scale: B (1-m0)/(1-m), or lr (1-m)/(1-m0).

    Smith et al. 2018, section 5 ("increased momentum coefficient").

    Args:
      policy: a policy for heavy-ball SGD.
      momentum: the new coefficient, from the policy's own to below 1.
      by: what pays for it: "batch_size" grows at fixed learning rate, or "learning_rate" falls at
        fixed batch size.

    Raises:
      UserError: an argument is out of its range, or the policy's rule is not linear.
    """
    start = float(policy.at(np.zeros(1)).hyper["momentum"][0])
    checks = Checks()
    checks.number(
        "momentum",
        momentum,
        f"a number from the policy's own, {start:g}, to below 1",
        at_least=start,
        below=1,
    )
    ways = ("batch_size", "learning_rate")
    checks.require(by in ways, "by", by, " or ".join(map(repr, ways)), "batch_size")
    checks.require(
        policy.rule.name.startswith("linear"),
        "rule",
        policy.rule.name,
        "'linear' or 'linear_exact' (the trade of momentum for batch size is heavy-ball SGD's)",
        "linear",
    )
    checks.done()

    def at(epochs: Array) -> Settings:
        batch_size, hyper = policy.at(epochs)
        ratio = (1 - hyper["momentum"]) / (1 - momentum)
        raised = hyper | {"momentum": np.full(np.shape(batch_size), float(momentum))}
        if by == "batch_size":
            return Settings(policy.rule.grow(batch_size, ratio), raised)
        return Settings(batch_size, raised | {"learning_rate": hyper["learning_rate"] / ratio})

    # The new sizes follow from a momentum, which nobody chooses to make them whole.
    stated = () if by == "batch_size" else policy.stated_batch_sizes
    return dataclasses.replace(policy, at=at, stated_batch_sizes=stated)


def grow_batch(
    policy: Policy,
    max_batch_size: float = math.inf,
    from_epoch: float = 0.0,
    until_epoch: float = math.inf,
) -> Policy:
    """Learning-rate decay becomes batch growth; the learning rate takes what B_max leaves over.

    Smith et al. 2018, sections 3 and 4. With d = lr_peak / lr from the peak on,

        B' = min(B_max, B d),    lr' = lr B'/B,

    so that lr'/B' = lr/B. Before the peak (warm-up) the batch size is the policy's own. Under
    another rule B' = min(B_max, grow(B, d)) and the hyperparameters follow by the rule.

    With `from_epoch` or `until_epoch` (the paper's hybrid) d counts only the decay inside
    [from, until): what decayed before stays in the learning rate, and from `until_epoch` on the
    batch size keeps what it reached while further decay is the learning rate's.

    Args:
      policy: the policy whose decay is to become growth.
      max_batch_size: B_max in examples; infinity for no limit, which needs a learning rate that
        stays above 0.
      from_epoch: decay before it stays decay.
      until_epoch: decay from it on stays decay.

    Raises:
      UserError: B_max is below the policy's own batch size or missing where the learning rate
        reaches 0; the epochs are out of order.
    """
    base = float(np.max(policy.at(np.array(policy.turning_epochs)).batch_size))
    checks = Checks()
    if max_batch_size != math.inf:
        checks.number(
            "max_batch_size",
            max_batch_size,
            f"at least the policy's own batch size of {base:g} examples",
            at_least=base,
        )
    elif policy.zero_epoch < math.inf and until_epoch >= policy.zero_epoch:
        checks.require(
            False,
            "max_batch_size",
            None,
            f"a number of examples: the learning rate reaches 0 at epoch {policy.zero_epoch:g}, "
            "where no batch size without a limit could stand for it",
        )
    exact_for = policy.rule.train_examples
    if exact_for is not None and max_batch_size != math.inf:
        allowed = f"below the {exact_for} training examples: the exact noise scale is 0 there"
        nearest = exact_for - 1
        checks.require(
            max_batch_size < exact_for, "max_batch_size", max_batch_size, allowed, nearest
        )
    checks.number("from_epoch", from_epoch, "an epoch from 0 on", at_least=0)
    checks.require(
        from_epoch < until_epoch,
        "until_epoch",
        until_epoch,
        f"an epoch after from_epoch ({from_epoch:g})",
    )
    checks.done()

    def decay_at(epochs: Array, rates: Array) -> Array:
        with np.errstate(divide="ignore"):
            decay = policy.peak_learning_rate / rates
        return np.where(epochs < policy.peak_epoch, 1.0, np.maximum(decay, 1.0))

    def decay_just_before(epoch: float) -> float:
        before = np.array([epoch * _JUST_BEFORE])
        return float(decay_at(before, policy.at(before).hyper["learning_rate"])[0])

    decay_before = decay_just_before(from_epoch)
    decay_inside = (
        math.inf if until_epoch == math.inf else decay_just_before(until_epoch) / decay_before
    )

    def at(epochs: Array) -> Settings:
        batch_size, hyper = policy.at(epochs)
        decay = decay_at(epochs, hyper["learning_rate"]) / decay_before
        decay = np.where(epochs < until_epoch, decay, np.minimum(decay, decay_inside))
        decay = np.where(epochs < from_epoch, 1.0, np.maximum(decay, 1.0))
        grown = np.minimum(policy.rule.grow(batch_size, decay), max_batch_size)
        return Settings(grown, policy.rule.move(hyper, batch_size, grown))

    stated = policy.stated_batch_sizes
    if max_batch_size != math.inf:
        stated += (StatedSize("max_batch_size", max_batch_size, float(max_batch_size)),)
    return dataclasses.replace(policy, at=at, stated_batch_sizes=stated)


TRANSFORMATIONS: dict[str, Callable[..., Policy]] = {
    "scale": scale,
    "raise_momentum": raise_momentum,
    "grow_batch": grow_batch,
}
"""By the name that a config gives them; the parameters after the policy are its fields."""
