"""`prepare`, the only builder of a run: a task, data, a plan and an optimizer, made ready to train.

>>> import bigbatch as bb, jax.numpy as jnp, numpy as np
>>> x = np.random.default_rng(0).normal(size=(1000, 3)).astype(np.float32)
>>> arrays = {"x": x, "y": x @ np.float32([1, 2, 3]), "weight": np.linspace(0, 2, 1000)}
>>> def squared_error(prediction, examples):
...     weight, error = examples["weight"], prediction - examples["y"]
...     return {"loss": jnp.sum(weight * error**2), "count": jnp.sum(weight)}
>>> task = bb.Task(
...     init=lambda key: (jnp.zeros(3), {}),
...     apply=lambda params, statistics, examples, train: (examples["x"] @ params, {}),
...     loss=squared_error,
... )
>>> recipe = bb.step_decay(0.05, 10, 0.9, boundaries_epochs=[2, 4], factor=0.2)
>>> growing = bb.grow_batch(recipe, max_batch_size=200)
>>> plan = bb.make_plan(growing, train_examples=1000, epochs=5)
>>> run = bb.prepare(task, arrays, plan, bb.Momentum(), microbatch_examples_per_device=50)
>>> [round(float(param), 3) for param in bb.fit(run).params]
[1.0, 2.0, 3.0]
"""

import contextlib
import dataclasses
import functools
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from bigbatch.checks import Checks, is_number
from bigbatch.data.source import Data, TrainingData
from bigbatch.engine import exact_sums, functions
from bigbatch.engine.layer_checks import check_layers
from bigbatch.engine.layers import rows_of
from bigbatch.engine.parts import AUTO, LAYER, MODEL, NONE, UPDATE, Layers, Shard
from bigbatch.engine.task import PyTree, Task, with_float32_masters
from bigbatch.engine.task_checks import Shapes, check_task
from bigbatch.engine.update_rule import Rule, resolve
from bigbatch.errors import Problem, UserError
from bigbatch.layout import memory
from bigbatch.layout.sharing import layout_over
from bigbatch.schedule.adaptive.controller import Controller, Decisions
from bigbatch.schedule.plan import Plan
from bigbatch.training import fitting, microbatches
from bigbatch.training.programs import Compiler, Programs, compile_programs, held_bytes
from bigbatch.training.run import Run
from bigbatch.workdir import packing

# From so many addends of a device on, plain float32 sums could be off by 2^-16 of their terms.
_COMPENSATED_ADDENDS = 256
# What checks have found, for as long as the task is there.
_CHECKED: weakref.WeakKeyDictionary[Task, dict[Any, Shapes]] = weakref.WeakKeyDictionary()


def prepare(
    task: Task,
    data: TrainingData | Mapping[str, np.ndarray],
    plan: Plan | Controller,
    optimizer: Any,
    *,
    microbatch_examples_per_device: int | Literal["auto"],
    ghost_batch_examples: int | None = None,
    evaluation_batch_examples: int | None = None,
    noise_small_batch_examples: int | None = None,
    reproducible: bool = False,
    shard: Literal["auto", "none", "update"] | Mapping[str, int] = AUTO,
    float32_masters: bool = False,
    seed: int = 0,
    initial: Any = None,
    evaluation_params: Callable[[PyTree, PyTree], PyTree] | None = None,
    device_memory_bytes: int | None = None,
    batch_sizes: Any = None,
    mesh: Mesh | None = None,
    identity: Mapping[str, Any] | None = None,
    kept: Path | None = None,
    compiler: Compiler | None = None,
) -> Run:
    """Checks that all fits together, lays the plan out over the devices and compiles everything.

    Args:
      task: what is trained.
      data: its examples: a `Data`, or arrays [examples, ...] by name.
      plan: every update of the run, for as many training examples; a `Controller` for a run that
        decides its batch sizes itself.
      optimizer: one of `bigbatch.engine.optimizer`, a function of hyperparameters by name that
        gives an Optax transformation, or a transformation that holds `hyperparams` in its state.
      microbatch_examples_per_device: the most that a device computes in one call; "auto" for the
        most that fits into its memory. A hardware quantity, without influence on the result.
      ghost_batch_examples: examples that share statistics; None for 1, in a task without any.
      evaluation_batch_examples: examples evaluated at a time; None for as many as are trained.
      noise_small_batch_examples: measures the gradient noise from small batches of so many; None:
        a controller's ghost batches, else nothing is measured.
      reproducible: sums exactly, one ghost batch (or small batch) a call and device, so that
        devices and processes change no bit; see `exact_sums`.
      shard: "update" for parameters and an optimizer's state in parts over the devices, "none" for
        all of them on each, {"layer": F} for parts over F devices while the network computes too,
        {"layer": F, "model": M} where M of them compute each layer together: see
        `bigbatch.engine.parts`. "auto": the first of the first three that leaves half of a device's
        memory to compute, "none" where that is not known.
      float32_masters: keeps parameters of less precision in float32, and computes with them in
        their own.
      seed: of the initial parameters and the order of the examples.
      initial: (parameters, running statistics) to begin with, or a function that reads them; None
        for random ones.
      evaluation_params: (optimizer's state, parameters) -> those to evaluate with; None for what is
        found in the state: the average of an optimizer that keeps one, else the parameters.
      device_memory_bytes: of each device, for "auto"; None for what the devices report.
      batch_sizes: of the updates that will come, in examples; None for the plan's.
      mesh: the devices, along one axis `data`; None for all there are.
      identity: what decides the result, by dotted name, beside the plan; None for what is seen
        here.
      kept: a file for the microbatch that was found to fit; None to find it anew.
      compiler: see `programs.compile_programs`; a run of devices that are only described is not
        trained.

    Returns:
      What training and evaluation need.

    Raises:
      UserError: something does not fit, with all that was found.
    """
    given = dict(locals())
    mesh = functions.data_mesh() if mesh is None else mesh
    checks = Checks()
    allowed = "a mesh of the one axis 'data'"
    fits = mesh.axis_names == (functions.DATA_AXIS,)
    checks.require(fits, "mesh", mesh.axis_names, allowed, (functions.DATA_AXIS,))
    lies = _checked_shard(checks, shard, mesh.size)
    allowed = "nothing: updates are compiled programs"
    checks.require(not jax.config.jax_disable_jit, "JAX_DISABLE_JIT", True, allowed)  # type: ignore
    checks.done()
    if isinstance(data, Mapping):
        data = Data(data)
    controller = plan if isinstance(plan, Controller) else None
    if isinstance(plan, Controller):
        batch_sizes = plan.likely_batch_sizes if batch_sizes is None else batch_sizes
        noise_small_batch_examples = noise_small_batch_examples or plan.small_batch_examples
        plan = plan.plan(Decisions())
    if data.train_examples != plan.train_examples:
        allowed = f"the {plan.train_examples:,} training examples that the plan is for"
        raise UserError(Problem("data.train_examples", data.train_examples, allowed))
    task, shapes = specialised(task, data, ghost_batch_examples)
    if float32_masters:
        task = with_float32_masters(task, shapes.params)
    ghost_batch_examples = ghost_batch_examples or 1
    rule = resolve(optimizer, plan.hypers, shapes.params, evaluation_params)
    unit_examples = noise_small_batch_examples or ghost_batch_examples
    rows = rows_of(reproducible, noise_small_batch_examples is not None)
    layer_examples = _examples(task, data, unit_examples, unit_examples // ghost_batch_examples)

    def layered() -> Iterator[Layers]:
        for size in _divisors(mesh.size)[1:]:
            with contextlib.suppress(UserError):
                check_layers(task, shapes, layer_examples, Layers(size), rows)
                yield Layers(size)

    if lies == AUTO:
        held = functools.partial(held_bytes, task, rule, shapes, mesh, reproducible)
        others: Iterator[Shard] = itertools.chain([UPDATE] * (mesh.size > 1), layered())
        lies = fitting.shard_that_fits(
            lambda shard: sum(held(shard).values()), others, mesh, device_memory_bytes
        )
    _check_initial(initial, shapes, lies)
    by_layer = isinstance(lies, Layers)
    if isinstance(lies, Layers):
        check_layers(task, shapes, layer_examples, lies, rows)
    if reproducible and lies != NONE and (ordered := rule.ordered(shapes.params)):
        allowed = (
            f"{NONE!r} with reproducible and {rule.name}, whose {', '.join(sorted(ordered))} of "
            "arrays in parts would add in the order of the parts"
        )
        raise UserError(Problem("shard", shard, allowed, NONE))
    sizes = plan.batch_sizes if batch_sizes is None else np.asarray(batch_sizes)
    # What holds any batch that will come.
    most = -(-int(sizes.max()) // unit_examples) * unit_examples
    allowed = f"a batch size of at most {exact_sums.MAX_ADDENDS:,} times {unit_examples} with it"
    few = not reproducible or most // unit_examples <= exact_sums.MAX_ADDENDS
    checks.require(few, "reproducible", f"True, and {most:,}", allowed, False)
    checks.done()

    def compiled(microbatch_examples: tuple[int, ...]) -> Programs:
        addend_examples = noise_small_batch_examples or microbatch_examples[0] // mesh.size
        addends = -(-most // (addend_examples * mesh.size))
        return compile_programs(
            task,
            rule,
            mesh,
            example_shapes=tuple((name, *kind) for name, kind in data.example_shapes.items()),
            microbatch_examples=microbatch_examples,
            evaluation_examples=evaluation_examples,
            ghost_batch_examples=ghost_batch_examples,
            noise_small_batch_examples=noise_small_batch_examples,
            shard=lies,
            reproducible=reproducible,
            compensated=addends > _COMPENSATED_ADDENDS and not reproducible,
            compiler=compiler,
        )

    evaluation_examples = -(-(evaluation_batch_examples or 0) // mesh.size) * mesh.size or None
    fit = fitting.Fitting(kept, microbatch_examples_per_device, device_memory_bytes, mesh)
    microbatch_examples_per_device = fit.examples_per_device(
        lambda examples: compiled((examples * mesh.size,)).device_bytes,
        data,
        unit=unit_examples,
        most=most,
        reproducible=reproducible,
    )
    layout = layout_over(
        sizes,
        ghost_batch_examples=ghost_batch_examples,
        devices=mesh.size,
        microbatch_examples_per_device=microbatch_examples_per_device,
        noise_small_batch_examples=noise_small_batch_examples,
        reproducible=reproducible,
    )
    if layout.devices < mesh.size and by_layer:
        allowed = f"a multiple of ghost_batch_examples = {ghost_batch_examples} with shard layer"
        field, share = "microbatch_examples_per_device", microbatch_examples_per_device
        raise UserError(Problem(field, share, allowed, ghost_batch_examples))
    if layout.devices < mesh.size and not task.shares_ghost_batches:
        allowed = (
            f"a multiple of ghost_batch_examples = {ghost_batch_examples}: this task forms its "
            "statistics or random numbers on one device. Devices share a ghost batch with "
            "bigbatch.GhostNorm"
        )
        field, share = "microbatch_examples_per_device", microbatch_examples_per_device
        raise UserError(Problem(field, share, allowed, ghost_batch_examples))
    programs = compiled(tuple(layout.devices * n for n in layout.shapes))
    given["noise_small_batch_examples"] = noise_small_batch_examples
    if identity is None:
        identity = _identity(task, data, rule, shapes, controller, given)
    given |= {"task": task, "data": data, "mesh": mesh, "batch_sizes": batch_sizes}
    given |= {"microbatch_examples_per_device": microbatch_examples_per_device}
    given |= {"identity": identity, "float32_masters": False}

    def again(**changes: Any) -> Run:
        return prepare(**given | changes)

    largest = layout.devices * layout.shapes[0] // mesh.size

    def smaller() -> Run:
        half = memory.smaller(largest, unit=unit_examples)
        fit.keep(half)
        return again(microbatch_examples_per_device=half)

    return Run(
        task=task,
        data=data,
        plan=plan,
        optimizer=rule,
        layout=layout,
        mesh=mesh,
        programs=programs,
        seed=seed,
        initial=initial if callable(initial) or initial is None else lambda: initial,
        microbatch=microbatches.of(
            data, layout, mesh, seed, ghost_batch_examples, takes_keys=task.takes_keys
        ),
        evaluation_examples_per_device=programs.evaluation_examples // mesh.size,
        unit_examples=unit_examples,
        controller=controller,
        identity=identity,
        again=again,
        smaller=smaller,
    )


def specialised(
    task: Task, data: TrainingData, ghost_batch_examples: int | None
) -> tuple[Task, Shapes]:
    """The task for the examples of some data, checked, and the shapes of what it makes.

    Raises:
      UserError: the task is none, or reads what the data do not give.
    """
    examples = _examples(task, data, ghost_batch_examples or 1)
    if task.for_examples is not None:
        del examples["ghost_mask"]
        return specialised(task.for_examples(examples), data, ghost_batch_examples)
    kinds = tuple((name, leaf.shape[1:], leaf.dtype) for name, leaf in sorted(examples.items()))
    # In the other precision the same task gives others.
    key = jax.numpy.result_type(float), kinds
    checked = _CHECKED.setdefault(task, {})
    if key not in checked:
        checked[key] = _init_shapes(task) if task.is_tested else check_task(task, examples)
    shapes = checked[key]
    if ghost_batch_examples is None and jax.tree.leaves(shapes.running_statistics):
        allowed = "how many examples share statistics: this task has running statistics"
        raise UserError(Problem("ghost_batch_examples", None, allowed))
    return task, shapes


def _examples(
    task: Task, data: TrainingData, size: int, ghost_batches: int = 1
) -> dict[str, jax.ShapeDtypeStruct]:
    """What a task is given of so many examples."""
    kinds = {
        "weight": ((), np.float32),
        **data.example_shapes,
        **({"key": ((2,), np.uint32)} if task.takes_keys else {}),
    }
    examples = {
        name: jax.ShapeDtypeStruct((size, *shape), dtype) for name, (shape, dtype) in kinds.items()
    }
    return examples | {"ghost_mask": jax.ShapeDtypeStruct((ghost_batches,), np.float32)}


def _checked_shard(checks: Checks, shard: Any, devices: int) -> Shard:
    """How the state lies, as `Parts` takes it."""
    if not isinstance(shard, Mapping):
        layered = f"{{{LAYER!r}: F}} or {{{LAYER!r}: F, {MODEL!r}: M}}"
        allowed = f"{AUTO!r}, {NONE!r}, {UPDATE!r}, {layered}"
        checks.require(shard in (AUTO, NONE, UPDATE), "shard", shard, allowed, AUTO)
        return str(shard)
    size, model = shard.get(LAYER), shard.get(MODEL, 1)
    allowed = (
        f"{{{LAYER!r}: F}}, F a whole number that divides the {devices} devices; beside it may be "
        f"{MODEL!r}, one that divides F"
    )
    divisors, fits = _divisors(devices), False
    if is_number(size) and is_number(model):
        devices = min(divisors, key=lambda n: abs(n - size))
        fits = set(shard) - {MODEL} == {LAYER} and devices == size and model in _divisors(devices)
    checks.require(fits, "shard", dict(shard), allowed, {LAYER: devices})
    return Layers(devices, int(model)) if fits and devices != 1 else NONE


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _init_shapes(task: Task) -> Shapes:
    return Shapes(*jax.eval_shape(task.init, jax.eval_shape(jax.random.key, 0)))


def _check_initial(initial: Any, shapes: Shapes, shard: Shard) -> None:
    """Refuses initial values that are not those of the task, or lie in parts where none are to."""
    if initial is None or callable(initial):
        return
    expected = (shapes.params, shapes.running_statistics)
    given, wanted = (str(jax.tree.structure(tree)) for tree in (initial, expected))
    if given != wanted:
        allowed = f"(parameters, running statistics) as the task's init gives them: {wanted}"
        raise UserError(Problem("initial", given, allowed))
    checks = Checks()
    for (path, leaf), like in zip(
        jax.tree.leaves_with_path(initial), jax.tree.leaves(expected), strict=True
    ):
        name = "initial" + jax.tree_util.keystr(path)
        checks.require(np.shape(leaf) == like.shape, name, np.shape(leaf), f"{like.shape}")
        parts = getattr(leaf, "sharding", None)
        allowed = f"a whole array on every device with shard {NONE!r}"
        whole = parts is None or parts.is_fully_replicated or shard != NONE
        checks.require(whole, name, getattr(parts, "spec", parts), allowed)
    checks.done()


def _identity(
    task: Task,
    data: TrainingData,
    rule: Rule,
    shapes: Shapes,
    controller: Controller | None,
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """What decides the result of a run beside its plan, as far as it can be seen."""
    names = ("seed", "noise_small_batch_examples", "reproducible", "float32_masters")
    initial = given["initial"]
    return {
        **{name: given[name] for name in names},
        "ghost_batch_examples": given["ghost_batch_examples"] or 1,
        "optimizer": rule.name,
        "data": data.description,
        "parameters": packing.described(shapes.params),
        "running_statistics": packing.described(shapes.running_statistics),
        **({"frozen_sha256": packing.sha256(task.frozen)} if jax.tree.leaves(task.frozen) else {}),
        **({"initial_params_sha256": packing.sha256(initial[0])} if initial else {}),
        **({"policy": {"name": "adaptive"} | dataclasses.asdict(controller)} if controller else {}),
    }
