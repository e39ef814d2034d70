"""Whether the card computes what a CPU does in float64."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bigbatch as bb
from bigbatch.data import sets
from bigbatch.engine import exact_sums, functions
from bigbatch.models.classification import image_classification
from bigbatch.models.ghost_norm import GhostNorm
from bigbatch.models.wide_resnet import WideResNet

GHOST = 32


def rows(toy: bool, _: str) -> Iterator[dict[str, Any]]:
    """What was compared, how far apart the two are, and how far they may be."""
    yield from _updates(4 if toy else 20)
    yield from _ghost_norm()
    yield from _exact_sums(2**10 if toy else 2**16)
    yield from _bfloat16()


def _row(what: str, difference: float, limit: float) -> dict[str, Any]:
    return {"what": what, "difference": difference, "limit": limit, "ok": difference <= limit}


def _distance(found: Any, true: Any) -> float:
    """The largest relative distance of two trees' arrays, by their norms."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(true), strict=True)
    pairs = [(np.float64(a), np.float64(b)) for a, b in pairs]
    return max(float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12)) for a, b in pairs)


def _task(dtype: Any) -> bb.Task:
    info = sets.info("digits")
    network = WideResNet(10, 1, 10, GHOST, strides=(1, 2, 1), dtype=jnp.dtype(dtype))
    return image_classification(network, info.image_shape, info.mean, info.std)


def _trained(dtype: Any, device: jax.Device, updates: int, initial: Any) -> Any:
    """The parameters after some updates of 64 digits on one device."""
    data = sets.load("digits")
    arrays = {"image": data.train.images, "label": data.train.labels}
    size = len(arrays["label"])
    plan = bb.make_plan(bb.constant(0.02, 64, 0.9), train_examples=size, epochs=updates * 64 / size)
    run = bb.prepare(
        _task(dtype),
        arrays,
        plan,
        bb.Momentum(),
        ghost_batch_examples=GHOST,
        microbatch_examples_per_device=GHOST,
        initial=initial,
        mesh=functions.data_mesh([device]),
    )
    return jax.device_get(bb.fit(run).params)


def _updates(updates: int) -> Iterator[dict[str, Any]]:
    """Of WRN-10-1 on the digits, from one start."""
    start = jax.device_get(_task("float32").init(jax.random.key(0)))
    with jax.enable_x64(True):
        wide = jax.tree.map(np.float64, start)
        true = _trained("float64", jax.devices("cpu")[0], updates, wide)
    # A float32 CPU is no nearer than the first.
    for precision, limit in (("highest", 1e-3), ("default", 3e-2)):
        with jax.default_matmul_precision(precision):
            found = _trained("float32", jax.devices()[0], updates, start)
        what = f"{updates} updates in float32, matmul precision {precision}"
        yield _row(what, _distance(found, true), limit)


def _ghost_norm() -> Iterator[dict[str, Any]]:
    """Outputs, against NumPy, on inputs whose mean is 1,000 deviations."""
    x = np.random.default_rng(0).normal(1000, 1, (4 * GHOST, 4, 4, 8)).astype(np.float32)
    norm = GhostNorm(GHOST)
    variables = norm.init(jax.random.key(0), x, train=True)
    found, _ = jax.jit(lambda x: norm.apply(variables, x, train=True, mutable=True))(x)
    ghosts = np.float64(x).reshape(4, GHOST, 4, 4, 8)
    mean = ghosts.mean((1, 2, 3), keepdims=True)
    deviation = np.sqrt(ghosts.var((1, 2, 3), keepdims=True) + norm.epsilon)
    yield _row("ghost norm", _distance(found, ((ghosts - mean) / deviation).reshape(x.shape)), 1e-3)


def _exact_sums(addends: int) -> Iterator[dict[str, Any]]:
    """The same words in two orders and on the CPU; and how near the sums are."""
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(addends, 64)) * 2.0 ** -rng.integers(0, 20, 64)).astype(np.float32)
    exponents = np.array([math.frexp(np.abs(values).max())[1]], np.int32)

    @jax.jit
    def words(values: jax.Array) -> exact_sums.FixedPoint:
        def body(i: jax.Array, total: exact_sums.FixedPoint) -> exact_sums.FixedPoint:
            return exact_sums.add(total, values[i], exponents)

        return jax.lax.fori_loop(0, len(values), body, exact_sums.zeros(values[0]))

    own = jax.device_get(words(values))
    others = [words(values[::-1]), words(jax.device_put(values, jax.devices("cpu")[0]))]
    for what, other in zip(("the other way round", "on the CPU"), others, strict=True):
        differ = float(np.sum(own.words != jax.device_get(other).words))
        yield _row(f"exact sums {what}: words that differ", differ, 0.0)
    total, _ = exact_sums.total(exact_sums.parts(own.words), own.largest, exponents)
    true = values.astype(np.float64).sum(0)
    bound = 2.0**-22 * np.abs(np.float64(values)).sum(0) + addends * 2.0**-32 * np.abs(values).max()
    worst = float(np.max(np.abs(np.float64(total) - true) / bound))
    yield _row(f"{addends} exact sums: error / its bound", worst, 1.0)


def _bfloat16() -> Iterator[dict[str, Any]]:
    """Logits of the network at its start."""
    data = sets.load("digits").train
    examples = {"image": data.images[:GHOST], "ghost_mask": np.ones(1, np.float32)}
    outputs = []
    for dtype in ("bfloat16", "float32"):
        task = _task(dtype)
        params, statistics = _task("float32").init(jax.random.key(0))
        logits, _ = jax.jit(task.apply, static_argnums=3)(params, statistics, examples, True)
        outputs.append(np.float64(logits))
    yield _row("logits in bfloat16", _distance(*outputs), 3e-2)
