"""The optimizers' rules: Optax's own, chained, with hyperparameters that are traced scalars.

The hyperparameters live in the optimizer's state (`optax.inject_hyperparams`), where
`step.apply_update` replaces them before each update: another value is no other program.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bigbatch.engine import optimizer as optimizers

PyTree = Any


@functools.cache
def make_transformation(
    optimizer: optimizers.Optimizer,
) -> optax.GradientTransformationExtraArgs:
    """The transformation of an optimizer: clip, decay, rule, average.

    Args:
      optimizer: its fields.

    Returns:
      An Optax transformation. Its state has `hyperparams`, by the names of `optimizer.hypers`;
      its update takes `num_examples`, a scalar, where the optimizer averages. Equal arguments give
      the same object, so that runs in one process share their programs.
    """
    decay, mask = optimizer.weight_decay, decays(optimizer)
    l2_penalty = optax.add_decayed_weights(decay, mask) if decay else optax.identity()
    before = optax.identity()
    if optimizer.clip_norm is not None:
        before = optax.clip_by_global_norm(optimizer.clip_norm)
    after = optax.identity()
    if optimizer.average_examples is not None:
        after = average_parameters(optimizer.average_examples)

    def plain(learning_rate: Any) -> optax.GradientTransformation:
        return optax.chain(before, l2_penalty, optax.sgd(learning_rate), after)

    def heavy_ball(learning_rate: Any, momentum: Any) -> optax.GradientTransformation:
        nesterov = isinstance(optimizer, optimizers.Nesterov)
        move = optax.sgd(learning_rate, momentum, nesterov=nesterov)
        return optax.chain(before, l2_penalty, move, after)

    def lars(learning_rate: Any, momentum: Any) -> optax.GradientTransformation:
        assert isinstance(optimizer, optimizers.Lars)
        scaled = scale_by_lars(optimizer.trust_coefficient, decay, mask)
        return optax.chain(before, scaled, optax.sgd(learning_rate, momentum), after)

    def adam(learning_rate: Any, b1: Any, b2: Any, eps: Any) -> optax.GradientTransformation:
        if isinstance(optimizer, optimizers.Lamb):
            move = optax.lamb(learning_rate, b1, b2, eps, weight_decay=decay, mask=mask)
        elif isinstance(optimizer, optimizers.AdamW):
            move = optax.adamw(learning_rate, b1, b2, eps, weight_decay=decay, mask=mask)
        else:
            move = optax.chain(l2_penalty, optax.adam(learning_rate, b1, b2, eps))
        return optax.chain(before, move, after)

    rule: Any = heavy_ball
    if isinstance(optimizer, optimizers.Adam):
        rule = adam
    elif isinstance(optimizer, optimizers.Lars):
        rule = lars
    elif isinstance(optimizer, optimizers.Sgd):
        rule = plain
    return optax.inject_hyperparams(rule)(**optimizer.initial())


def decays(optimizer: optimizers.Optimizer) -> Any:
    """A function for Optax: parameters -> True where the weight decays."""
    if optimizer.decayed == "all":
        return lambda params: jax.tree.map(lambda leaf: True, params)
    return lambda params: jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, params)


def scale_by_lars(
    trust_coefficient: float, weight_decay: float, mask: Any
) -> optax.GradientTransformation:
    """Adds the decay and scales each array by LARS's local learning rate.

    trust |w| / (|g| + weight_decay |w|), equation 6 of You et al. 2017.

    Args:
      trust_coefficient: the paper's eta.
      weight_decay: coefficient of the L2 penalty.
      mask: parameters -> True for the arrays to decay and scale; the others pass unchanged.
    """

    def scaled(gradient: jax.Array, param: jax.Array, applies: bool) -> jax.Array:
        if not applies:
            return gradient
        param_norm = jnp.linalg.norm(param.ravel())
        denominator = jnp.linalg.norm(gradient.ravel()) + weight_decay * param_norm
        defined = (param_norm > 0) & (denominator > 0)
        ratio = trust_coefficient * param_norm / jnp.where(defined, denominator, 1)
        return jnp.where(defined, ratio, 1) * (gradient + weight_decay * param)

    def update(updates: PyTree, params: PyTree) -> PyTree:
        return jax.tree.map(scaled, updates, params, mask(params))

    return optax.stateless(update)


class Average(NamedTuple):
    """State of `average_parameters`.

    Attributes:
      average: like the parameters.
      weight: of the updates in the average, from 0 to 1: 1 - the product of all the decays.
    """

    average: PyTree
    weight: jax.Array


def average_parameters(average_examples: float) -> optax.GradientTransformationExtraArgs:
    """Keeps an exponential average of the parameters, forgetting by examples and not by updates.

    An update of n examples multiplies what was there by d = exp(-n / average_examples), so the
    average spans the same part of an epoch at every batch size. It is divided by its weight, as in
    Adam, so that it starts at the parameters after the first update.

    Args:
      average_examples: the time constant, above 0.

    Returns:
      The last link of a chain: it changes no update. Its update needs `num_examples`, a scalar.
    """

    def init(params: PyTree) -> Average:
        dtype = optax.tree.dtype(params, "highest")
        return Average(jax.tree.map(jnp.asarray, params), jnp.zeros((), dtype))

    def update(
        updates: PyTree, state: Average, params: PyTree = None, *, num_examples: Any, **_: Any
    ) -> tuple[PyTree, Average]:
        fresh = -jnp.expm1(-jnp.asarray(num_examples, state.weight.dtype) / average_examples)
        weight = fresh + (1 - fresh) * state.weight
        params = optax.apply_updates(params, updates)
        average = optax.incremental_update(params, state.average, fresh / weight)
        return updates, Average(average, weight)

    return optax.GradientTransformationExtraArgs(init, update)


def evaluation_params(params: PyTree, optimizer_state: optax.OptState) -> PyTree:
    """The average of the parameters where the optimizer keeps one, else the parameters."""
    parts = jax.tree.leaves(optimizer_state, is_leaf=lambda part: isinstance(part, Average))
    averages = [part.average for part in parts if isinstance(part, Average)]
    return jax.tree.map(in_shape_of, averages[0], params) if averages else params


def in_shape_of(array: jax.Array, like: Any) -> jax.Array:
    """An array that was made flat and padded, in the shape and dtype that it had.

    Args:
      array: the elements in order, and more or none after them.
      like: has that `shape`, `size` and `dtype`.
    """
    if array.shape == like.shape:
        return array
    return array.ravel()[: like.size].reshape(like.shape).astype(like.dtype)
