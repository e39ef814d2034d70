r"""The geometries in which a gradient's noise is measured: that of the optimizer is the right one.

An optimizer moves along the steepest direction of some norm, and what it gains is told by the
gradient's length in the dual norm. Let G be the expected gradient and N the noise of one example,
so that a batch of B has the gradient G + N / sqrt(B). The first-order gain of the update is at
least ||G|| - 2 E||N|| / sqrt(B) (Balles et al. 2020, for the sign). So the noise scale is the batch
size at which noise and signal are equally long, ||N||^2 / ||G||^2. Only the Euclidean one follows
from scalars, and without bias. Each is estimated from second moments, by the same two equations:

- `L2`, plain SGD: tr(S) / |G|^2. Unbiased. Memory: scalars.
- `by_group`: the same of each part of the tree. Unbiased. A scalar a group.
- `preconditioned`: of g / d, with Adam's diagonal d = sqrt(v) + eps as AdaptDL has it (Qiao et al.
  2021); or with its root, which is plain SGD in the coordinates in which Adam is. Unbiased where d
  comes from updates before; with the v of the same update it is too low by a share of 1 - b2.
  Memory: scalars.
- `SIGN`, signSGD, Lion and Signum: the dual of the largest step is l1. E|N|_1 <= sum_j sigma_j,
  where sigma_j^2 is the variance of one coordinate. Memory: a float32 copy of the parameters.
- `SPECTRAL`, Muon: the dual of the spectral norm is the nuclear one, the sum of singular values.
  E||N|| <= tr (E N N^T)^(1/2), as the root is concave. Of matrices alone: arrays of other than two
  axes count for nothing, as Muon leaves them to another optimizer. Memory: the square of each
  matrix's smaller side.

*Bias of the last two.* The moments of noise and signal, E n_j^2 and G_j^2 (or N N^T and G G^T), are
unbiased; their roots are not.
The noise: a deviation from K small batches is c4(K) sigma in the mean (normal small batches; 0.80
of it at K = 2, 0.97 at 8), which is divided away for the sign. The spectral one has K - 1 times the
longer side of addends in each moment and is left alone: it is low by about
(m + 1) / (8 (K - 1) n) of itself, m x n a matrix with m <= n; a quarter more at K = 2.
The signal: moments below 0 count as 0, and the root of what is uncertain is low. Of a coordinate
with normal gradients it is too high by at most 0.37 (K = 2: 0.48) sigma_j / sqrt(B), where there is
no signal, and too low by at most 0.33 of it, where the signal is 1.5 of it. So ||G|| is within
(1 - 0.33 r) and (1 + 0.37 r) times the true one, r = sqrt(B_noise / B). With updates as large as
the noise scale that is good to a factor of about two; where they are a hundredth of it, it is no
estimate. The length of the update's own gradient would have up to 0.80 in the place of 0.37.
Of a matrix (simulated, from 1 x 1 to 32 x 32): too low by at most 0.34, too high by at most 0.41
(K = 2: 0.50) of the noise's length / sqrt(B); less the less square it is, 0.26 of 8 x 64. Where the
signal has few directions it stays near that, however strong: the others have none.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigbatch.errors import Problem, UserError, listed
from bigbatch.noise.sums import square, wide


class Geometry(NamedTuple):
    """What is measured of gradients.

    Attributes:
      moments: of a gradient, quadratic in it: an array, or a tree of them.
      size: the squared length that moments stand for; None: they are squares themselves.
      names: of the groups, where the squares are an array of them.
      is_deviation: whether `size` is a sum of roots of single variances.
    """

    moments: Callable[[Any], Any]
    size: Callable[[Any], Any] | None = None
    names: tuple[str, ...] = ()
    is_deviation: bool = False


L2 = Geometry(square)
"""Squares of Euclidean lengths: plain SGD, and what the trainer measures."""


def preconditioned(divisor: Any) -> Geometry:
    """Squares of the gradient divided by a tree like it, such as Adam's sqrt(v) + eps."""
    return Geometry(lambda tree: square(jax.tree.map(lambda g, d: wide(g) / d, tree, divisor)))


def by_group(**patterns: str) -> Geometry:
    """Squares of each group of arrays, and of all, under the name `all`.

    A group of the norms' scales alone, `by_group(norm="norm.*scale")`, predicts the whole noise
    scale where the two are in proportion (Gray et al. 2024).

    Args:
      **patterns: by the group's name, a regular expression that is found in the array's path, as
        `jax.tree_util.keystr` writes it. An array belongs to the first group that fits. One that
        fits none belongs to `all` only.
    """

    def squares(tree: Any) -> jax.Array:
        groups: dict[str, list[Any]] = {name: [] for name in patterns}
        for path, leaf in jax.tree.leaves_with_path(tree):
            where = jax.tree_util.keystr(path)
            fits = [name for name, pattern in patterns.items() if re.search(pattern, where)]
            groups.setdefault(fits[0] if fits else "", []).append(leaf)
        empty = [name for name, leaves in groups.items() if not leaves]
        if empty:
            paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree)]
            allowed = "a regular expression that fits one of " + listed(paths)
            raise UserError(Problem(name, patterns[name], allowed) for name in empty)
        found = [square(leaves) for leaves in groups.values()]
        return jnp.stack([*found[: len(patterns)], sum(found[1:], start=found[0])])

    return Geometry(squares, names=(*patterns, "all"))


def _coordinates(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: wide(leaf) ** 2, tree)


def _sum_of_roots(moments: Any) -> jax.Array:
    roots = (jnp.sum(jnp.sqrt(jnp.maximum(leaf, 0))) for leaf in jax.tree.leaves(moments))
    return sum(roots, start=jnp.zeros(())) ** 2


SIGN = Geometry(_coordinates, _sum_of_roots, is_deviation=True)
"""Squares of l1 lengths: optimizers whose steps are signs."""


def _matrices(tree: Any) -> list[jax.Array]:
    """M M^T of each matrix, or M^T M where that is smaller."""
    sides = (wide(leaf) for leaf in jax.tree.leaves(tree) if jnp.ndim(leaf) == 2)
    return [m @ m.T if m.shape[0] <= m.shape[1] else m.T @ m for m in sides]


def _sum_of_singular_values(moments: list[jax.Array]) -> jax.Array:
    return _sum_of_roots([jnp.linalg.eigvalsh(moment) for moment in moments])


SPECTRAL = Geometry(_matrices, _sum_of_singular_values)
"""Squares of nuclear lengths, the sums of singular values: Muon."""
