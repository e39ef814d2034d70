"""A decoder-only transformer of today's kind, in Flax NNX.

Blocks that normalise what they read and add to what they were given (pre-norm; RMSNorm: Zhang and
Sennrich 2019), rotary positions (Su et al. 2021), queries and keys normalised in each head (Henry
et al. 2020; Dehghani et al. 2023), SwiGLU (Shazeer 2020) or GELU, no biases. Matrices are 2-D, as
Muon takes them.

Norms, the attention's softmax and the angles are computed in float32 at least.
"""

import functools
import importlib.util
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bigbatch.engine.layers import all_examples, devices_together, own_examples, whole
from bigbatch.errors import Problem, UserError
from bigbatch.models import TransformerConfig

# Shapes, and the axes along which devices that compute together have a part each.
_Arrays = tuple[tuple[tuple[int, ...], int | None], ...]
_ROTARY_BASE = 10_000.0
_EPSILON = 1e-6
# Its attention takes 16 bits only, and sizes of heads that are multiples of 8.
_HAS_CUDNN = any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))


class Transformer(nnx.Module):
    """Tokens -> hidden states, and the matrix that makes logits of them.

    Kernels begin with variance 1 / inputs; those that end a branch with that over 2 layers, so that
    the sum of all branches does not grow with the depth (Radford et al. 2019). Embeddings begin
    with variance 1 / width and are read times sqrt(width): hidden states are of order 1, and so are
    logits. Where embeddings are the output matrix too, the last norm begins at 1 / sqrt(width), and
    logits at that: else each token would begin by expecting itself.
    """

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.config = config
        begin = nnx.initializers.normal(config.width**-0.5)
        shape, dtype = (config.vocabulary, config.width), _param_dtype(config)
        self.embedding = nnx.Param(begin(rngs.params(), shape, dtype))
        if not config.tied:
            self.output = nnx.Param(begin(rngs.params(), shape, dtype))
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        scale = config.width**-0.5 if config.tied else 1.0
        self.norm = _norm(config.width, config, rngs, scale)

    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What is to be known of the next tokens.

        Args:
          tokens: whole numbers [examples, sequence + 1], the last of which are targets only.

        Returns:
          Hidden states, [examples, sequence, width], and the output matrix, [vocabulary, width],
          both of the config's dtype.
        """
        config = self.config
        vocabulary = config.vocabulary, config.width
        embedding = whole(self.embedding[...], vocabulary)
        # The gradients of a frequent token are summed in the parameters' dtype.
        x = embedding[tokens[:, :-1].astype(jnp.int32)].astype(config.dtype)
        x *= math.sqrt(config.width)
        rotation = _rotation(x.shape[1], config)
        model = devices_together()
        if config.heads % model or config.inner_width % model:
            allowed = f"a divisor of {config.heads} heads and of {config.inner_width} features"
            raise UserError(Problem("shard", f"{model} devices as 'model'", allowed))
        # The module is split, as `nnx.remat` would write to its variables.
        call = jax.checkpoint(_called, static_argnums=(0, 1)) if config.remat else _called
        arrays = _block_arrays(config)
        for block in self.blocks:
            graphdef, state = nnx.split(block)
            x = call(arrays, graphdef, state, x, rotation)
        x = _called((((config.width,), None),), *nnx.split(self.norm), x)
        if config.tied:
            return x, embedding.astype(config.dtype)
        return x, whole(self.output[...], vocabulary, config.dtype)


class Block(nnx.Module):
    """Attention to what came before, then a perceptron; each adds to its input.

    Where devices compute it together, each has some of the heads and of the inner features.
    """

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.config = config
        width, inner = config.width, config.inner_width
        ends = nnx.initializers.variance_scaling(0.5 / config.layers, "fan_in", "normal")
        norm = functools.partial(_norm, config=config, rngs=rngs)
        matrix = functools.partial(
            nnx.Linear,
            use_bias=False,
            dtype=config.dtype,
            param_dtype=_param_dtype(config),
            kernel_init=nnx.initializers.variance_scaling(1.0, "fan_in", "normal"),
            rngs=rngs,
        )
        self.attention_norm, self.inner_norm = norm(width), norm(width)
        self.query, self.key, self.value = (matrix(width, width) for _ in range(3))
        self.attended = matrix(width, width, kernel_init=ends)
        if config.qk_norm:
            self.query_norm, self.key_norm = (norm(width // config.heads) for _ in range(2))
        self.up = matrix(width, inner)
        if config.activation == "swiglu":
            self.gate = matrix(width, inner)
        self.down = matrix(inner, width, kernel_init=ends)

    def __call__(self, x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Hidden states [examples, sequence, width] after the block."""
        config = self.config
        normed = all_examples(self.attention_norm(x))
        positions = normed.shape[:2]
        heads = (*positions, -1, config.width // config.heads)
        query, key, value = (f(normed).reshape(heads) for f in (self.query, self.key, self.value))
        if config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = _rotated(query, rotation), _rotated(key, rotation)
        attended = _attention(query, key, value).reshape(*positions, -1)
        x = x + own_examples(self.attended(attended))
        normed = all_examples(self.inner_norm(x))
        if config.activation == "swiglu":
            inner = nnx.silu(self.gate(normed)) * self.up(normed)
        else:
            inner = nnx.gelu(self.up(normed))
        return x + own_examples(self.down(inner))


def _called(arrays: _Arrays, graphdef: Any, state: Any, *inputs: Any) -> jax.Array:
    """What a module makes of its input; its parameters are whole, or this device's, while it does.

    Matrices travel in the dtype that they are multiplied in. Norms are computed in float32.
    """
    leaves, structure = jax.tree.flatten(state)
    leaves = [
        whole(leaf, shape, inputs[0].dtype if len(shape) > 1 else None, together)
        for leaf, (shape, together) in zip(leaves, arrays, strict=True)
    ]
    result: jax.Array = nnx.merge(graphdef, jax.tree.unflatten(structure, leaves))(*inputs)
    return result


@functools.cache
def _block_arrays(config: TransformerConfig) -> _Arrays:
    """Of a block's parameters, in the order of its state."""
    block = nnx.eval_shape(lambda: Block(config, nnx.Rngs(0)))
    of_heads_and_features = {"attended": 0, "down": 0} | dict.fromkeys(
        ("query", "key", "value", "gate", "up"), 1
    )
    return tuple(
        (leaf.shape, of_heads_and_features.get(path[0].key))
        for path, leaf in jax.tree.leaves_with_path(nnx.state(block))
    )


def _attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """What each position takes of the values up to its own, [examples, sequence, heads, size]."""
    if query.dtype == jnp.float64:
        # JAX's own takes the softmax in float32, whatever it is given.
        scores = jnp.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(query.shape[-1])
        scores = jnp.where(jnp.tri(query.shape[1], dtype=bool), scores, -jnp.inf)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), value)
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    if query.dtype != jnp.bfloat16 or query.shape[-1] % 8 or not _HAS_CUDNN:
        return attend(query, key, value)
    # For which devices is known when the program is: they need not be this machine's.
    fast = functools.partial(attend, implementation="cudnn")
    result: jax.Array = jax.lax.platform_dependent(query, key, value, cuda=fast, default=attend)
    return result


def _param_dtype(config: TransformerConfig) -> Any:
    return jnp.promote_types(config.dtype, jnp.float32)


def _norm(
    features: int, config: TransformerConfig, rngs: nnx.Rngs, scale: float = 1.0
) -> nnx.RMSNorm:
    kinds = {"dtype": config.dtype, "param_dtype": _param_dtype(config)}
    begin = nnx.initializers.constant(scale)
    return nnx.RMSNorm(features, epsilon=_EPSILON, scale_init=begin, **kinds, rngs=rngs)


def _rotation(length: int, config: TransformerConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the angles, [sequence, 1, half of a head], in float32 at least."""
    half = config.width // config.heads // 2
    angles = np.arange(length)[:, None] * _ROTARY_BASE ** (-np.arange(half) / half)
    dtype = _param_dtype(config)
    return jnp.asarray(np.cos(angles)[:, None], dtype), jnp.asarray(np.sin(angles)[:, None], dtype)


def _rotated(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """[..., sequence, heads, size] turned by position, in planes of one axis of each half."""
    cos, sin = rotation
    first, second = jnp.split(x, 2, axis=-1)
    turned = first * cos - second * sin, first * sin + second * cos
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
