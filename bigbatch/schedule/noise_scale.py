r"""The noise scale of stochastic gradient descent, and the rules that keep it.

Smith et al. 2018 ("Don't Decay the Learning Rate, Increase the Batch Size", arXiv 1711.00489)
describe the random fluctuations of heavy-ball SGD (v <- m v + grad, w <- w - lr v) by one number,

    g = lr / (1 - m) * (N / B - 1),        about  lr * N / (B * (1 - m))  for B << N,

with N training examples, batch size B and momentum m. Two recipes with equal g at every epoch
train alike, so a learning rate that falls can be exchanged for a batch size that grows.

Both forms are one: with x(B) = B / (1 - B/N) the exact g is lr N / (x (1 - m)). Every formula below
is written in x, which is B itself unless the rule is exact.

>>> round(float(noise_scale(0.1, 128, 0.9, train_examples=50_000)), 6)
390.625
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def noise_scale(
    learning_rate: ArrayLike, batch_size: ArrayLike, momentum: ArrayLike, train_examples: int
) -> Array:
    """Approximate noise scale lr N / (B (1 - m)), the project's default.

    Args:
      learning_rate: any shape.
      batch_size: examples per update; broadcasts with the others.
      momentum: heavy-ball coefficient; 0 for Adam, whose b1 is an average.
      train_examples: size N of the training set.

    Returns:
      float64, the broadcast shape.
    """
    return (
        np.asarray(learning_rate, np.float64)
        * train_examples
        / (np.asarray(batch_size, np.float64) * (1 - np.asarray(momentum, np.float64)))
    )


@dataclasses.dataclass(frozen=True)
class Rule:
    """How hyperparameters follow the batch size so that training per example stays the same.

    A rule states two powers. Moving from batch size B to B' multiplies the learning rate by
    k^learning_rate_power, with k = x(B')/x(B). Undoing a decay of the learning rate by a factor d
    multiplies x(B) by d^growth_power. What it keeps is lr / (1 - m) * (N/x)^learning_rate_power.

    Attributes:
      name: as in a config.
      learning_rate_power: 1 or 1/2.
      growth_power: 1 or 2.
      evidence: where it comes from, and where what was shown of it ends.
      floors: of Adam's b1 and b2, by name: with one 1-b is multiplied by k, until b is at its floor
        or below, where it is held; without one b does not move.
      moves_eps: whether Adam's eps is divided by sqrt(k).
      keeps_time_constant: whether `weight_decay` is multiplied by k^(1 - learning_rate_power), so
        that the time constant B/(lr weight_decay) of AdamW's decay stays the same in examples.
      train_examples: N where the rule is exact, else None.
    """

    name: str
    learning_rate_power: float
    growth_power: float
    evidence: str
    floors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    moves_eps: bool = False
    keeps_time_constant: bool = False
    train_examples: int | None = None

    def measure(self, batch_size: Array) -> Array:
        """x(B), the batch size in the units in which the rule is a power law."""
        if self.train_examples is None:
            return batch_size
        return batch_size * self.train_examples / (self.train_examples - batch_size)

    def grow(self, batch_size: Array, decay: Array) -> Array:
        """The batch size that stands for a learning rate divided by `decay` (at least 1)."""
        x = self.measure(batch_size) * decay**self.growth_power
        return x if self.train_examples is None else 1 / (1 / x + 1 / self.train_examples)

    def move(
        self, hyper: Mapping[str, Array], batch_size: Array, new_batch_size: Array
    ) -> dict[str, Array]:
        """The hyperparameters at `new_batch_size` that keep what the rule keeps.

        Args:
          hyper: columns by name at `batch_size`.
          batch_size: examples per update, real-valued.
          new_batch_size: the same shape.

        Returns:
          New columns; those that the rule leaves alone are the given ones.
        """
        k = self.measure(new_batch_size) / self.measure(batch_size)
        moved = dict(hyper)
        moved["learning_rate"] = hyper["learning_rate"] * k**self.learning_rate_power
        for name in self.floors:
            moved[name] = 1 - k * (1 - hyper[name])
        if self.moves_eps:
            moved["eps"] = hyper["eps"] / np.sqrt(k)
        if self.keeps_time_constant:
            decay = hyper["weight_decay"] * k ** (1 - self.learning_rate_power)
            moved["weight_decay"] = decay
        return moved

    def capped(self, hyper: Mapping[str, Array]) -> dict[str, Array]:
        """The hyperparameters with b1 and b2 at their floors or above.

        `move` knows no floors, so that it may be applied again to what it gave.
        """
        floored = {name: np.maximum(hyper[name], floor) for name, floor in self.floors.items()}
        return {**hyper, **floored}

    def kept(self, hyper: Mapping[str, Array], batch_size: Array, train_examples: int) -> Array:
        """What the rule keeps, reported as the noise scale: lr/(1-m) (N/x)^learning_rate_power.

        For the linear rules this is the paper's g.
        """
        share = (train_examples / self.measure(batch_size)) ** self.learning_rate_power
        return hyper["learning_rate"] / (1 - hyper["momentum"]) * share


LINEAR = Rule(
    "linear",
    learning_rate_power=1,
    growth_power=1,
    evidence="lr ~ B (Smith et al. 2018; Goyal et al. 2017), for SGD and momentum up to about a "
    "tenth of the training set; with Adam the paper has it for one network, and no more is known",
)
"""The paper's rule, and the default."""

SQUARE_ROOT = Rule(
    "square_root",
    learning_rate_power=0.5,
    growth_power=2,
    evidence="lr ~ sqrt(B), 1-b1 and 1-b2 ~ B, eps ~ 1/sqrt(B) (Malladi et al. 2022), an "
    "approximation for small 1-b1 and 1-b2 where noise outweighs the gradient. Beyond its "
    "evidence: b1 or b2 held, and a decay of lr by d turned into growth by d^2, for Seesaw's paper "
    "finds that a batch that grows by more than the square of lr's cut diverges",
    moves_eps=True,
)
"""Adam's rule. A learning rate divided by d is then a batch size multiplied by d^2."""

SEESAW = Rule(
    "seesaw",
    learning_rate_power=0.5,
    growth_power=1,
    evidence="lr/sqrt(d) and B d for a decay of lr by d, b1, b2 and eps held (Meterez et al. 2025, "
    "arXiv 2510.14717), shown with AdamW for 150M to 600M parameters at 20 tokens a parameter from "
    "the critical batch size on; weight decay hardly mattered there",
)
"""Keeps lr/sqrt(B) where B changes alone; more growth than this is unstable."""

MUON = dataclasses.replace(
    SEESAW,
    name="muon",
    evidence="lr ~ sqrt(B), and growth as in Seesaw, momentum held: believed. Practice scales "
    "Muon's lr (Jordan et al. 2024) so between runs of fixed batch size (marin #1565); nothing is "
    "published for a batch that grows. Its critical batch size is larger than AdamW's; in its own "
    "geometry (arXiv 2602.03001) the noise scale is another than the one measured here",
)
"""For spectral steps, whose size the gradient's does not change."""

SIGN = dataclasses.replace(
    SEESAW,
    name="sign",
    evidence="lr ~ sqrt(B), and growth as in Seesaw, b1 and b2 held: believed, from the model of a "
    "sign under noise (Li et al. 2024, arXiv 2405.14578), in which the best lr falls again once "
    "the batch size has passed the noise scale",
)
"""For Lion, Signum and other steps by signs."""

RULES = {
    rule.name: rule
    for rule in (
        LINEAR,
        dataclasses.replace(LINEAR, name="linear_exact"),
        SQUARE_ROOT,
        SEESAW,
        MUON,
        SIGN,
    )
}
"""By the name that a config gives them."""


def make_rule(name: str, train_examples: int | None = None) -> Rule:
    """The rule of that name.

    Args:
      name: one of `RULES`.
      train_examples: N, which "linear_exact" needs.
    """
    exact = train_examples if name == "linear_exact" else None
    return dataclasses.replace(RULES[name], train_examples=exact)
