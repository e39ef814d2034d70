"""What a network must keep to be trained with parameters in parts by layer; see `layers`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from bigbatch.checks import Checks
from bigbatch.engine.accumulator import sums_of
from bigbatch.engine.layers import ALL, OWN, PART, WHOLE
from bigbatch.engine.parts import DATA_AXIS, NONE, REPLICATED, UPDATE, Layers, Parts, named
from bigbatch.engine.task import Examples, PyTree, Sums, Task
from bigbatch.engine.task_checks import Shapes
from bigbatch.errors import Problem, UserError

_WITH_ROWS = "with reproducible or where the gradient noise is measured"
_TOGETHER = "layers in parts begin with all_examples and end with own_examples"
# Of a device's examples where several compute a layer: as many as no broadcast makes fit.
_EXAMPLES = 3


def check_layers(
    task: Task, shapes: Shapes, examples: Mapping[str, Any], lies: Layers, rows: int
) -> None:
    """Refuses a network that does not call `whole` once on each parameter that lies in parts.

    Args:
      task: what is trained.
      shapes: of its parameters and running statistics.
      examples: shapes of a unit's.
      lies: how the parameters lie.
      rows: that parts come with: see `layers.rows_of`.

    Raises:
      UserError: the parameters, and what reads them.
    """
    checks = Checks()
    given = named(lies)
    leaves = jax.tree.leaves(shapes.params)
    narrow = next((leaf.dtype for leaf in leaves if jnp.finfo(leaf.dtype).bits < 32), None)
    masters = task.computes_with is None
    allowed = "parameters in float32, which the network may make whole in less: `whole(..., dtype)`"
    checks.require(masters and narrow is None, "shard", given, allowed, NONE)
    several = len(examples["ghost_mask"]) > 1 and not task.shares_ghost_batches
    allowed = "a network that computes the ghost batches of a unit together"
    checks.require(not several, "shard", given, allowed, UPDATE)
    allowed = f"layers that a device computes by itself {_WITH_ROWS}"
    checks.require(
        lies.model == 1 or not rows, "shard", given, allowed, named(Layers(lies.devices))
    )
    checks.done()
    if lies.model > 1:
        examples = jax.tree.map(_more, dict(examples))
    axes = {DATA_AXIS: 1, **lies.axes}
    kinds = (jax.sharding.AxisType.Auto,) * len(axes)
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=kinds)
    params, statistics = shapes
    specs = Parts(mesh, lies).specs(params)
    # More rows than any axis is long: who takes them for an axis of a parameter's is found.
    room = 1 + max(size for leaf in leaves for size in (*leaf.shape, rows)) if rows else 0
    if room:
        is_cut = jax.tree.map(any, specs, is_leaf=lambda spec: isinstance(spec, PartitionSpec))
        params = jax.tree.map(lambda leaf, cut: _rows(leaf, room) if cut else leaf, params, is_cut)
        specs = jax.tree.map(
            lambda cut, spec: PartitionSpec(None, *spec) if cut else spec, is_cut, specs
        )

    def sums(params: PyTree, statistics: PyTree, frozen: PyTree, examples: Examples) -> Sums:
        outputs, _ = task.apply_to(params, statistics, examples, True, frozen)
        return sums_of(task, outputs, examples)

    rest = REPLICATED, REPLICATED, REPLICATED
    on_device = jax.shard_map(
        sums, mesh=mesh, in_specs=(specs, *rest), out_specs=REPLICATED, check_vma=False
    )
    calls = "a network that calls bigbatch.whole once on each parameter"
    alone = f", in no scan or vmap {_WITH_ROWS}" if rows else ""
    calls = f"{calls}, and whose {_TOGETHER}" if lies.model > 1 else calls
    try:
        traced = jax.make_jaxpr(on_device)(params, statistics, task.frozen, examples)
    except Exception as error:
        if isinstance(error, UserError) and error.problems[0].field in ("shard", "whole"):
            raise
        said = f"{type(error).__name__}: {[*str(error).splitlines(), ''][0]}"
        raise UserError(Problem("shard", given, f"{calls}{alone} ({said})", UPDATE)) from error
    (call,) = (e for e in traced.jaxpr.eqns if e.primitive.name == "shard_map")
    program = call.params["jaxpr"]
    computed_in_parts = False
    for (path, leaf), outer in zip(
        jax.tree.leaves_with_path(shapes.params), traced.jaxpr.invars, strict=False
    ):
        own = program.invars[call.invars.index(outer)]
        reads, is_cut = _reads(program, own), own.aval.shape != leaf.shape
        operations = [read.params.get("name", read.primitive.name) for read in reads]
        told = " and ".join(name.strip("_") for name in operations)
        name = f"{told} of params{jax.tree_util.keystr(path)}"
        fits = not is_cut or operations in ([], [WHOLE], [PART])
        checks.require(fits, "task.apply", name, f"{calls} with shard {given}")
        # In a scan or a vmap it is given the rows one by one, or the parameters with few of them.
        by_itself = operations != [WHOLE] or reads[0].outvars[0].aval.shape == leaf.shape
        allowed = f"one that is called on the parameter itself{alone}"
        checks.require(not rows or not is_cut or by_itself, "task.apply", name, allowed)
        computed_in_parts |= PART in operations
    allowed = "a network whose layers several devices compute together, such as the transformer"
    checks.require(lies.model == 1 or computed_in_parts, "shard", given, allowed)
    ends = not computed_in_parts or {ALL, OWN} <= _names(program)
    allowed = f"a network whose {_TOGETHER} with shard {given}"
    checks.require(ends, "task.apply", "another network", allowed)
    checks.done()


def _more(examples: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    count, *shape = examples.shape
    return jax.ShapeDtypeStruct((_EXAMPLES * count, *shape), examples.dtype)


def _rows(leaf: jax.ShapeDtypeStruct, rows: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, *leaf.shape), leaf.dtype)


def _reads(program: Any, variable: Any) -> list[Any]:
    """The equations of a traced program that read a variable, within programs of it too."""
    found = []
    for equation in program.eqns:
        inner = [each for each in _inner(equation) if len(each.invars) == len(equation.invars)]
        for place, atom in enumerate(equation.invars):
            if atom is variable:
                into = [] if equation.params.get("name") in (WHOLE, PART) else inner[:1]
                found += [r for each in into for r in _reads(each, each.invars[place])]
                found += [] if into else [equation]
    return found


def _names(program: Any) -> set[str]:
    """Of the programs within a traced program."""
    found = {str(equation.params.get("name")) for equation in program.eqns}
    return found.union(*(_names(each) for e in program.eqns for each in _inner(e)))


def _inner(equation: Any) -> list[Any]:
    """The programs of an equation."""
    inner = [getattr(each, "jaxpr", each) for each in equation.params.values()]
    return [each for each in inner if hasattr(each, "invars")]
