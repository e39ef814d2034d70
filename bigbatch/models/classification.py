"""Image classification: the ready-made task of the bundled networks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from bigbatch.engine.task import Examples, PyTree, Sums, Task
from bigbatch.models.ghost_norm import GHOST_STATISTICS, RUNNING_STATISTICS


@functools.cache
def image_classification(
    module: nn.Module,
    image_shape: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    label_smoothing: float = 0.0,
) -> Task:
    """Images and labels, by a Flax module, with the cross-entropy.

    Equal arguments give the same `Task`, so that runs in one process share their programs.

    Args:
      module: maps images [examples, height, width, channels] to logits [examples, classes], with
        a keyword argument `train`.
      image_shape: height, width, channels.
      mean: of each channel over the training set, in units of the uint8 images.
      std: standard deviation, likewise.
      label_smoothing: see `cross_entropy_sums`.

    Returns:
      A task that reads `image`, uint8[examples, height, width, channels], `label`,
      int32[examples], `weight`, float32[examples], and `key`, uint32[examples, 2], where there is
      one, for the module's argument `keys`; its sums are loss, correct and count.
    """

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
        # The ghost batch is the smallest number of examples that the norm layers can take.
        ghost_batch_examples = getattr(module, "ghost_batch_examples", None) or 1
        images = jnp.zeros((ghost_batch_examples, *image_shape), jnp.float32)
        variables = module.init(key, images, train=True)
        return variables["params"], variables.get(RUNNING_STATISTICS, {})

    def apply(
        params: PyTree, running_statistics: PyTree, examples: Examples, train: bool
    ) -> tuple[jax.Array, PyTree]:
        wide = jnp.promote_types(getattr(module, "dtype", jnp.float32), jnp.float32)
        images = (examples["image"].astype(wide) - jnp.asarray(mean, wide)) / jnp.asarray(std, wide)
        keys: dict[str, Any] = {"keys": examples["key"]} if "key" in examples else {}
        logits, updated = module.apply(
            {"params": params, RUNNING_STATISTICS: running_statistics},
            images,
            train=train,
            mutable=[GHOST_STATISTICS],
            **keys,
        )
        return logits, updated.get(GHOST_STATISTICS, {})

    loss = functools.partial(cross_entropy_sums, label_smoothing=label_smoothing)
    return Task(
        init=init,
        apply=apply,
        loss=loss,
        metrics={"accuracy": "correct"},
        takes_keys=getattr(module, "dropout_rate", 0) > 0,
        is_tested=True,
    )


def cross_entropy_sums(
    logits: jax.Array, examples: Examples, *, label_smoothing: float = 0.0
) -> Sums:
    """The cross-entropy and the number of right answers, summed over weighted examples.

    Args:
      logits: [examples, classes].
      examples: `label`, int32[examples], and `weight`, [examples].
      label_smoothing: share of each label that is spread over all classes, the label's own
        included (Szegedy et al. 2016, section 7); in evaluation too.

    Returns:
      Scalars: loss (nats), correct and count, each a sum of weights times the value.
    """
    weight = examples["weight"].astype(logits.dtype)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, examples["label"])
    if label_smoothing:
        # The cross-entropy is linear in the target: (1 - s) of the label's, s of the uniform one.
        uniform = -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
        losses = (1 - label_smoothing) * losses + label_smoothing * uniform
    correct = jnp.argmax(logits, axis=-1) == examples["label"]
    return {
        "loss": jnp.sum(weight * losses),
        "correct": jnp.sum(weight * correct),
        "count": jnp.sum(weight),
    }
