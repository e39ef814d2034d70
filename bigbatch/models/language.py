"""Language models: the ready-made task of the transformer, next tokens with the cross-entropy."""

import functools
import math

import jax
import jax.numpy as jnp

from bigbatch.engine.task import Examples, Sums, Task
from bigbatch.models import TransformerConfig

# Logits of about so many tokens are in memory at a time.
_CHUNK_TOKENS = 8_192
# exp of more is no float.
_LARGEST_LOSS = 700.0


@functools.cache
def language_model(config: TransformerConfig) -> Task:
    """Sequences of tokens, by the transformer.

    Equal configs give the same `Task`, so that runs in one process share their programs.

    Returns:
      A task that reads `tokens`, whole numbers [examples, sequence + 1], and `mask`, bool[examples,
      sequence], where there is one: which tokens have a target. Its sums are loss (nats) and count
      (targets), its metric is the perplexity.
    """
    from bigbatch.models.transformer import Transformer

    return Task.from_nnx(
        lambda rngs: Transformer(config, rngs),
        next_token_sums,
        metrics={"perplexity": lambda means: math.exp(min(means["loss"], _LARGEST_LOSS))},
        is_tested=True,
    )


def next_token_sums(outputs: tuple[jax.Array, jax.Array], examples: Examples) -> Sums:
    """The cross-entropy of the tokens that have a target, summed, and their number.

    Args:
      outputs: hidden states [examples, sequence, width] and the output matrix [vocabulary, width].
      examples: `tokens` and `mask`, as in `language_model`; `weight`, [examples].
    """
    losses = cross_entropy(*outputs, examples["tokens"][:, 1:].astype(jnp.int32))
    weight = examples["weight"][:, None] * examples.get("mask", jnp.ones_like(losses))
    weight = weight.astype(losses.dtype)
    losses = jnp.where(weight > 0, weight * losses, 0)
    return {"loss": jnp.sum(losses), "count": jnp.sum(weight)}


def cross_entropy(
    hidden: jax.Array, output: jax.Array, targets: jax.Array, chunk_tokens: int = _CHUNK_TOKENS
) -> jax.Array:
    """The cross-entropy of targets, in nats, in float32 at least.

    A large vocabulary is gone through in chunks, in the gradient too, which computes their logits
    again: those of the whole vocabulary are never in memory.

    Args:
      hidden: [..., width].
      output: [vocabulary, width]; logits are products of the two.
      targets: int32[...].
      chunk_tokens: of the vocabulary, about so many at a time.
    """
    vocabulary, width = output.shape
    chunks = -(-vocabulary // chunk_tokens)
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)

    def of_chunk(rows: jax.Array, first: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """The log of the sum of its logits' exponentials, and the target's logit or 0."""
        logits = _logits(hidden, rows)
        tokens = first + jnp.arange(len(rows))
        # By products and sums: XLA takes the branches of a choice out of the loop, in full size.
        own = jnp.sum(logits * (tokens == targets[..., None]), axis=-1)
        beyond = jnp.where(tokens < vocabulary, jnp.zeros((), dtype), -jnp.inf)
        return jax.nn.logsumexp(logits + beyond, axis=-1), own

    if chunks == 1:
        total, own = of_chunk(output, 0)
        return total - own
    # Products of matrices whose sides are multiples of 8 are faster on GPUs.
    size = -(-vocabulary // (8 * chunks)) * 8
    chunks = -(-vocabulary // size)
    rows = jnp.pad(output, ((0, chunks * size - vocabulary), (0, 0))).reshape(chunks, size, width)
    each = jax.checkpoint(lambda chunk: of_chunk(*chunk), prevent_cse=False)
    totals, owns = jax.lax.map(each, (rows, size * jnp.arange(chunks)))
    return jax.nn.logsumexp(totals, axis=0) - jnp.sum(owns, axis=0)


@jax.custom_vjp
def _logits(hidden: jax.Array, rows: jax.Array) -> jax.Array:
    """Products [..., rows] in float32 at least; their gradient is used in the dtype of the inputs.

    Left alone, both products of the gradient would be of float32 numbers.
    """
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.einsum("...d,vd->...v", hidden, rows, preferred_element_type=dtype)


def _logits_backward(
    inputs: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    hidden, rows = inputs
    gradient = gradient.astype(hidden.dtype)
    by_hidden = jnp.einsum("...v,vd->...d", gradient, rows)
    return by_hidden, jnp.einsum("...v,...d->vd", gradient, hidden)


_logits.defvjp(lambda hidden, rows: (_logits(hidden, rows), (hidden, rows)), _logits_backward)
