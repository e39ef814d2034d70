"""What is worth knowing about a plan before it runs: numbers, and warnings with a way out.

>>> from bigbatch.schedule import plan, policy, transform
>>> paper = policy.step_decay(0.1, 128, 0.9, boundaries_epochs=[60, 120, 160], factor=0.2)
>>> grown = transform.grow_batch(paper)
>>> plans = [plan.make_plan(p, train_examples=50_000, epochs=200) for p in (grown, paper)]
>>> for diagnostic in diagnose(*plans):
...     print(diagnostic.text)
momentum lag: 3.2 epochs, 8.0% of the 40 epochs at about batch size 16,000
noise scale: the exact one is up to 32.0% below the approximation
largest batch size: 16,000 examples, 32.0% of the training set
effective learning rate lr/(1-m): at most 1, 1 times the source's
"""

import dataclasses

import numpy as np

from bigbatch.schedule.durations import in_epochs
from bigbatch.schedule.noise_scale import Array
from bigbatch.schedule.plan import Plan
from bigbatch.schedule.policy import Policy

# The paper's runs above this share lost a point of accuracy or more, its runs below did not.
MAX_LAG_SHARE = 0.03
# Stages whose batch sizes differ by less than this factor are one stage to the momentum.
_SAME_SIZE = 1.5
MAX_NOISE_ERROR = 0.2
# Smith et al. 2018 grow the batch to about a tenth of the training set.
MAX_BATCH_SHARE = 0.1
# The paper raised the learning rate by 5 without trouble.
MAX_LEARNING_RATE_RATIO = 5.0
# At the noise scale itself the best learning rate is half of what linear scaling gives.
MAX_NOISE_SCALE_SHARE = 1.0


@dataclasses.dataclass(frozen=True)
class Diagnostic:
    """One number about a plan.

    Attributes:
      name: for programs.
      value: the number that is compared with the limit.
      limit: above it there is a warning.
      text: the number in words.
      warning: what may go wrong and a way out; None below the limit.
    """

    name: str
    value: float
    limit: float
    text: str
    warning: str | None


def diagnose(plan: Plan, source: Plan) -> tuple[Diagnostic, ...]:
    """All diagnostics of a plan.

    Args:
      plan: the plan.
      source: the plan of the same policy without transformations.
    """
    found = [momentum_lag(plan), batch_share(plan), effective_learning_rate(plan, source)]
    if plan.rule == "linear":
        found.insert(1, noise_error(plan))
    return tuple(found)


def momentum_lags_epochs(plan: Plan) -> Array:
    """B / (N (1 - m)) of each stage: how far the velocity lags behind the gradient.

    Heavy-ball's velocity is a sum over about 1/(1-m) updates; it starts at 0 and follows a change
    only with this delay (Smith et al. 2018).

    Returns:
      float64[number of stages], in epochs.
    """
    sizes = np.array([stage.batch_size for stage in plan.stages])
    momenta = np.array([stage.momentum for stage in plan.stages])
    return sizes / (plan.train_examples * (1 - momenta))


def momentum_lag(plan: Plan) -> Diagnostic:
    """The largest momentum lag as a share of the time that the batch size stays about the same."""
    lags = momentum_lags_epochs(plan)
    sizes = np.array([stage.batch_size for stage in plan.stages])
    edges = np.r_[[stage.first_example for stage in plan.stages], plan.num_examples]
    edges = edges / plan.train_examples
    lengths = np.empty_like(lags)
    for i, size in enumerate(sizes):
        unlike = (sizes <= size / _SAME_SIZE) | (sizes >= size * _SAME_SIZE)
        before, after = np.flatnonzero(unlike[:i]), np.flatnonzero(unlike[i:])
        start = edges[before[-1] + 1] if len(before) else 0.0
        end = edges[i + after[0]] if len(after) else edges[-1]
        lengths[i] = end - start
    worst = int(np.argmax(lags / lengths))
    lag, length, size = lags[worst], lengths[worst], sizes[worst]
    return diagnostic(
        "momentum_lag",
        lag / length,
        MAX_LAG_SHARE,
        f"momentum lag: {in_epochs(lag, 2)}, {lag / length:.1%} of the {in_epochs(length, 3)} at "
        f"about batch size {size:,}",
        f"the velocity follows a change only after {in_epochs(lag, 2)}, which is "
        f"{lag / length:.1%} of the time at about batch size {size:,}: lower the momentum or "
        "max_batch_size, or train for more epochs",
    )


def noise_error(plan: Plan) -> Diagnostic:
    """How far the exact noise scale, lr/(1-m) (N/B - 1), falls below the approximate one: B/N."""
    share = float(plan.batch_sizes.max() / plan.train_examples)
    return diagnostic(
        "noise_error",
        share,
        MAX_NOISE_ERROR,
        f"noise scale: the exact one is up to {share:.1%} below the approximation",
        f"the exact noise scale falls {share:.1%} below the approximation that the plan keeps: "
        "choose the rule linear_exact or a smaller max_batch_size",
    )


def batch_share(plan: Plan) -> Diagnostic:
    """The largest batch size as a share of the training set."""
    size = int(plan.batch_sizes.max())
    share = size / plan.train_examples
    tenth = int(plan.train_examples * MAX_BATCH_SHARE)
    return diagnostic(
        "batch_share",
        share,
        MAX_BATCH_SHARE,
        f"largest batch size: {size:,} examples, {share:.1%} of the training set",
        f"the batch size reaches {size:,} examples, {share:.1%} of the training set; the noise "
        f"scale is a good guide up to about a tenth: set max_batch_size to about {tenth:,}",
    )


def effective_learning_rate(plan: Plan, source: Plan) -> Diagnostic:
    """The largest lr/(1-m) against the source's; a plan that warms up is not warned of."""

    def effective(plan: Plan) -> tuple[float, float]:
        # In parts, as copies of a whole column are large.
        columns = (plan.hypers["learning_rate"], plan.hypers["momentum"])
        parts = (np.array_split(column, 1 + plan.num_updates // 2**16) for column in columns)
        peak = max(float((rate / (1 - m)).max()) for rate, m in zip(*parts, strict=True))
        return float(columns[0][0] / (1 - columns[1][0])), peak

    (first, peak), (_, source_peak) = effective(plan), effective(source)
    ratio, warms_up = peak / source_peak, first < peak / 2
    return diagnostic(
        "effective_learning_rate",
        ratio,
        np.inf if warms_up else MAX_LEARNING_RATE_RATIO,
        f"effective learning rate lr/(1-m): at most {peak:.3g}, {ratio:.3g} times the source's",
        f"the effective learning rate lr/(1-m) starts at {first:.3g} and reaches {peak:.3g}, "
        f"{ratio:.3g} times that of the source: training may diverge early; add the "
        "transformation warmup, or scale (lr, B) or raise the momentum by less",
    )


def linear_scaling(plan: Plan, gradient_noise_scale: float) -> Diagnostic:
    """The largest batch size against a measured gradient noise scale B_noise.

    By lr_best(B) = lr_max / (1 + B_noise/B) (`gradient_noise.best_learning_rate`) a learning rate
    that grows with B in proportion is 1 + B/B_noise times the best: twice at B = B_noise.

    Args:
      plan: the plan.
      gradient_noise_scale: B_noise in examples, of the time at which the batch is largest.
    """
    size = int(plan.batch_sizes.max())
    share = size / gradient_noise_scale
    return diagnostic(
        "linear_scaling",
        share,
        MAX_NOISE_SCALE_SHARE,
        f"largest batch size: {share:.2g} times the measured gradient noise scale",
        f"at batch size {size:,} a learning rate in proportion to it is {1 + share:.2g} times the "
        f"best by lr_max / (1 + B_noise/B), with B_noise = {gradient_noise_scale:,.0f} examples as "
        "measured: set max_batch_size to about that, or scale the learning rate by less",
    )


def floors(plan: Plan, policy: Policy) -> list[Diagnostic]:
    """For each of Adam's b1 and b2 that the policy's rule moves, how far it is held at its floor.

    Args:
      plan: the plan.
      policy: what it was made from. It says what the rule asks for.
    """
    found = []
    epochs = np.array([stage.epoch for stage in plan.stages])
    firsts = [stage.first_update for stage in plan.stages]
    for name, floor in policy.rule.floors.items():
        asked = policy.at(epochs).hyper[name]
        # But for rounding, which a b that starts at its floor may be on either side of.
        held = (plan.hypers[name][firsts] <= floor) & (1 - asked > (1 - floor) * (1 + 1e-9))
        stage, lowest = plan.stages[int(np.argmax(held))], float(asked.min())
        where = f"from update {stage.first_update:,} on (batch size {stage.batch_size:,})"
        found.append(
            diagnostic(
                f"{name}_floor",
                float(held.any()),
                0.0,
                f"{name}: {'held at' if held.any() else 'never below'} its floor of {floor:g}",
                f"{where} {name} is held at its floor of {floor:g}, where the rule {plan.rule} "
                f"asks for down to {lowest:.3g}: past here the equivalence is believed, not shown; "
                "a smaller max_batch_size stays below",
            )
        )
    return found


def diagnostic(name: str, value: float, limit: float, text: str, warning: str) -> Diagnostic:
    """A number, its words, and the warning if it is above the limit."""
    # A hair above the limit, such as 5.000000000000001 times, is the limit.
    above = value > limit * (1 + 1e-9)
    return Diagnostic(name, float(value), float(limit), text, warning if above else None)
