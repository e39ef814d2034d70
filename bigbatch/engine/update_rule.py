"""An optimizer as the compiled functions call it: `Rule`, made by `resolve` of any optimizer.

An optimizer is one of three things: one of `bigbatch.engine.optimizer`; a function of
hyperparameters that gives an Optax transformation, whose arguments say which columns of the plan it
follows; or a finished transformation with hyperparameters in its state. All three become the same:
a transformation that holds, somewhere in its state, `hyperparams` by name (as
`optax.inject_hyperparams` makes them), which are replaced before each update. Another value is no
other program.

>>> import jax.numpy as jnp, numpy as np, optax
>>> plan_hypers = {"learning_rate": np.array([0.5, 0.25]), "momentum": np.zeros(2)}
>>> def clipped(learning_rate, clip_norm=1.0):
...     return optax.chain(optax.clip_by_global_norm(clip_norm), optax.sgd(learning_rate))
>>> params = jnp.zeros(2)
>>> rule = resolve(clipped, plan_hypers, params)
>>> rule.hyper_names
('learning_rate',)
>>> hyper = {"learning_rate": 0.5}
>>> changes, _ = rule.update(jnp.array([3.0, 4.0]), rule.init(params), params, hyper, 8)
>>> [round(float(change), 3) for change in changes]
[-0.3, -0.4]
"""

import dataclasses
import functools
import inspect
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bigbatch.engine import in_any_order, transformations
from bigbatch.engine.optimizer import Optimizer, arguments, plan_problems
from bigbatch.engine.task import PyTree, wide
from bigbatch.errors import Problem, UserError


@dataclasses.dataclass(frozen=True)
class Rule:
    """An optimizer whose hyperparameters follow a plan.

    Parameters and gradients reach it in float32 at least, so that its state and hyperparameters are
    as precise. Equal rules have equal programs.

    Attributes:
      optimizer: as it was given.
      hyper_names: the hyperparameters that the plan sets.
      first: of a function of hyperparameters, those before the first update, by name.
      chosen_params: (optimizer's state, parameters) -> those to evaluate with; None: as
        `transformations.evaluation_params` finds them.
      name: for messages.
    """

    optimizer: Any
    hyper_names: tuple[str, ...] = ()
    first: tuple[tuple[str, float], ...] = ()
    chosen_params: Callable[[optax.OptState, PyTree], PyTree] | None = None
    name: str = dataclasses.field(default="", compare=False)

    @functools.cached_property
    def transformation(self) -> optax.GradientTransformationExtraArgs:
        """In Optax's form."""
        if isinstance(self.optimizer, Optimizer):
            return self.optimizer.transformation()
        made = self.optimizer
        if not isinstance(made, optax.GradientTransformation):
            hypers = dict(self.first)
            # What keeps its default is the function's own affair, and no array.
            others = arguments(made).keys() - hypers.keys()
            made = optax.inject_hyperparams(made, static_args=others)(**hypers)
        return optax.with_extra_args_support(made)

    def init(self, params: PyTree) -> optax.OptState:
        """The state before the first update."""
        params = jax.tree.map(wide, params)
        precision = jnp.result_type(*jax.tree.leaves(params))
        # A hyperparameter may have been given as a whole number.
        return _with_hyperparameters(
            lambda name, value: value.astype(precision) if name in self.hyper_names else value,
            jax.tree.map(_plain, self.transformation.init(params)),
        )

    def update(
        self,
        gradients: PyTree,
        state: optax.OptState,
        params: PyTree,
        hyper: Mapping[str, Any],
        num_examples: Any,
    ) -> tuple[PyTree, optax.OptState]:
        """One update.

        Args:
          gradients: of the mean loss, like the parameters.
          state: from `init` or the update before.
          params: before the update.
          hyper: a scalar for each of `hyper_names`.
          num_examples: how many examples the gradient is of, a scalar.

        Returns:
          What is to be added to the parameters, in float32 at least, and the new state.
        """
        state = _with_hyperparameters(
            lambda name, value: jnp.asarray(hyper[name], value.dtype) if name in hyper else value,
            state,
        )
        gradients, params = jax.tree.map(wide, (gradients, params))
        state = self._with_keys(state, params)
        changes, state = self.transformation.update(
            gradients, state, params, num_examples=num_examples
        )
        return changes, jax.tree.map(_plain, state)

    def _with_keys(self, state: optax.OptState, params: PyTree) -> optax.OptState:
        """The state with random keys where the transformation's own has them."""
        kinds: list[Any] = []

        def begin(params: PyTree) -> None:
            own = jax.tree.leaves(self.transformation.init(params))
            kinds.extend(jax.random.key_impl(leaf) if _is_key(leaf) else None for leaf in own)

        jax.eval_shape(begin, params)
        leaves, structure = jax.tree.flatten(state)
        keyed = [
            leaf if kind is None else jax.random.wrap_key_data(leaf, impl=kind)
            for leaf, kind in zip(leaves, kinds, strict=True)
        ]
        return jax.tree.unflatten(structure, keyed)

    def ordered(self, params: PyTree) -> set[str]:
        """What of an update of parameters of such shapes `in_any_order` leaves in an order."""
        state = jax.eval_shape(self.init, params)
        hyper = dict.fromkeys(self.hyper_names, 0.0)
        return in_any_order.ordered(jax.make_jaxpr(self.update)(params, state, params, hyper, 1.0))

    def evaluates_others(self, state: optax.OptState) -> bool:
        """Whether others are evaluated than those that are trained."""
        return self.chosen_params is not None or bool(transformations.kept_averages(state))

    def evaluation_params(self, state: optax.OptState, params: PyTree) -> PyTree:
        """The parameters to evaluate with, in the parameters' dtypes.

        Args:
          state: the optimizer's.
          params: those that were trained.
        """
        choose = self.chosen_params or transformations.evaluation_params
        chosen = choose(state, jax.tree.map(wide, params))
        return jax.tree.map(lambda leaf, param: leaf.astype(param.dtype), chosen, params)


def resolve(
    optimizer: Any,
    plan_hypers: Mapping[str, np.ndarray],
    params: PyTree,
    evaluation_params: Callable[[optax.OptState, PyTree], PyTree] | None = None,
) -> Rule:
    """The rule of an optimizer under a plan.

    Args:
      optimizer: one of `bigbatch.engine.optimizer`; or a function of hyperparameters by name that
        gives an Optax transformation: those that the plan has a column for follow it, the others
        keep their defaults; or an Optax transformation that holds `hyperparams` anywhere in its
        state: those that the plan has a column for follow it.
      plan_hypers: the plan's columns by name, one value an update.
      params: the parameters; shapes are enough.
      evaluation_params: (optimizer's state, parameters) -> those to evaluate with; None: the
        average that the state keeps, or that of schedule-free optimizers, else the parameters.

    Returns:
      The rule.

    Raises:
      UserError: the optimizer does not take what the plan sets, or cannot be traced.
    """
    rule = Rule(optimizer, chosen_params=evaluation_params)
    if isinstance(optimizer, Optimizer):
        problems = optimizer.plan_problems(plan_hypers)
        hyper_names = optimizer.hyper_names(plan_hypers)
        rule = dataclasses.replace(rule, hyper_names=hyper_names, name=optimizer.name)
    else:
        rule, problems = _of_transformation(rule, plan_hypers, params)
    if problems:
        raise UserError(problems)
    if not isinstance(optimizer, Optimizer) or evaluation_params is not None:
        _check_traced(rule, params)
    return rule


def _of_transformation(
    rule: Rule, plan_hypers: Mapping[str, np.ndarray], params: PyTree
) -> tuple[Rule, list[Problem]]:
    """The rule of a function or a finished transformation, and what the plan sets beyond it."""
    name = getattr(rule.optimizer, "__name__", type(rule.optimizer).__name__)
    if not isinstance(rule.optimizer, optax.GradientTransformation):
        rule = dataclasses.replace(rule, first=_first_values(rule.optimizer, name, plan_hypers))
    state = _traced("optimizer", name, rule.init, params)
    kinds = dict.fromkeys(re.findall(r"namedtuple\[(\w+)\]", str(jax.tree.structure(state))))
    kept = [kind for kind in kinds if not kind.startswith(("Inject", "Empty"))]
    name = f"{name} ({', '.join(kept)})" if kept else name
    hypers = _names_in(state, "hyperparams")
    problems = plan_problems("optimizer", name, hypers, plan_hypers)
    scheduled = [
        column for column in _names_in(state, "hyperparams_states") if column in plan_hypers
    ]
    if scheduled:
        allowed = f"a number for {', '.join(scheduled)}, which the plan sets, and no schedule"
        problems.append(Problem("optimizer", name, allowed))
    names = tuple(column for column in plan_hypers if column in hypers)
    return dataclasses.replace(rule, hyper_names=names, name=name), problems


def _first_values(
    function: Any, name: str, plan_hypers: Mapping[str, np.ndarray]
) -> tuple[tuple[str, float], ...]:
    """Of a function's arguments, those that the plan sets, as in the first update."""
    if not callable(function):
        allowed = (
            "one of bigbatch.engine.optimizer, a function of hyperparameters that gives an Optax "
            "transformation, or a transformation with hyperparameters in its state"
        )
        raise UserError(Problem("optimizer", function, allowed))
    columns = ", ".join(plan_hypers)
    missing = [
        argument
        for argument, default in arguments(function).items()
        if argument not in plan_hypers and default is inspect.Parameter.empty
    ]
    if missing:
        allowed = (
            f"a function whose arguments are columns of the plan ({columns}) or have defaults; "
            f"{', '.join(missing)} is neither"
        )
        raise UserError(Problem("optimizer", name, allowed))
    followed = [argument for argument in arguments(function) if argument in plan_hypers]
    return tuple((argument, float(plan_hypers[argument][0])) for argument in followed)


def _check_traced(rule: Rule, params: PyTree) -> None:
    """Refuses a rule whose updates or evaluation parameters do not have the shapes they start with.

    Raises:
      UserError: likewise where it cannot be traced.
    """
    state = _traced("optimizer", rule.name, rule.init, params)
    hyper = dict.fromkeys(rule.hyper_names, 0.0)
    _, after = _traced("optimizer", rule.name, rule.update, params, state, params, hyper, 1.0)
    _check_alike(
        "optimizer", rule.name, "an update that leaves its state's shapes and dtypes", after, state
    )
    if len(set(map(type, transformations.kept_averages(state)))) > 1 and not rule.chosen_params:
        allowed = "a function, as the optimizer keeps averages of two kinds"
        raise UserError(Problem("evaluation_params", None, allowed))
    chosen = _traced("evaluation_params", rule.name, rule.evaluation_params, state, params)
    _check_alike("evaluation_params", rule.name, "what has the parameters' shapes", chosen, params)


def _plain(leaf: Any) -> Any:
    """A random key as the numbers that are saved, and lie in parts, as others do."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _check_alike(field: str, name: str, allowed: str, tree: PyTree, like: PyTree) -> None:
    kinds = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), t) for t in (tree, like)]
    if kinds[0] != kinds[1]:
        raise UserError(Problem(field, name, allowed))


def _traced(field: str, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """The shapes of a function's results."""
    try:
        return jax.eval_shape(function, *arguments)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        allowed = f"what takes traced hyperparameters and these parameters; it ends in {reason}"
        raise UserError(Problem(field, name, allowed)) from error


def _names_in(state: optax.OptState, holder: str) -> list[str]:
    """The keys of every dict that is called `holder` in a state."""
    pairs = [
        pair for path, _ in jax.tree.leaves_with_path(state) for pair in itertools.pairwise(path)
    ]
    return sorted({key.key for where, key in pairs if where == jax.tree_util.GetAttrKey(holder)})


def _with_hyperparameters(
    function: Callable[[str, Any], Any], state: optax.OptState
) -> optax.OptState:
    """The state with `function(name, value)` in place of each hyperparameter, wherever it is."""

    def replaced(path: Any, leaf: Any) -> Any:
        # Adam's state has a `mu` too: only what is held as a hyperparameter is one.
        if path[-2:-1] == (jax.tree_util.GetAttrKey("hyperparams"),):
            return function(path[-1].key, leaf)
        return leaf

    return jax.tree.map_with_path(replaced, state)
