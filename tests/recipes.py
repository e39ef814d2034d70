"""Random recipes for the property tests: sources, and transformations of them."""

import dataclasses
import math

from hypothesis import assume
from hypothesis import strategies as st

from bigbatch.schedule.policy import (
    Policy,
    constant,
    cosine,
    exponential,
    polynomial,
    stages,
    step_decay,
    warmup,
)
from bigbatch.schedule.transform import doubling_only, grow_batch, raise_momentum, scale, with_rule

EPOCHS = 6.0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A source and what transformations made of it.

    Attributes:
      source: the policy before.
      policy: the policy after.
      train_examples: N.
      peak: the most that the learning rate may be under the approximate rules.
      max_batch_size: the most that the batch size may be.
    """

    source: Policy
    policy: Policy
    train_examples: int
    peak: float
    max_batch_size: float


def times(least=0.0):
    return st.integers(math.ceil(4 * least), 24).map(lambda quarter: quarter / 4)


@st.composite
def sources(draw, momentum=None):
    base = (
        draw(st.floats(1e-3, 10)),
        draw(st.integers(1, 40)),
        draw(st.sampled_from([0.0, 0.5, 0.9])) if momentum is None else momentum,
    )
    final = draw(st.sampled_from([0.0, 0.01, 1.0])) * base[0]
    factor = draw(st.sampled_from([0.1, 0.2, 0.5, 0.8]))
    kind = draw(st.integers(0, 5))
    if kind == 0:
        policy = constant(*base)
    elif kind == 1:
        boundaries = sorted(draw(st.sets(times(0.25), max_size=4)))
        policy = step_decay(*base, boundaries_epochs=boundaries, factor=factor)
    elif kind == 2:
        policy = exponential(*base, factor=factor, every_epochs=draw(times(0.5)))
    elif kind == 3:
        power = draw(st.sampled_from([0.5, 1.0, 2.0]))
        policy = polynomial(*base, power=power, epochs=EPOCHS, final_learning_rate=final)
    elif kind == 4:
        start = draw(times())
        policy = cosine(*base, from_epoch=start, until_epoch=start + 2, final_learning_rate=final)
    else:
        # Up and down: several local maxima.
        rates = draw(st.lists(st.floats(1e-3, 10), min_size=1, max_size=5))
        starts = sorted(draw(st.sets(times(0.25), min_size=len(rates), max_size=len(rates))))
        text = " ".join(f"{s}_epochs:{rate!r}" for s, rate in zip(starts, rates, strict=True))
        policy = stages(f"0:{base[0]!r} {text}", f"0:{base[1]}", base[2])
    if draw(st.booleans()):
        latest = min(EPOCHS, policy.zero_epoch - 0.25)
        policy = warmup(policy, warmup_epochs=min(draw(times(0.25)), latest))
    return policy


@st.composite
def recipes(draw, rule="linear", transformations=3):
    """A source under a rule, and up to so many transformations of it, in random order."""
    source = draw(sources(momentum=None if rule.startswith("linear") else 0.0))
    train_examples = draw(st.integers(400, 1200))
    source = with_rule(source, rule, train_examples=train_examples)
    exact = rule == "linear_exact"
    policy, limit, peak = source, math.inf, source.peak_learning_rate
    kinds = ["scale", "grow_batch", "doubling_only"]
    if rule.startswith("linear"):
        kinds += ["raise_momentum", "lower_learning_rate"]
    for kind in draw(st.lists(st.sampled_from(kinds), max_size=transformations)):
        momentum = float(policy.at(0.0).hyper["momentum"][0])
        raised = draw(st.sampled_from([momentum, (1 + momentum) / 2, (4 + momentum) / 5]))
        ratio = (1 - momentum) / (1 - raised)
        if kind == "scale":
            # The exact noise scale needs every batch size below N.
            factor = draw(st.floats(1, 1 if exact and limit < math.inf else 2))
            policy, limit, peak = scale(policy, factor), limit * factor, peak * factor
        elif kind == "raise_momentum":
            policy, limit = raise_momentum(policy, raised), limit * ratio
        elif kind == "lower_learning_rate":
            policy, peak = raise_momentum(policy, raised, by="learning_rate"), peak / ratio
        elif kind == "doubling_only":
            policy = doubling_only(policy)
        else:
            largest = math.ceil(policy.stated_peak_batch_size)
            assume(largest < train_examples)
            most = draw(st.integers(largest, train_examples - 1))
            begin, end = draw(times()), draw(times(0.25))
            until = math.inf if draw(st.booleans()) else begin + end
            policy = grow_batch(policy, most, from_epoch=begin, until_epoch=until)
            limit = most
    if exact:
        limit = train_examples - 1
    # Sizes here are random; what a plan does with stated ones is another test.
    policy = dataclasses.replace(policy, stated_batch_sizes=())
    source = dataclasses.replace(source, stated_batch_sizes=())
    return Recipe(source, policy, train_examples, peak, limit)
