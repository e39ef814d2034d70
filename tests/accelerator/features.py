"""What features add to an update: measured noise, reproducible sums, ghost norm."""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax import linen as nn

from bigbatch.models import classification, wide_resnet
from tests.accelerator import runs

_MICROBATCH, _NOISE = "microbatch_examples_per_device", "noise_small_batch_examples"
PLAIN = "plain"
ONE_NORM = "one batch norm over the call, as Flax has it"


class PlainNorm(nn.Module):
    """Batch norm over all examples of a call: means of x and of its square, in float32."""

    ghost_batch_examples: int | None
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones_init(), x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros_init(), x.shape[-1:])
        wide = x.astype(jnp.float32)
        mean, square = jnp.mean(wide, (0, 1, 2)), jnp.mean(jnp.square(wide), (0, 1, 2))
        factor = scale * jax.lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0) + 1e-5)
        return ((wide - mean) * factor + bias).astype(x.dtype)


def variants(size: int, ghost: int) -> dict[str, dict[str, Any]]:
    """What is changed in the config, by what it is, the dearest to know first."""
    halves = [size >> k for k in range(4) if size >> k >= ghost]
    return {
        PLAIN: {},
        ONE_NORM: {},
        "reproducible": {"reproducible": True},
        f"nothing, in calls of a ghost batch of {ghost}": {_MICROBATCH: ghost},
        **{f"noise of small batches of {n}": {_NOISE: n} for n in reversed(halves)},
    }


def rows(toy: bool, _: str) -> Iterator[dict[str, Any]]:
    """A row for each: the time of an update, and over that of the plain one."""
    config, size, ghost = ("digits", 64, 32) if toy else ("cifar10", 1024, 128)
    own = {"ghost_batch_examples": ghost, "model.dtype": "float32" if toy else "bfloat16"}
    plain_s = 0.0
    tried = list(variants(size, ghost).items())
    for name, changes in tried[:3] if toy else tried:
        # Equal modules would share one task and its programs.
        classification.image_classification.cache_clear()
        norm = PlainNorm if name == ONE_NORM else wide_resnet.GhostNorm
        with mock.patch.object(wide_resnet, "GhostNorm", norm):
            run = runs.run_of(f"configs/{config}.py:decay", own | changes, [size])
        low, middle, high = runs.seconds_of(runs.bare(run), 0 if toy else 1.5)
        plain_s = plain_s or middle
        yield {
            "update": f"{size} examples, {name}",
            "ms": 1e3 * middle,
            "quartiles": f"{1e3 * low:.3g} to {1e3 * high:.3g}",
            "over plain": middle / plain_s,
        }
