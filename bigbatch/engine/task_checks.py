"""Checks of a task before anything is compiled: each mistake is one sentence for the user.

The functions of a task are traced as the compiled programs trace them, on one device and without
numbers. Only the loss is computed, on a few made-up outputs.
"""

import contextlib
import functools
import math
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigbatch.checks import Checks
from bigbatch.engine import functions
from bigbatch.engine.accumulator import RESTS
from bigbatch.engine.functions import REPLICATED, SHARDED
from bigbatch.engine.task import COUNT, Examples, PyTree, Sums, Task
from bigbatch.errors import Problem, UserError, among
from bigbatch.schedule.adaptive.gradient_noise import SUMMED

Shaped = Mapping[str, jax.ShapeDtypeStruct]

# What the engine adds to the sums of an update.
_RESERVED = {*SUMMED, functions.IS_EXACT, RESTS}
_RESERVED |= {functions.GRADIENT_IS_FINITE, functions.PARAMS_ARE_FINITE}
_IN_TRAINING_ONLY = ("key", "ghost_mask")
_GRADIENT = "the gradient by the outputs"
# A mean of two examples is half of their sum; what bfloat16 rounds is under a hundredth.
_RELATIVE_ERROR = 0.02
_ABSOLUTE_ERROR = 1e-6


class Shapes(NamedTuple):
    """What a task starts from, as `jax.ShapeDtypeStruct`s.

    Attributes:
      params: of the model.
      running_statistics: likewise.
    """

    params: PyTree
    running_statistics: PyTree


def check_task(task: Task, examples: Shaped) -> Shapes:
    """Finds the mistakes in a task; nothing of the model is compiled or computed.

    Args:
      task: what is to be trained; one with `for_examples` is made for them already.
      examples: one or two ghost batches of training examples as a device sees them, [examples, ...]
        by name: with `weight`, `ghost_mask`, [ghost batches], and `key` where the task takes keys.

    Returns:
      The shapes of the parameters and the running statistics.

    Raises:
      UserError: with all the mistakes that can be found together. Its cause is what a function of
        the task has raised.
    """
    checks, cause = Checks(), None
    for path, decay in jax.tree_util.tree_leaves_with_path(task.running_decay):
        field, value = f"task.running_decay{_name(path)}", np.asarray(decay).tolist()
        checks.number(field, value, "a number between 0 and 1", above=0, below=1)
    try:
        shapes = _init(task)
        if not jax.tree_util.all_leaves([task.running_decay]):
            _check_structure(checks, "task.running_decay", "decays", task.running_decay, shapes[1])
        outputs, sums = _trace(checks, task, shapes, examples, train=True)
        _try_loss(checks, task, outputs, examples)
        tested = {name: leaf for name, leaf in examples.items() if name not in _IN_TRAINING_ONLY}
        for found in (sums, _trace(checks, task, shapes, tested, train=False)[1]):
            _check_metrics(task, found)
    except UserError as error:
        checks.problems += error.problems
        cause = error.__cause__
    if checks.problems:
        # What is wrong in training is wrong in evaluation too.
        raise UserError({str(problem): problem for problem in checks.problems}.values()) from cause
    return shapes


@contextlib.contextmanager
def _told(field: str, allowed: str, readable: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Makes a sentence of what is raised inside; `readable` is what may be read by name."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        given, nearest = textwrap.shorten(f"{type(error).__name__}: {error}", 200), None
        if isinstance(error, KeyError) and readable:
            name = str(next(iter(error.args), ""))
            allowed, nearest = among(name, readable, "what is there: ")
            if name in _IN_TRAINING_ONLY:
                allowed += "; ghost_mask in training, key there too and with takes_keys=True"
        raise UserError(Problem(field, given, allowed, nearest)) from error


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path).removeprefix(".")


def _pair(field: str, result: Any, allowed: str) -> tuple[PyTree, PyTree]:
    if not isinstance(result, tuple | list) or len(result) != 2:
        given = f"{len(result)} values" if isinstance(result, tuple) else type(result).__name__
        raise UserError(Problem(field, f"returns {given}", f"a pair: {allowed}"))
    return result[0], result[1]


def _check_array(
    checks: Checks, field: str, name: str, leaf: Any, due: tuple[int, ...] | None, allowed: str
) -> None:
    """Notes what is no array of a floating dtype, or not of the shape that is due, if any is."""
    dtype, shape = getattr(leaf, "dtype", type(leaf).__name__), getattr(leaf, "shape", due)
    is_floating = hasattr(leaf, "dtype") and jnp.issubdtype(dtype, jnp.floating)
    checks.require(is_floating, field, f"{name} of {dtype}", f"{allowed}, of a floating dtype")
    allowed = f"{allowed}, here of shape {due}"
    checks.require(due in (None, shape), field, f"{name} of shape {shape}", allowed)


def _check_structure(checks: Checks, field: str, what: str, tree: PyTree, like: PyTree) -> bool:
    leaves = map(jax.tree_util.tree_leaves_with_path, (tree, like))
    own, due = ({_name(path) for path, _ in each} for each in leaves)
    given = f"{what} that differ in {[*sorted(own ^ due), 'their containers'][0]}"
    same = str(jax.tree.structure(tree)) == str(jax.tree.structure(like))
    return checks.require(same, field, given, "the structure of the running statistics")


def _init(task: Task) -> Shapes:
    def init(key: jax.Array) -> Shapes:
        checks = Checks()
        with _told("task.init", "a function of (key) that JAX can trace"):
            result = task.init(key)
        allowed = "(parameters, running statistics), {} where there are none"
        shapes = Shapes(*_pair("task.init", result, allowed))
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
            _check_array(checks, "task.init", _name(path), leaf, None, "arrays")
        has_params = bool(jax.tree.leaves(shapes.params))
        checks.require(has_params, "task.init", "no parameter", "at least one array to train")
        checks.done()
        return shapes

    return jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))


def _trace(
    checks: Checks, task: Task, shapes: Shapes, examples: Shaped, train: bool
) -> tuple[PyTree, Sums]:
    """The shapes of outputs and sums; in training the gradient is traced too."""
    frozen = ", frozen" if jax.tree.leaves(task.frozen) else ""
    callable_as = f"a function of (params, statistics, examples, train{frozen}) that JAX can trace"

    def on_device(
        params: PyTree, statistics: PyTree, frozen: PyTree, examples: Examples
    ) -> tuple[PyTree, Sums]:
        def summed_loss(params: PyTree) -> tuple[jax.Array, tuple[PyTree, Sums]]:
            with _told("task.apply", callable_as, examples):
                result = task.apply_to(params, statistics, examples, train, frozen)
            outputs, ghosts = _pair("task.apply", result, "(outputs, ghost statistics)")
            if train:
                _check_ghosts(checks, ghosts, statistics, len(examples["ghost_mask"]))
            sums = _sums(task, outputs, examples)
            return sums[task.minimised], (jax.tree.map(jnp.asarray, outputs), sums)

        function = jax.grad(summed_loss, has_aux=True) if train else summed_loss
        return jax.tree.map(lambda leaf: leaf[None], function(params)[1])

    mesh = functions.data_mesh(jax.local_devices()[:1])
    specs = (REPLICATED, REPLICATED, REPLICATED, SHARDED)
    # As in `functions.accumulate`.
    traced = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=SHARDED, check_vma=False)
    with _told("task.apply", "functions that JAX can differentiate"):
        found = jax.eval_shape(traced, *shapes, task.frozen, dict(examples))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), found)


def _check_ghosts(checks: Checks, ghosts: PyTree, statistics: PyTree, ghost_batches: int) -> None:
    if _check_structure(checks, "task.apply", "ghost statistics", ghosts, statistics):
        leaves = jax.tree_util.tree_leaves_with_path(ghosts)
        for (path, leaf), running in zip(leaves, jax.tree.leaves(statistics), strict=True):
            name, shape = f"ghost statistics{_name(path)}", (ghost_batches, *running.shape)
            allowed = "[ghost batches, *running shape]"
            _check_array(checks, "task.apply", name, leaf, shape, allowed)


def _sums(task: Task, outputs: PyTree, examples: Examples) -> Sums:
    """What the loss returns, checked."""
    checks, field = Checks(), "task.loss"
    with _told(field, "a function of (outputs, examples) that JAX can trace", examples):
        sums = task.loss(outputs, examples)
    if not isinstance(sums, Mapping):
        allowed = "a mapping: sums over the examples by name"
        raise UserError(Problem(field, f"returns {type(sums).__name__}", allowed))
    for name in (COUNT, task.minimised):
        given = f"sums {', '.join(map(str, sums))}"
        checks.require(name in sums, field, given, f"{name!r} among them")
    for name, value in sums.items():
        allowed = f"other names than {', '.join(sorted(_RESERVED))}"
        checks.require(name not in _RESERVED, field, f"sums[{name!r}]", allowed)
        _check_array(checks, field, f"sums[{name!r}]", value, (), "a sum over the examples")
    checks.done()
    return dict(sums)


def _check_metrics(task: Task, sums: Sums) -> None:
    means = {name: 0.5 for name in sums if name != COUNT}
    allowed = "name -> a sum's name, or a function of the means by name that gives a number"
    with _told("task.metrics", allowed):
        metrics = dict(task.metrics or {})
    for name, metric in metrics.items():
        with _told(f"task.metrics.{name}", allowed, means):
            float(metric(means) if callable(metric) else means[metric])


def _try_loss(checks: Checks, task: Task, outputs: PyTree, examples: Shaped) -> None:
    """Tries the loss on made-up outputs: of masked examples, of two and of each of them alone."""
    (size,) = examples["weight"].shape
    by_example = all(leaf.shape[:1] == (size,) for leaf in jax.tree.leaves(outputs))
    rows = 2 if by_example else size

    @functools.partial(jax.jit, static_argnums=2)
    def sums_of(fill: jax.Array, weight: jax.Array, differentiates: bool) -> Sums:
        """The sums, where all that example i has is fill[i], and the gradient's size."""

        def filled(leaf: jax.ShapeDtypeStruct) -> jax.Array:
            column = fill.reshape(-1, *[1] * len(leaf.shape[1:]))
            return jnp.broadcast_to(column, (fill.size, *leaf.shape[1:]))

        def output(leaf: jax.ShapeDtypeStruct) -> jax.Array:
            # Class 0 has the highest logit. All are in (0, 1): they may be probabilities.
            if leaf.shape[:1] != (size,):
                return jnp.full(leaf.shape, 0.5, leaf.dtype)
            place = jnp.arange(math.prod(leaf.shape[1:])).reshape(leaf.shape[1:])
            return (1 / (2 + filled(leaf) + place)).astype(leaf.dtype)

        def minimised(outputs: PyTree) -> tuple[jax.Array, Sums]:
            sums = _sums(task, outputs, entries)
            return sums[task.minimised], sums

        entries = {name: filled(leaf).astype(leaf.dtype) for name, leaf in examples.items()}
        del entries["ghost_mask"]
        entries["weight"] = jnp.full_like(entries["weight"], weight)
        made_up = jax.tree.map(output, outputs)
        if not differentiates:
            return minimised(made_up)[1]
        gradient, sums = jax.grad(minimised, has_aux=True, allow_int=True)(made_up)
        leaves = [leaf for leaf in jax.tree.leaves(gradient) if leaf.dtype != jax.dtypes.float0]
        return sums | {_GRADIENT: sum(jnp.sum(jnp.abs(leaf)) for leaf in leaves)}

    def numbers(fill: list[int], weight: int) -> dict[str, float]:
        sums = sums_of(np.array(fill, np.float32), np.float32(weight), len(fill) == rows)
        return {name: float(sums[name]) for name in sums}

    # Masked examples are zeros; others of weight 0 may hold anything.
    masked, unweighted = numbers([0] * rows, 0), numbers([1] * rows, 0)
    allowed = "exactly 0: each term times its weight, by jnp.where if it may be inf or NaN"
    for name, value in masked.items():
        if value == 0 and math.isfinite(unweighted[name]):
            value = unweighted[name]
        given = f"{name} {value:.4g} where all weights are 0"
        # A sum without its weights has a gradient too: that is one mistake.
        is_known = name == _GRADIENT and bool(checks.problems)
        checks.require(value == 0 or is_known, "task.loss", given, allowed)
    whole = numbers([row % 2 for row in range(rows)], 1)
    given = f"{COUNT} {whole[COUNT]:.4g}"
    checks.require(not whole[COUNT] < 0, "task.loss", given, f"a {COUNT} that is not negative")
    if by_example:
        first, second = numbers([0], 1), numbers([1], 1)
        for name, a in first.items():
            b, error = second[name], abs(whole[name] - a - second[name])
            given = f"{name} {whole[name]:.4g} of two examples, {a:.4g} and {b:.4g} of each alone"
            allowed = "sums over the examples, not means: the engine divides them by count"
            is_sum = not error > _RELATIVE_ERROR * (abs(a) + abs(b)) + _ABSOLUTE_ERROR
            checks.require(is_sum or math.isinf(error), "task.loss", given, allowed)
