"""Language models: the ready-made task of the transformer, next tokens with the cross-entropy."""

import functools
import math

import jax
import jax.numpy as jnp

from bigbatch.engine.task import Examples, Sums, Task
from bigbatch.models import TransformerConfig

# Logits of so many tokens at most are in memory at a time.
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
      chunk_tokens: of the vocabulary, at most so many at a time.
    """
    vocabulary, width = output.shape
    chunks = -(-vocabulary // chunk_tokens)
    size = -(-vocabulary // chunks)
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)

    def of_chunk(rows: jax.Array, first: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """The log of the sum of its logits' exponentials, and the target's logit or 0."""
        logits = jnp.einsum("...d,vd->...v", hidden, rows, preferred_element_type=dtype)
        tokens = first + jnp.arange(size)
        logits = jnp.where(tokens < vocabulary, logits, -jnp.inf)
        own = jnp.where(tokens == targets[..., None], logits, 0)
        return jax.nn.logsumexp(logits, axis=-1), jnp.sum(own, axis=-1)

    if chunks == 1:
        total, own = of_chunk(output, 0)
        return total - own
    rows = jnp.pad(output, ((0, chunks * size - vocabulary), (0, 0))).reshape(chunks, size, width)
    each = jax.checkpoint(lambda chunk: of_chunk(*chunk), prevent_cse=False)
    totals, owns = jax.lax.map(each, (rows, size * jnp.arange(chunks)))
    return jax.nn.logsumexp(totals, axis=0) - jnp.sum(owns, axis=0)
