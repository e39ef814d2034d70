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


def exact_noise_scale(
    learning_rate: ArrayLike, batch_size: ArrayLike, momentum: ArrayLike, train_examples: int
) -> Array:
    """Exact noise scale lr / (1 - m) * (N/B - 1); 0 when the batch is the whole training set.

    Arguments and result as in `noise_scale`, of which it is the part 1 - B/N.
    """
    remaining = 1 - np.asarray(batch_size, np.float64) / train_examples
    return noise_scale(learning_rate, batch_size, momentum, train_examples) * remaining


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
      moves_adam: also 1-b1 and 1-b2 times k, eps divided by sqrt(k).
      train_examples: N where the rule is exact, else None.
    """

    name: str
    learning_rate_power: float
    growth_power: float
    moves_adam: bool = False
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
        if self.moves_adam:
            for name in ("b1", "b2"):
                moved[name] = 1 - k * (1 - hyper[name])
                # 1 - 20 * (1 - 0.95) is not quite 0.
                moved[name] = np.where(np.abs(moved[name]) < 1e-12, 0.0, moved[name])
            moved["eps"] = hyper["eps"] / np.sqrt(k)
        return moved

    def kept(self, hyper: Mapping[str, Array], batch_size: Array, train_examples: int) -> Array:
        """What the rule keeps, reported as the noise scale: lr/(1-m) (N/x)^learning_rate_power.

        For the linear rules this is the paper's g.
        """
        share = (train_examples / self.measure(batch_size)) ** self.learning_rate_power
        return hyper["learning_rate"] / (1 - hyper["momentum"]) * share


LINEAR = Rule("linear", learning_rate_power=1, growth_power=1)
"""lr ~ B (Smith et al. 2018; Goyal et al. 2017): the paper's rule, and the default."""

SQUARE_ROOT = Rule("square_root", learning_rate_power=0.5, growth_power=2, moves_adam=True)
"""Adam's rule (Malladi et al. 2022): with B -> kB also lr sqrt(k), 1-b1 and 1-b2 times k and
eps/sqrt(k). A learning rate divided by d is then a batch size multiplied by d^2."""

SEESAW = Rule("seesaw", learning_rate_power=0.5, growth_power=1)
"""Seesaw (2025): where the learning rate would be divided by d, divide it by sqrt(d) and multiply
the batch size by d. Keeps lr/sqrt(B); more growth than this is unstable."""


def make_rule(name: str, train_examples: int | None = None) -> Rule:
    """The rule of that name: "linear", "linear_exact", "square_root" or "seesaw".

    Args:
      name: one of `RULE_NAMES`.
      train_examples: N, which "linear_exact" needs.
    """
    if name == "linear_exact":
        return dataclasses.replace(LINEAR, name=name, train_examples=train_examples)
    return {rule.name: rule for rule in (LINEAR, SQUARE_ROOT, SEESAW)}[name]


RULE_NAMES = ("linear", "linear_exact", "square_root", "seesaw")
