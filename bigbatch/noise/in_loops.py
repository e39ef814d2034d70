"""The gradient noise in a training loop of one's own, of whatever makes its updates.

An update's gradients go by in `add`, one small batch at a time: a microbatch, or a device's share.
`measure` makes the update's measurement, `average` keeps averages of them, and `read` tells the
gradient noise scale in examples, with its standard error, or why there is none. All but `read` work
within anyone's jit, scan or shard_map; what they carry are small pytrees. No gradient is kept.

>>> params = jnp.zeros(3)
>>> gradients = jax.random.normal(jax.random.key(0), (100, 4, 3)) + 1
>>> averages = start(params)
>>> for update in gradients:
...     sums = empty(params)
...     for gradient in update:  # Means over 8 examples each.
...         sums = add(sums, gradient, examples=8, mean=True)
...     measured = measure(sums, jnp.mean(update, axis=0))
...     averages = average(averages, measured, memory_examples=3_200)
>>> {name: value for name, value in read(averages).items() if name.endswith("status")}
{'gradient_noise_status': 'ready'}

The noise scale is that of draws from a distribution. Where the updates draw a training set of N
examples without replacement and nothing in them is random, `measure` with `shares=(B / N, B / N)`
makes it that of the training set: see `gradient_noise`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bigbatch.errors import Problem, UserError
from bigbatch.noise.geometry import L2, Geometry
from bigbatch.noise.sums import small_batch_sums
from bigbatch.schedule.adaptive.gradient_noise import (
    EXAMPLES,
    MOST_FRESH,
    SMALL_BATCHES,
    SMALL_SQUARES,
    Estimate,
    Measurement,
    Smoothed,
    faded,
    is_few,
    measurement_from,
    noise_fields,
    of_examples,
    solved,
    weighted,
)

_COUNT = "count"


def empty(params: Any, geometry: Geometry = L2) -> dict[str, Any]:
    """The sums of an update before its first small batch.

    Args:
      params: like the gradients; shapes are enough.
      geometry: what is measured.
    """
    moments = jax.eval_shape(geometry.moments, params)
    zero = jnp.zeros((), jax.tree.leaves(moments)[0].dtype)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), moments)
    return {SMALL_SQUARES: zeros} | dict.fromkeys((SMALL_BATCHES, EXAMPLES, _COUNT), zero)


def add(
    sums: dict[str, Any],
    gradients: Any,
    examples: Any,
    count: Any = None,
    *,
    mean: bool = False,
    geometry: Geometry = L2,
) -> dict[str, Any]:
    """The sums with one small batch added; one of which all is masked adds nothing.

    Args:
      sums: so far.
      gradients: of the small batch's summed loss.
      examples: how many of its examples are not masked.
      count: what its loss is divided by where examples are not: tokens, or weights.
      mean: the gradients are of its mean loss, the sum divided by the count.
      geometry: what is measured.
    """
    count = examples if count is None else count
    added = small_batch_sums(gradients, jnp.asarray(examples), geometry.moments)
    factor = jnp.asarray(count) ** 2 if mean else 1
    squares = jax.tree.map(lambda leaf: leaf * factor, added[SMALL_SQUARES])
    added |= {SMALL_SQUARES: squares, EXAMPLES: examples, _COUNT: count}
    return jax.tree.map(lambda a, b: a + jnp.asarray(b, a.dtype), sums, added)


def measure(
    sums: dict[str, Any],
    mean_gradient: Any,
    *,
    geometry: Geometry = L2,
    shares: tuple[Any, Any] = (0.0, 0.0),
    axis_name: Any = None,
) -> Measurement:
    """What an update says of the noise, for `average` and for `Controller.observe`.

    Args:
      sums: of all of its small batches.
      mean_gradient: of its loss: the sum over the small batches, divided by their count.
      geometry: what is measured.
      shares: of the training set, the last two of `gradient_noise.Measurement`.
      axis_name: over which the small batches of an update lie, inside of shard_map.
    """
    if axis_name is not None:
        sums = jax.lax.psum(sums, axis_name)
    batches, examples = sums[SMALL_BATCHES], sums[EXAMPLES]

    def of(small: Any, big: Any) -> Measurement:
        return of_examples(Measurement(small, big, batches, examples, *shares), sums[_COUNT])

    found = jax.tree.map(of, sums[SMALL_SQUARES], geometry.moments(mean_gradient))
    if geometry.size is None:
        return found
    moments, structure = jax.tree.flatten(found, is_leaf=lambda m: isinstance(m, Measurement))
    pairs = zip(*map(solved, moments), strict=True)
    signal, noise = (geometry.size(jax.tree.unflatten(structure, pair)) for pair in pairs)
    if geometry.is_deviation:
        noise /= _mean_deviation(batches) ** 2
    return measurement_from(Estimate(signal, noise), batches, examples)


def _mean_deviation(samples: jax.Array) -> jax.Array:
    """c4: the mean of the standard deviation of normal samples, of which the true one is 1."""
    gammas = (jax.scipy.special.gammaln((samples - less) / 2) for less in (0, 1))
    return jnp.sqrt(2 / (samples - 1)) * jnp.exp(next(gammas) - next(gammas))


def start(params: Any, geometry: Geometry = L2) -> Smoothed:
    """The averages before the first update; arguments as of `empty`."""
    size = geometry.size or (lambda moments: moments)
    like = jax.eval_shape(lambda tree: size(geometry.moments(tree)), params)
    return Smoothed._make(jnp.zeros(like.shape, like.dtype) for _ in Smoothed._fields)


def average(averages: Smoothed, measured: Measurement, *, memory_examples: Any) -> Smoothed:
    """The averages with an update added, as `gradient_noise.smooth` does in double precision.

    Args:
      averages: so far.
      measured: by the update.
      memory_examples: how many examples an average remembers; an epoch, or a part of the run in
        which the noise changes little.
    """
    measured = jax.tree.map(jnp.asarray, measured)
    fresh = jnp.minimum(-jnp.expm1(-measured.examples / memory_examples), MOST_FRESH)
    found = solved(measured)
    held = ~is_few(measured) & jnp.isfinite(found.gradient_square) & jnp.isfinite(found.variance)
    pairs = zip(faded(averages, 1 - fresh), weighted(found, fresh), strict=True)
    return Smoothed._make(
        jnp.asarray(a + jnp.where(held, b, 0), jnp.result_type(a)) for a, b in pairs
    )


def read(averages: Smoothed, geometry: Geometry = L2) -> dict[str, Any]:
    """What the averages say, on the host: by the names of the trainer's log.

    Returns:
      `gradient_noise_scale` in examples and `gradient_noise_scale_error`, its standard error, or
      None for both, and why in `gradient_noise_status`. Of groups these by the group's name.
    """
    values = [np.asarray(value, np.float64) for value in averages]

    def told(index: Any) -> dict[str, float | str | None]:
        smoothed = Smoothed(*(float(value[index]) for value in values))
        return noise_fields(smoothed, smoothed.weight > 0)

    if not geometry.names:
        return told(())
    return {name: told(index) for index, name in enumerate(geometry.names)}


class Watched(NamedTuple):
    """The state of `watching`.

    Attributes:
      inner: of the `optax.MultiSteps`.
      sums: of the update so far.
      measured: by the last whole update.
      averages: for `read`.
    """

    inner: Any
    sums: dict[str, Any]
    measured: Measurement
    averages: Smoothed


def watching(
    multi_steps: optax.MultiSteps,
    microbatch_examples: int,
    *,
    memory_examples: float,
    geometry: Geometry = L2,
) -> optax.GradientTransformationExtraArgs:
    """An `optax.MultiSteps` that also measures the noise between its steps.

    Put before it or into it, a transformation would see the microbatches' gradients or their mean,
    and not both.

    Args:
      multi_steps: takes the mean of equal microbatches.
      microbatch_examples: in each.
      memory_examples: see `average`.
      geometry: what is measured.

    Returns:
      A transformation whose state is `Watched`; its updates are those of `multi_steps`.

    Raises:
      UserError: `multi_steps` sums its gradients.
    """
    if not getattr(multi_steps, "_use_grad_mean", True):
        raise UserError(Problem("use_grad_mean", False, "True: the mean is measured", True))

    def init(params: Any) -> Watched:
        sums, averages = empty(params, geometry), start(params, geometry)
        nothing = averages.weight
        measured = Measurement(nothing, nothing, sums[EXAMPLES], sums[EXAMPLES])
        return Watched(multi_steps.init(params), sums, measured, averages)

    def update(
        gradients: Any, state: Watched, params: Any = None, **extra: Any
    ) -> tuple[Any, Watched]:
        before = state.inner
        changes, inner = multi_steps.update(gradients, before, params, **extra)
        done = inner.gradient_step != before.gradient_step
        # Where neither counts, MultiSteps was told to skip this one.
        seen = done | (inner.mini_step != before.mini_step)
        sums = add(state.sums, gradients, microbatch_examples, mean=True, geometry=geometry)
        sums = jax.tree.map(lambda new, old: jnp.where(seen, new, old), sums, state.sums)

        def whole() -> tuple[Any, ...]:
            mean = jax.tree.map(
                lambda kept, new: kept + (new - kept) / (before.mini_step + 1),
                before.acc_grads,
                gradients,
            )
            measured = measure(sums, mean, geometry=geometry)
            averages = average(state.averages, measured, memory_examples=memory_examples)
            return jax.tree.map(jnp.zeros_like, sums), measured, averages

        kept = jax.lax.cond(done, whole, lambda: (sums, state.measured, state.averages))
        return changes, Watched(inner, *kept)

    return optax.GradientTransformationExtraArgs(init, update)
