"""What Optax does not have of the optimizers, and what is read from any optimizer's state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

PyTree = Any


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
        param_norm = jnp.linalg.norm(param)
        denominator = jnp.linalg.norm(gradient) + weight_decay * param_norm
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


def kept_averages(optimizer_state: optax.OptState) -> list[Any]:
    """The parts of a state that know which parameters to evaluate with, wherever they are in it."""
    kinds = (Average, optax.contrib.ScheduleFreeState)
    parts = jax.tree.leaves(optimizer_state, is_leaf=lambda part: isinstance(part, kinds))
    return [part for part in parts if isinstance(part, kinds)]


def evaluation_params(optimizer_state: optax.OptState, params: PyTree) -> PyTree:
    """The parameters' averages where the optimizer keeps them, else the parameters.

    Args:
      optimizer_state: with any number of `Average` and of Optax's `ScheduleFreeState`, each for all
        parameters or, in `optax.multi_transform` or `optax.masked`, for some of them.
      params: those that were trained.
    """
    for kept in kept_averages(optimizer_state):

        def evaluated(average: Any, param: PyTree, kept: Any = kept) -> PyTree:
            if isinstance(average, optax.MaskedNode):
                return param
            if isinstance(kept, Average):
                return average
            return optax.contrib.schedule_free_eval_params(kept._replace(z=average), param)

        averages = kept.average if isinstance(kept, Average) else kept.z
        is_masked = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
        params = jax.tree.map(evaluated, averages, params, is_leaf=is_masked)
    return params
