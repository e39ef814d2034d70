"""Optimizers by name: their fields, and which hyperparameters the plan sets before each update.

What is constant over a run (weight decay, clipping, the averages' time constants) is a field here;
what may change with every update (learning rate, momentum, Adam's b1, b2 and eps) is an argument of
`links`, which the plan sets. They are short forms of what anyone may write: a function of
hyperparameters that gives an Optax transformation; see `bigbatch.engine.update_rule`. Optax is
imported only where a transformation is made.

>>> Momentum(weight_decay=5e-4).hyper_names({"learning_rate": 0, "momentum": 0})
('learning_rate', 'momentum')
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, Literal

import numpy as np

from bigbatch.checks import Checks
from bigbatch.errors import Problem

if typing.TYPE_CHECKING:
    import optax

    Links = tuple[optax.GradientTransformation, ...]


def arguments(function: Callable[..., Any]) -> dict[str, Any]:
    """The names of a function's arguments, each with its default or `inspect.Parameter.empty`."""
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters}


def plan_problems(
    field: str, name: str, hypers: Collection[str], plan_hypers: Mapping[str, np.ndarray]
) -> list[Problem]:
    """What a plan sets and an optimizer does not take.

    Args:
      field: of a config, or the argument, that names the optimizer.
      name: the optimizer's.
      hypers: the hyperparameters that it takes.
      plan_hypers: the plan's columns by name, one value an update.

    Returns:
      Problems, their fields named as in a config.
    """
    problems = []
    if "momentum" not in hypers and np.any(plan_hypers.get("momentum", 0)):
        allowed = f"0 with {field} = {name!r}, which takes no momentum"
        given = float(np.max(plan_hypers["momentum"]))
        problems.append(Problem("policy.momentum", given, allowed, 0.0))
    missed = [column for column in plan_hypers if column not in hypers and column != "momentum"]
    if missed:
        takers = [other for other, kind in OPTIMIZERS.items() if missed[0] in arguments(kind.links)]
        allowed = (
            f"an optimizer with the {missed[0]} of the policy among its hyperparameters, by name "
            f"{', '.join(takers) or 'none'}; this one's are {', '.join(hypers) or 'none'}"
        )
        problems.append(Problem(field, name, allowed, next(iter(takers), None)))
    return problems


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

    def links(self, *hypers: Any, **named: Any) -> "Links":
        """The rule itself, between clipping and averaging.

        Each optimizer's has its own arguments: the hyperparameters that the plan may set, with
        defaults where it need not.
        """
        raise NotImplementedError

    @property
    def name(self) -> str:
        """Its name in a config."""
        return next(name for name, kind in OPTIMIZERS.items() if kind is type(self))

    def hyper_names(self, plan_hypers: Mapping[str, Any]) -> tuple[str, ...]:
        """The hyperparameters that the optimizer takes from a plan with these columns."""
        return tuple(name for name in arguments(self.links) if name in plan_hypers)

    def plan_problems(self, plan_hypers: Mapping[str, np.ndarray]) -> list[Problem]:
        """What a plan sets and this optimizer cannot take, or sets as well.

        Args:
          plan_hypers: the plan's columns by name, one value an update.

        Returns:
          Problems, their fields named as in a config.
        """
        hypers = arguments(self.links)
        problems = plan_problems("optimizer.name", self.name, hypers, plan_hypers)
        for column in hypers:
            unset = getattr(type(self), column, None)
            if column in plan_hypers and getattr(self, column, None) != unset:
                allowed = f"{unset}, as the policy sets it"
                problems.append(Problem(f"optimizer.{column}", getattr(self, column), allowed))
        return problems

    def transformation(self) -> "optax.GradientTransformationExtraArgs":
        """The Optax transformation: clip, rule, average.

        Its state has `hyperparams`, by the names of the arguments of `links`; each is the field of
        that name, the default or 0 before the plan sets it. Its update takes `num_examples`, a
        scalar, where the optimizer averages.
        """
        import optax

        from bigbatch.engine import transformations

        clip = after = optax.identity()
        if self.clip_norm is not None:
            clip = optax.clip_by_global_norm(self.clip_norm)
        if self.average_examples is not None:
            after = transformations.average_parameters(self.average_examples)

        @functools.wraps(self.links)
        def chain(**hypers: Any) -> optax.GradientTransformation:
            return optax.chain(clip, *self.links(**hypers), after)

        unknown = (None, inspect.Parameter.empty)
        initial = {
            name: next(v for v in (getattr(self, name, None), default, 0.0) if v not in unknown)
            for name, default in arguments(self.links).items()
        }
        return optax.inject_hyperparams(chain)(**initial)

    def decays(self, params: Any) -> Any:
        """For each parameter, whether it decays: a mask for Optax."""
        import jax

        return jax.tree.map(lambda leaf: self.decayed == "all" or leaf.ndim > 1, params)

    def l2_penalty(self) -> "optax.GradientTransformation":
        """Adds the decay to the gradient."""
        import optax

        decay = self.weight_decay
        return optax.add_decayed_weights(decay, self.decays) if decay else optax.identity()


class Sgd(Optimizer):
    """w <- w - lr (gradient + weight_decay w)."""

    def links(self, learning_rate: Any) -> "Links":
        """The decay, and a step along the gradient."""
        import optax

        return self.l2_penalty(), optax.sgd(learning_rate)


class Momentum(Optimizer):
    """Heavy ball, as in the paper: v <- m v + (gradient + weight_decay w); w <- w - lr v.

    The learning rate stands outside of the velocity, so a change of it acts at once, and needs no
    correction of the velocity (Goyal et al. 2017, section 3). A change of m keeps the velocity.
    """

    looks_ahead: ClassVar[bool] = False

    def links(self, learning_rate: Any, momentum: Any) -> "Links":
        """The decay, and a step along the velocity."""
        import optax

        return self.l2_penalty(), optax.sgd(learning_rate, momentum, nesterov=self.looks_ahead)


class Nesterov(Momentum):
    """v as in `Momentum`; w <- w - lr (gradient + weight_decay w + m v).

    The look-ahead in the form of Sutskever et al. 2013, as Optax has it.
    """

    looks_ahead = True


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

    def links(self, learning_rate: Any, b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-8) -> "Links":
        """The decay, and Adam's step."""
        import optax

        return (optax.chain(self.l2_penalty(), optax.adam(learning_rate, b1, b2, eps)),)

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
    the learning rate multiplies the decay too. The policy may set `weight_decay` in place of the
    field (transformation `adam`).
    """

    def links(
        self,
        learning_rate: Any,
        b1: Any = 0.9,
        b2: Any = 0.999,
        eps: Any = 1e-8,
        weight_decay: Any = 0.0,
    ) -> "Links":
        """Optax's own."""
        import optax

        decay = {"weight_decay": weight_decay, "mask": self.decays}
        return (optax.adamw(learning_rate, b1, b2, eps, **decay),)


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

    def links(self, learning_rate: Any, momentum: Any) -> "Links":
        """The arrays' own rates, and a step along the velocity."""
        import optax

        from bigbatch.engine import transformations

        scaled = transformations.scale_by_lars(
            self.trust_coefficient, self.weight_decay, self.decays
        )
        return scaled, optax.sgd(learning_rate, momentum)

    def check(self, checks: Checks) -> None:
        """Notes what is wrong with the trust coefficient."""
        checks.number("trust_coefficient", self.trust_coefficient, "a number above 0", above=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lamb(Adam):
    """LAMB (You et al. 2020): u = m^ / (sqrt(v^) + eps) + weight_decay w; w <- w - lr |w|/|u| u.

    b1, b2 and eps are as in `Adam`, but that eps is 1e-6 where neither it nor the policy says.
    """

    decayed: Literal["all", "kernels"] = "kernels"

    def links(self, learning_rate: Any, b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-6) -> "Links":
        """Optax's own."""
        import optax

        decay = {"weight_decay": self.weight_decay, "mask": self.decays}
        return (optax.lamb(learning_rate, b1, b2, eps, **decay),)


OPTIMIZERS: dict[str, type[Optimizer]] = {
    "sgd": Sgd,
    "momentum": Momentum,
    "nesterov": Nesterov,
    "adam": Adam,
    "adamw": AdamW,
    "lars": Lars,
    "lamb": Lamb,
}
