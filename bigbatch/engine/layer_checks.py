"""What a network must keep to be trained with parameters in parts by layer; see `layers`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from bigbatch.checks import Checks
from bigbatch.engine.layers import PART, WHOLE
from bigbatch.engine.parts import DATA_AXIS, NONE, REPLICATED, Layers, Parts, named
from bigbatch.engine.task import Examples, PyTree, Task
from bigbatch.engine.task_checks import Shapes
from bigbatch.errors import Problem, UserError


def check_layers(task: Task, shapes: Shapes, examples: Mapping[str, Any], lies: Layers) -> None:
    """Refuses a network that does not call `whole` once on each parameter that lies in parts.

    Args:
      task: what is trained.
      shapes: of its parameters and running statistics.
      examples: shapes of a unit's.
      lies: how the parameters lie.

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
    checks.require(not several, "shard", given, allowed, NONE)
    checks.done()
    axes = {DATA_AXIS: 1, **lies.axes}
    kinds = (jax.sharding.AxisType.Auto,) * len(axes)
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=kinds)
    params, statistics = shapes
    specs = Parts(mesh, lies).specs(params)

    def outputs(params: PyTree, statistics: PyTree, frozen: PyTree, examples: Examples) -> PyTree:
        return task.apply_to(params, statistics, examples, True, frozen)

    rest = REPLICATED, REPLICATED, REPLICATED
    on_device = jax.shard_map(
        outputs, mesh=mesh, in_specs=(specs, *rest), out_specs=REPLICATED, check_vma=False
    )
    allowed = f"a network that calls bigbatch.whole once on each parameter with shard {given}"
    try:
        traced = jax.make_jaxpr(on_device)(params, statistics, task.frozen, examples)
    except UserError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {[*str(error).splitlines(), ''][0]}"
        raise UserError(Problem("task.apply", said, allowed)) from error
    (call,) = (e for e in traced.jaxpr.eqns if e.primitive.name == "shard_map")
    program = call.params["jaxpr"]
    computed_in_parts = False
    for (path, leaf), outer in zip(
        jax.tree.leaves_with_path(params), traced.jaxpr.invars, strict=False
    ):
        own = program.invars[call.invars.index(outer)]
        reads, is_cut = _reads(program, own), own.aval.shape != leaf.shape
        operations = " and ".join(name.strip("_") for name in reads)
        name = f"{operations} of params{jax.tree_util.keystr(path)}"
        fits = not is_cut or reads in ([], [WHOLE], [PART])
        checks.require(fits, "task.apply", name, allowed)
        computed_in_parts |= PART in reads
    allowed = "a network whose layers several devices compute together, such as the transformer"
    checks.require(lies.model == 1 or computed_in_parts, "shard", given, allowed)
    checks.done()


def _reads(program: Any, variable: Any) -> list[str]:
    """The operations of a traced program that read a variable, within programs of it too."""
    found = []
    for equation in program.eqns:
        name = equation.params.get("name", equation.primitive.name)
        inner = [getattr(each, "jaxpr", each) for each in equation.params.values()]
        inner = [each for each in inner if len(getattr(each, "invars", ())) == len(equation.invars)]
        for place, atom in enumerate(equation.invars):
            if atom is variable:
                into = [] if name in (WHOLE, PART) else inner[:1]
                found += [r for each in into for r in _reads(each, each.invars[place])]
                found += [] if into else [name]
    return found
