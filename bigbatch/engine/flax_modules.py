"""Tasks from Flax modules, NNX and Linen, whose own BatchNorm and Dropout work as they are.

A module with batch statistics or random numbers is called for each ghost batch by itself, under
`jax.vmap`. Otherwise it is called once.

A layer shows the statistic s of a ghost batch only in its update of the running one,
r <- m r + (1 - m) s. So in training each r is given as 0, and s is the update over 1 - m. The
factors m become the task's `running_decay`: `apply_update` goes as far as the layer would.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

from bigbatch.engine.ghost_batches import GHOST_STATISTICS, RUNNING_STATISTICS
from bigbatch.engine.task import Examples, PyTree, Sums, Task
from bigbatch.errors import Problem, UserError, among

Loss = Callable[[PyTree, Examples], Sums]
Inputs = Mapping[str, str] | None
MakeModel = Callable[[nnx.Rngs], nnx.Module]
Described = Mapping[str, jax.ShapeDtypeStruct]

BATCH_STATS = "batch_stats"
"""The collection in which Flax's layers keep running statistics."""
# By how much those fade with each ghost batch.
_DECAY = 0.9
# The parameters of `__call__` that are told the mode, and their values in training.
_MODES = {"train": True, "training": True, "deterministic": False, "use_running_average": False}
_NORMS = "bigbatch.models.ghost_norm.GhostNorm (Linen) or a norm without running statistics"


def from_nnx(
    make_model: MakeModel, loss: Loss, *, inputs: Inputs = None, frozen: Any = None, **options: Any
) -> Task:
    """A task from a Flax NNX module.

    The parameters of the module's `__call__` are entries of the examples; `train`, `training`,
    `deterministic` and `use_running_average` are told the mode, and the module its `train()` or
    `eval()`. In training its random streams start anew with each ghost batch, from its position. In
    evaluation nothing may be random.

    Args:
      make_model: makes the module; called several times, mostly by a trace.
      loss: as in `Task`; the outputs are what the module returns. Where it is called for each ghost
        batch, these are concatenated, and what has no axis of examples gets one of ghost batches.
      inputs: by parameter, the entries that have other names.
      frozen: an NNX filter: what stays as `make_model` gives it. Variables that are neither `Param`
        nor `BatchStat` always do.
      options: `metrics` and `minimised` of `Task`.

    Returns:
      A task to be made `for_examples`, given the shapes of one ghost batch.

    Raises:
      UserError: the module cannot be made, or the filter finds nothing. From `for_examples`: the
        module cannot be called with these examples, or keeps something that no update advances.
    """
    kept = nnx.Nothing() if frozen is None else frozen
    constant = nnx.Any(kept, nnx.Not(nnx.Any(nnx.Param, nnx.BatchStat)))
    kinds = nnx.RngState, constant, nnx.Param, nnx.BatchStat

    def made(key: jax.Array) -> list[PyTree]:
        _, *states = nnx.split(make_model(nnx.Rngs(key)), *kinds)
        return [nnx.to_pure_dict(state) for state in states]

    with _told():
        abstract = nnx.eval_shape(lambda: make_model(nnx.Rngs(0)))
        fixed = made(jax.random.key(0))[1] if nnx.state(abstract, *kinds)[1] else {}
    if frozen is not None and not nnx.state(abstract, kept):
        raise UserError(Problem("frozen", frozen, "an NNX filter of some of the model's variables"))

    def init(key: jax.Array, arguments: PyTree) -> tuple[PyTree, PyTree]:
        _, _, params, statistics = made(key)
        return params, {BATCH_STATS: statistics} if statistics else {}

    def call(variables: PyTree, key: jax.Array, arguments: PyTree, train: bool) -> Any:
        params, running, frozen = variables
        graphdef, *states = nnx.split(abstract, *kinds)
        leaves, tree = jax.tree.flatten(nnx.to_pure_dict(states[0]))
        leaves = [_stream(leaf, jax.random.fold_in(key, i)) for i, leaf in enumerate(leaves)]
        streams = jax.tree.unflatten(tree, leaves)
        values = streams, frozen or {}, params, running.get(BATCH_STATS, {})
        for state, value in zip(states, values, strict=True):
            nnx.replace_by_pure_dict(state, value)
        model = nnx.merge(graphdef, *states)
        (model.train if train else model.eval)()
        watched = nnx.Not(nnx.Any(nnx.RngState, kept, *[nnx.BatchStat] * train))
        before = flatten_dict(nnx.to_pure_dict(nnx.state(model, watched)))
        outputs = model(**arguments)
        after = flatten_dict(nnx.to_pure_dict(nnx.state(model, watched)))
        for path, value in after.items():
            if value is not before.get(path):
                allowed = "one that writes BatchStat variables alone, and in training alone"
                raise UserError(Problem("model", f"one that writes {_dotted(path)}", allowed))
        return outputs, {name: nnx.to_pure_dict(nnx.split(model, *kinds)[-1]) for name in running}

    return _task(type(abstract), (init, call, fixed), loss, inputs or {}, options)


def from_linen(
    module: linen.Module, loss: Loss, *, inputs: Inputs = None, frozen: Any = None, **options: Any
) -> Task:
    """A task from a Flax Linen module; see `from_nnx`.

    Besides Flax's layers it may have `bigbatch.models.ghost_norm.GhostNorm`, which forms ghost
    batches by itself, across devices too. What is sown is dropped.

    Args:
      module: the module.
      loss: as in `from_nnx`.
      inputs: as in `from_nnx`.
      frozen: arrays that stay as they are: a part of the tree of parameters, such as
        `{"backbone": ...}`, or of all variables, `{"params": ..., "batch_stats": ...}`.
      options: as in `from_nnx`.

    Returns:
      As `from_nnx`.

    Raises:
      UserError: from `for_examples`, as in `from_nnx`.
    """
    arrays = frozen if frozen and "params" in frozen else {"params": frozen or {}}
    fixed = flatten_dict(arrays)

    def without_frozen(flat: dict[tuple, Any]) -> dict[str, PyTree]:
        return unflatten_dict({path: leaf for path, leaf in flat.items() if path not in fixed})

    def init(key: jax.Array, arguments: PyTree) -> tuple[PyTree, PyTree]:
        flat = flatten_dict(module.init(key, **arguments))
        variables = without_frozen(flat)
        params = variables.pop("params", {})
        allowed = f"params and {BATCH_STATS}; others beside params in frozen"
        others = variables.keys() - {BATCH_STATS, RUNNING_STATISTICS}
        problems = [Problem("module", f"the collection {name}", allowed) for name in sorted(others)]
        allowed = "paths of the module's variables"
        unknown = [path for path in fixed if path not in flat]
        problems += [Problem("frozen", _dotted(path), allowed) for path in unknown]
        if problems:
            raise UserError(problems)
        return params, variables

    def call(variables: PyTree, key: jax.Array, arguments: PyTree, train: bool) -> Any:
        params, running, frozen = variables
        merged = flatten_dict({"params": params, **running}) | flatten_dict(frozen or {})
        # Streams of other names start from "params".
        rngs = {name: jax.random.fold_in(key, i) for i, name in enumerate(("params", "dropout"))}
        written = [BATCH_STATS, GHOST_STATISTICS] if train else []
        outputs, new = module.apply(unflatten_dict(merged), **arguments, rngs=rngs, mutable=written)
        new = {RUNNING_STATISTICS if k == GHOST_STATISTICS else k: v for k, v in new.items()}
        return outputs, without_frozen(flatten_dict(new))

    return _task(type(module), (init, call, arrays if fixed else ()), loss, inputs or {}, options)


def _task(
    kind: type, module: tuple[Any, Any, PyTree], loss: Loss, inputs: Any, options: dict[str, Any]
) -> Task:
    """A task that is made for the examples' shapes, once for equal ones.

    Args:
      kind: the module's class.
      module: (key, arguments) -> (parameters, running statistics by collection); ((parameters,
        running statistics, frozen), key, arguments, train) -> (outputs, running statistics as the
        module leaves them); the frozen arrays.
      loss: as in `Task`.
      inputs: as in `from_nnx`.
      options: of `Task`.
    """
    init_module, call_module, frozen = module

    @functools.cache
    def made(items: tuple[tuple[str, jax.ShapeDtypeStruct], ...]) -> Task:
        shapes = {name: shape for name, shape in items if name not in ("key", "ghost_mask")}
        entries = _entries(kind, inputs, shapes)
        modes = _MODES.keys() & inspect.signature(kind.__call__).parameters
        keys = jax.ShapeDtypeStruct((*items[0][1].shape[:1], 2), np.uint32)
        with_keys = {**shapes, "key": keys}

        def arguments(examples: Examples, train: bool) -> dict[str, Any]:
            told = {name: _MODES[name] == train for name in modes}
            return told | {name: examples[e] for name, e in entries.items() if e in examples}

        def init(key: jax.Array) -> tuple[PyTree, PyTree]:
            with _told():
                return init_module(key, arguments(jax.tree.map(_zeros, with_keys), True))

        def call(key: jax.Array, variables: PyTree, examples: Examples, train: bool = True) -> Any:
            with _told():
                return call_module(variables, key, arguments(examples, train), train)

        def apply(
            params: PyTree, statistics: PyTree, examples: Examples, train: bool, frozen: PyTree = ()
        ) -> tuple[PyTree, PyTree]:
            if not train or shares:
                return call(jax.random.key(0), (params, statistics, frozen), examples, train)
            zeros = jax.tree.map(jnp.zeros_like, statistics)

            def ghost_batch(examples: Examples) -> tuple[PyTree, PyTree]:
                words = examples["key"][0] if draws else jnp.zeros(2, jnp.uint32)
                key = jax.random.wrap_key_data(words, impl="threefry2x32")
                outputs, new = call(key, (params, zeros, frozen), examples)
                for name, tree in decays.items():
                    # 1 - m is rounded as the layer rounds it.
                    updates = jax.tree.map(lambda b, m: (b / (1 - m))[None], new[name], tree)
                    new[name] = jax.tree.map(lambda s, r: s.astype(r.dtype), updates, zeros[name])
                return outputs, new

            split = (len(examples["ghost_mask"]), -1)
            parts = {k: examples[k] for k in examples.keys() & with_keys}
            parts = jax.tree.map(lambda array: array.reshape(*split, *array.shape[1:]), parts)
            results = jax.vmap(ghost_batch)(parts)
            return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), results)

        a_key = jax.eval_shape(jax.random.key, 0)
        variables = (*jax.eval_shape(init, a_key), frozen)
        if _depends(functools.partial(call, train=False), a_key, variables, shapes):
            allowed = "a module that draws no random numbers in evaluation"
            raise UserError(Problem("model", kind.__name__, allowed))
        draws = _depends(call, a_key, variables, with_keys)
        decays = _decays(call, variables, with_keys)
        shares = not (draws or decays)
        return Task(
            init,
            apply,
            loss,
            running_decay=jax.tree.map(lambda _: _DECAY, variables[1]) | decays,
            takes_keys=draws or "key" in entries.values(),
            frozen=frozen,
            shares_ghost_batches=shares,
            **options,
        )

    def for_examples(shapes: Described) -> Task:
        return made(tuple(sorted(shapes.items())))

    return Task(init_module, call_module, loss, frozen=frozen, for_examples=for_examples, **options)


def _entries(kind: type, inputs: Mapping[str, str], shapes: Described) -> dict[str, str]:
    """Which entry of the examples each parameter of a module's `__call__` is."""
    _, *parameters = inspect.signature(kind.__call__).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    names = [p.name for p in named if p.name not in _MODES]
    required = [p.name for p in named if p.default is p.empty and p.name in names]
    entries = {name: name for name in names if name in shapes} | dict(inputs)
    given = {name: entries.get(name) for name in [*required, *inputs]}
    words = f"for a parameter of {kind.__name__}.__call__ an entry of the examples: "
    problems = [
        Problem(f"inputs.{name}", entry, *among(entry or name, shapes, words))
        for name, entry in given.items()
        if entry not in (*shapes, "key")
    ]
    if problems:
        raise UserError(problems)
    return entries


def _decays(call: Callable[..., Any], variables: PyTree, shapes: Described) -> dict[str, PyTree]:
    """The factor m by which each batch statistic fades with an update; {} where there are none.

    It is the update's derivative, of which XLA computes nothing but m.

    Raises:
      UserError: an update has another form, or something reads a statistic in training.
    """
    if BATCH_STATS not in variables[1]:
        return {}
    flat = dict(sorted(flatten_dict(variables[1][BATCH_STATS]).items()))
    everything = flat, variables, shapes

    def called(flat: PyTree, variables: PyTree, examples: Examples) -> tuple[PyTree, PyTree]:
        params, running, frozen = variables
        running = {**running, BATCH_STATS: unflatten_dict(flat)}
        outputs, new = call(jax.random.key(0), (params, running, frozen), examples)
        return outputs, flatten_dict(new[BATCH_STATS])

    def outputs(some: PyTree, others: PyTree, *rest: PyTree) -> PyTree:
        return called(others | some, *rest)[0]

    def factors(everything: PyTree) -> list[jax.Array]:
        leaves, draws = jax.tree.leaves(everything), np.random.default_rng(0)
        old, rest = leaves[: len(flat)], leaves[len(flat) :]
        # Different ones, so that a mixture of statistics does not look like one.
        steps = [jnp.asarray(2.0 ** draws.integers(8, size=r.shape), r.dtype) for r in old]
        moves = jax.jvp(lambda *old: update(*old, *rest), old, steps)[1]
        return [move / step for move, step in zip(moves, steps, strict=True)]

    jaxpr = jax.make_jaxpr(lambda *everything: called(*everything)[1])(*everything)
    update = jaxpr_as_fun(_unstopped(jaxpr))
    wrong = [path for path, r in flat.items() if not jnp.issubdtype(r.dtype, jnp.floating)]
    if not wrong and _depends(outputs, flat, {}, *everything[1:]):
        wrong = [path for path in flat if _depends(outputs, {path: flat[path]}, *everything)]
    if not wrong and _depends(factors, everything):
        each = [lambda everything, i=i: factors(everything)[i] for i in range(len(flat))]
        wrong = [path for path, of in zip(flat, each, strict=True) if _depends(of, everything)]
    decays = {}
    found = [] if wrong else jax.jit(lambda: factors(jax.tree.map(_zeros, everything)))()
    for path, ratios in zip(flat, found, strict=False):
        values = np.ravel(ratios).astype(flat[path].dtype)
        m = values[0]
        if not (0 < m < 1 and np.all(values == m)):
            wrong.append(path)
        shortest = (round(float(m), digits) for digits in range(20))
        decays[path] = next((d for d in shortest if values.dtype.type(d) == m), float(m))
    allowed = "one that nothing reads in training and whose update is affine, r <- m r + b(x), "
    allowed += f"0 < m < 1; frozen, if it is to stay; else use {_NORMS}"
    if wrong:
        names = [_dotted((BATCH_STATS, *path)) for path in wrong]
        raise UserError(Problem(name, "a running statistic", allowed) for name in names)
    return {BATCH_STATS: unflatten_dict(decays)}


def _unstopped(value: Any) -> Any:
    """A jaxpr whose derivative goes through `stop_gradient`, which NNX puts around updates."""
    # From JAX 0.12 on the two are one type, its own `jaxpr`.
    if isinstance(value, ClosedJaxpr) and value.jaxpr is not value:
        return value.replace(jaxpr=_unstopped(value.jaxpr))
    if not isinstance(value, Jaxpr):
        return value
    equations = []
    for equation in value.eqns:
        stops = equation.primitive.name == "stop_gradient"
        primitive = jax.lax.copy_p if stops else equation.primitive
        params = jax.tree.map(_unstopped, equation.params)
        equations.append(equation.replace(primitive=primitive, params=params))
    return value.replace(eqns=equations)


def _depends(function: Callable[..., PyTree], value: PyTree, *rest: PyTree) -> bool:
    """Whether results depend on the first argument, as far as the operations tell; by a trace."""
    twice = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype), value)
    mapped = jax.vmap(function, in_axes=(0, *[None] * len(rest)), out_axes=None)
    try:
        jax.eval_shape(mapped, twice, *rest)
    except UserError:
        raise
    except ValueError:  # Some result is mapped.
        return True
    return False


def _zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(leaf.shape, leaf.dtype)


def _stream(leaf: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
    """The start of a random stream: its key, or keys, or its count of draws."""
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return _zeros(leaf)
    return jax.random.split(key, leaf.shape) if leaf.shape else key


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turns what a user's module raises into a sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = (str(error).splitlines() or [""])[0]
        allowed = "a Flax module that JAX can trace with these examples"
        if isinstance(error, NameError) and "axis name" in text:
            allowed = f"layers without axis_name; for ghost batches across devices {_NORMS}"
        raise UserError(Problem("model", f"{type(error).__name__}: {text}", allowed)) from error
