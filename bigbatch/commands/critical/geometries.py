"""The noise scale at a checkpoint in each geometry of `bigbatch.noise`, to compare with branches.

The parameters are held, so all small batches make one measurement: lengths that are roots have then
little bias (see `geometry`). They come in groups, and what becomes of the noise scale without each
of them tells its standard error (the jackknife: Efron and Stein 1981).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bigbatch import noise
from bigbatch.engine.functions import State
from bigbatch.engine.task import COUNT, PyTree, Task
from bigbatch.layout.layout import Microbatch
from bigbatch.noise.geometry import Geometry
from bigbatch.schedule.adaptive import gradient_noise
from bigbatch.training.microbatches import Request
from bigbatch.training.run import Run

_GROUPS = 8
# So many times the noise scale are looked at: the bias of roots is within a tenth of them then.
_NOISE_SCALES = 8
_EPSILON = 1e-8


def noise_scales(run: Run, state: State, scale: float) -> dict[str, tuple[float, float]]:
    """The noise scale in each geometry that the parameters and the optimizer have.

    Args:
      run: measures noise.
      state: is only read.
      scale: the Euclidean noise scale in examples, by which it is decided how many are enough.

    Returns:
      By geometry the noise scale in examples and its standard error: `l2`, `sign`, `spectral` (of
      matrices), `norms` (l2 of arrays named scale), `adam` and `adam_root` (l2 of the gradient
      divided by the root of Adam's second moments, and by the root of that). One without an
      estimate is left out.
    """
    devices, share = run.layout.devices, run.layout.shapes[0]
    size, total = devices * share, run.plan.train_examples
    most = max(1, total // (_GROUPS * size))
    calls = min(most, math.ceil(_NOISE_SCALES * scale / (_GROUPS * size)))
    moments, nothing = _second_moments(state), jax.tree.map(jnp.zeros_like, state.params)
    kinds, groups = _kinds(nothing, moments), []
    for group in range(_GROUPS):
        found = nothing, {name: noise.empty(nothing, kind) for name, kind in kinds.items()}
        for call in range(group * calls, (group + 1) * calls):
            _, examples = run.microbatch(Request(call * size, Microbatch(0, size, share)))
            for index in range(size // run.unit_examples):
                given = state, moments, (examples, run.frozen), index
                found = _add(found, *given, task=run.task, unit=run.unit_examples)
        # Groups wait in the host's memory.
        groups.append(jax.device_get(found))
    scales = []
    for part in (groups, *(groups[:left] + groups[left + 1 :] for left in range(_GROUPS))):
        shares, seen = (0.0, 0.0), len(part) * calls * size
        if run.noise_population == gradient_noise.TRAINING_SET:
            sizes = seen, run.unit_examples
            whole, small = (gradient_noise.shares(0, seen, each, total) for each in sizes)
            shares = whole, small
        summed = jax.tree.map(lambda *leaves: sum(leaves), *part)
        scales.append(jax.device_get(_scales(summed, moments, shares)))
    told = {}
    for name in kinds:
        whole, *without = (float(each[name]) for each in scales)
        error = math.sqrt(np.var(without) * (_GROUPS - 1))
        if whole > 0 and math.isfinite(error):
            told[name] = whole, error
    return told


def _second_moments(state: State) -> PyTree:
    """Adam's, where the optimizer has one for each parameter; else None."""
    shapes = jax.tree.map(jnp.shape, state.params)
    for _, found in optax.tree_utils.tree_get_all_with_path(state.optimizer, "nu"):
        if jax.tree.map(jnp.shape, found) == shapes:
            return found
    return None


def _kinds(params: PyTree, moments: PyTree) -> dict[str, Geometry]:
    """By name, those that have something to measure of parameters or gradients like them."""
    kinds = {"l2": noise.L2, "sign": noise.SIGN}
    leaves = jax.tree.leaves_with_path(params)
    if any(jnp.ndim(leaf) == 2 for _, leaf in leaves):
        kinds["spectral"] = noise.SPECTRAL
    if any("scale" in jax.tree_util.keystr(path) for path, _ in leaves):
        kinds["norms"] = noise.by_group(norms="scale")
    if moments is not None:
        for name, power in (("adam", 0.5), ("adam_root", 0.25)):
            divisor = jax.tree.map(lambda v, power=power: v**power + _EPSILON, moments)
            kinds[name] = noise.preconditioned(divisor)
    return kinds


@functools.partial(jax.jit, static_argnames=("task", "unit"))
def _add(
    found: Any, state: State, moments: PyTree, rest: Any, index: int, task: Task, unit: int
) -> Any:
    """Adds a small batch of a microbatch to the summed gradient and to each geometry's sums."""
    (total, sums), (examples, frozen) = found, rest
    count = len(examples["weight"]) // unit
    small = {
        name: array.reshape(count, len(array) // count, *array.shape[1:])[index]
        for name, array in examples.items()
    }

    def summed_loss(params: PyTree) -> tuple[jax.Array, jax.Array]:
        outputs, _ = task.apply_to(params, state.running_statistics, small, True, frozen)
        sums = task.loss(outputs, small)
        return sums[task.minimised], sums[COUNT]

    gradient, weight = jax.grad(summed_loss, has_aux=True)(state.params)
    present = jnp.sum(small["weight"] > 0)
    return jax.tree.map(jnp.add, total, gradient), {
        name: noise.add(sums[name], gradient, present, weight, geometry=geometry)
        for name, geometry in _kinds(state.params, moments).items()
    }


@jax.jit
def _scales(found: Any, moments: PyTree, shares: tuple[float, float]) -> dict[str, jax.Array]:
    """The noise scale in each geometry, of what was summed; NaN where there is none."""
    total, sums = found
    scales = {}
    for name, geometry in _kinds(total, moments).items():
        mean = jax.tree.map(lambda leaf, count=sums[name]["count"]: leaf / count, total)
        measured = noise.measure(sums[name], mean, geometry=geometry, shares=shares)
        # Of groups the first.
        square, variance = (jnp.ravel(value)[0] for value in gradient_noise.solved(measured))
        scales[name] = jnp.where(square > 0, variance / square, jnp.nan)
    return scales
