"""Optimizers by name: their fields, and which hyperparameters the plan sets before each update.

What is constant over a run (weight decay, clipping, the averages' time constants) is a field here;
what may change with every update (learning rate, momentum, Adam's b1, b2 and eps) comes from the
plan. The rules themselves are in `bigbatch.engine.transformations`; Optax is imported only there.

>>> Momentum(weight_decay=5e-4).hyper_names({"learning_rate": 0, "momentum": 0})
('learning_rate', 'momentum')
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np

from bigbatch.checks import Checks
from bigbatch.errors import Problem

if typing.TYPE_CHECKING:
    import optax

# What every plan gives, whether or not an optimizer takes it.
_ALWAYS_IN_PLAN = ("learning_rate", "momentum")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What all optimizers share.

    Attributes:
      weight_decay: coefficient of the decay; each optimizer says where it enters.
      decayed: which parameters decay: "all" of them, or "kernels" only, those with two axes or
        more, which leaves out biases and the scales of norm layers.
      clip_norm: largest global norm of an update's mean gradient, before the decay; None: no limit.
      average_examples: time constant of an exponential average of the parameters, which evaluation
        then uses; in examples, so that a growing batch does not change it. None: no average.
    """

    weight_decay: float = 0.0
    decayed: Literal["all", "kernels"] = "all"
    clip_norm: float | None = None
    average_examples: float | None = None

    # Name -> default of what the plan may set; None: the plan must.
    hypers: ClassVar[Mapping[str, float | None]] = {}

    def __post_init__(self) -> None:
        checks = Checks()
        checks.number("weight_decay", self.weight_decay, "a number from 0 on", at_least=0)
        for name in ("clip_norm", "average_examples"):
            if getattr(self, name) is not None:
                checks.number(name, getattr(self, name), "a number above 0, or None", above=0)
        self.check(checks)
        checks.done()

    def check(self, checks: Checks) -> None:
        """Notes what is wrong with the fields of one optimizer."""

    def hyper_names(self, plan_hypers: Mapping[str, Any]) -> tuple[str, ...]:
        """The hyperparameters that the optimizer takes from a plan with these columns."""
        return tuple(name for name in self.hypers if name in plan_hypers)

    def initial(self) -> dict[str, float]:
        """Each hyperparameter before the first update; the plan then sets those that it has."""
        return {
            name: next(v for v in (getattr(self, name, None), default, 0.0) if v is not None)
            for name, default in self.hypers.items()
        }

    def plan_problems(self, plan_hypers: Mapping[str, np.ndarray]) -> list[Problem]:
        """What a plan sets and this optimizer cannot take, or sets as well.

        Args:
          plan_hypers: the plan's columns by name, one value an update.

        Returns:
          Problems, their fields named as in a config.
        """
        name = next(name for name, kind in OPTIMIZERS.items() if kind is type(self))
        problems = []
        if "momentum" not in self.hypers and np.any(plan_hypers["momentum"]):
            allowed = f"0 with optimizer.name = {name!r}, which has no momentum"
            given = float(np.max(plan_hypers["momentum"]))
            problems.append(Problem("policy.momentum", given, allowed, 0.0))
        for column in plan_hypers:
            if column not in self.hypers and column not in _ALWAYS_IN_PLAN:
                takers = [other for other, kind in OPTIMIZERS.items() if column in kind.hypers]
                allowed = f"an optimizer with the {column} of the policy: " + ", ".join(takers)
                problems.append(Problem("optimizer.name", name, allowed, takers[0]))
                break
        for column in self.hypers:
            if column in plan_hypers and getattr(self, column, None) is not None:
                allowed = "None, as the policy sets it"
                problems.append(Problem(f"optimizer.{column}", getattr(self, column), allowed))
        return problems

    def transformation(self) -> "optax.GradientTransformationExtraArgs":
        """The Optax transformation, its hyperparameters in its state; see `update_rules`."""
        from bigbatch.engine import transformations as update_rules

        return update_rules.make_transformation(self)


class Sgd(Optimizer):
    """w <- w - lr (gradient + weight_decay w)."""

    hypers = dict.fromkeys(["learning_rate"])


class Momentum(Optimizer):
    """Heavy ball, as in the paper: v <- m v + (gradient + weight_decay w); w <- w - lr v.

    The learning rate stands outside of the velocity, so a change of it acts at once, and needs no
    correction of the velocity (Goyal et al. 2017, section 3). A change of m keeps the velocity.
    """

    hypers = dict.fromkeys(["learning_rate", "momentum"])


class Nesterov(Optimizer):
    """v as in `Momentum`; w <- w - lr (gradient + weight_decay w + m v).

    The look-ahead in the form of Sutskever et al. 2013, as Optax has it.
    """

    hypers = Momentum.hypers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
    """Adam (Kingma and Ba 2015), the weight decay added to the gradient.

    m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; w <- w - lr m^ / (sqrt(v^) + eps), with
    m^ = m / (1 - b1^t) and v^ = v / (1 - b2^t) in update t. Where the policy moves b1 and b2, the
    correction uses those of the update, as Optax does: exact again once b2^t is small.

    Attributes:
      b1: decay of the mean; None: the policy's (transformation `adam`), or 0.9 where it has none.
      b2: decay of the mean square; None: likewise, or 0.999.
      eps: added to the root; None: likewise, or 1e-8.
    """

    b1: float | None = None
    b2: float | None = None
    eps: float | None = None

    hypers: ClassVar[Mapping[str, float | None]] = {
        "learning_rate": None,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
    }

    def check(self, checks: Checks) -> None:
        """Notes what is wrong with b1, b2 and eps."""
        for name in ("b1", "b2"):
            if getattr(self, name) is not None:
                allowed = "a number from 0 to below 1, or None"
                checks.number(name, getattr(self, name), allowed, at_least=0, below=1)
        if self.eps is not None:
            checks.number("eps", self.eps, "a number from 0 on, or None", at_least=0)


class AdamW(Adam):
    """Adam with the decay beside it (Loshchilov and Hutter 2019).

    w <- w - lr (m^ / (sqrt(v^) + eps) + weight_decay w), in the form of Optax and PyTorch, in which
    the learning rate multiplies the decay too.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lars(Optimizer):
    """LARS (You et al. 2017): each array's step in proportion to the array's norm.

    v <- m v + trust |w| / (|g| + weight_decay |w|) (g + weight_decay w); w <- w - lr v. The
    denominator is the paper's; Optax's own has |g + weight_decay w|. The paper keeps lr inside of
    the velocity, which is the same while lr is constant; outside, it needs no correction of
    the velocity when lr changes (Goyal et al. 2017, equation 10). Arrays that do not decay take
    plain heavy-ball steps, and so do those whose norm is 0.

    Attributes:
      trust_coefficient: factor on each array's ratio.
    """

    decayed: Literal["all", "kernels"] = "kernels"
    trust_coefficient: float = 0.001

    hypers = Momentum.hypers

    def check(self, checks: Checks) -> None:
        """Notes what is wrong with the trust coefficient."""
        checks.number("trust_coefficient", self.trust_coefficient, "a number above 0", above=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lamb(Adam):
    """LAMB (You et al. 2020): u = m^ / (sqrt(v^) + eps) + weight_decay w; w <- w - lr |w|/|u| u.

    b1, b2 and eps are as in `Adam`, but that eps is 1e-6 where neither it nor the policy says.
    """

    decayed: Literal["all", "kernels"] = "kernels"

    hypers: ClassVar[Mapping[str, float | None]] = {**Adam.hypers, "eps": 1e-6}


OPTIMIZERS: dict[str, type[Optimizer]] = {
    "sgd": Sgd,
    "momentum": Momentum,
    "nesterov": Nesterov,
    "adam": Adam,
    "adamw": AdamW,
    "lars": Lars,
    "lamb": Lamb,
}
