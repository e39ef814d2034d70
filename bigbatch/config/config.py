"""Configs: nested plain values, read into one typed and validated value.

Nothing is believed, and all mistakes are reported together. Config files and the command line are
read in `bigbatch.config.file`; `bigbatch.config.assemble` makes a run of a config.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bigbatch import models
from bigbatch.checks import Checks, statistical
from bigbatch.config.binding import bind
from bigbatch.config.fields import Fields
from bigbatch.config.lengths import facts_of, in_examples, tokens_per_example
from bigbatch.data import sets
from bigbatch.engine.optimizer import OPTIMIZERS
from bigbatch.errors import Problem, UserError, among
from bigbatch.layout.layout import Layout
from bigbatch.layout.sharing import layout_over
from bigbatch.schedule.adaptive.controller import Controller
from bigbatch.schedule.from_file import plan_file
from bigbatch.schedule.intervals import Intervals
from bigbatch.schedule.plan import Plan, make_plan
from bigbatch.schedule.policy import POLICIES, Policy
from bigbatch.schedule.trainers.levanter import levanter
from bigbatch.schedule.trainers.maxtext import maxtext
from bigbatch.schedule.trainers.megatron import megatron
from bigbatch.schedule.trainers.olmo_core import olmo_core
from bigbatch.schedule.transform import TRANSFORMATIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Fields):
    """A validated config.

    Attributes:
      experiment: name of the experiment in its file.
      data: a bundled or prepared data set; or a `bigbatch.Data` of the user's.
      model: of a bundled task, image classification or a language model; None with a `task`.
      task: a `bigbatch.Task` of the user's; None with a `model`.
      optimizer: one of `bigbatch.engine.optimizer`, or the user's.
      plan: every update's batch size and hyperparameters; of an adaptive run, those that it would
        have if nothing grew.
      policy: what the plan was made from.
      source_plan: the plan of the policy before any transformation.
      tree: the plain nested values that all this was read from.
      groups: the groups' fields that decide the result, with their defaults, by the group's name.
      sources: the config's file, and those of the modules beside it that it names.
      controller: decides an adaptive run's updates while it runs; None for a planned one.
    """

    experiment: str
    data: Any
    model: models.ModelConfig | models.TransformerConfig | None
    task: Any
    optimizer: Any
    policy: Policy
    plan: Plan
    source_plan: Plan
    tree: Mapping[str, Any]
    groups: Mapping[str, Mapping[str, Any]]
    controller: Controller | None = None
    sources: tuple[Path, ...] = ()

    @property
    def intervals(self) -> dict[str, Any]:
        """When the run logs, evaluates and saves: those arguments of `training.loop.train`."""
        return {name: getattr(self, name) for name in Intervals.names()}

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result beside the plan, as plain values by name."""
        plain = statistical(self)
        names = [field.name for field in dataclasses.fields(Fields) if field.name in plain]
        # The length of the run is compared in its plan.
        return {name: plain[name] for name in names if name != "epochs"} | dict(self.groups)

    @property
    def unit_examples(self) -> int:
        """What a device's share of a microbatch holds whole numbers of, where it holds one."""
        return self.noise_small_batch_examples or self.ghost_batch_examples

    def layout(self, plan: Plan, devices: int) -> Layout:
        """How a plan's updates are cut over so many devices; see `sharing.layout_over`.

        The layout of an adaptive run is made for every batch size that can come. With "auto" a
        device is given whatever could be of use.
        """
        sizes = plan.batch_sizes
        if self.controller is not None:
            sizes = self.controller.likely_batch_sizes
        share = self.microbatch_examples_per_device
        if share == "auto":
            share = -(-int(sizes.max()) // self.unit_examples) * self.unit_examples
        return layout_over(
            sizes,
            ghost_batch_examples=self.ghost_batch_examples,
            devices=devices,
            microbatch_examples_per_device=share,
            noise_small_batch_examples=self.noise_small_batch_examples,
            reproducible=self.reproducible,
        )


_GROUPS = ("data", "model", "task", "optimizer", "policy")
_RENAMED = {"shard_optimizer": ('shard = "none" or "update", as it is called now', "shard")}
_POLICIES = {
    **POLICIES,
    "plan_file": plan_file,
    # Its file is a plan's, with the length of the recipe (`config.lengths`).
    "fastest": plan_file,
    "megatron": megatron,
    "levanter": levanter,
    "maxtext": maxtext,
    "olmo_core": olmo_core,
    "adaptive": Controller,
}


# The groups that may name a callable of the user's.
_OWN = ("task", "data", "optimizer", "policy")
# What it gives, by what it has.
_EXPECTED = {
    "task": ("minimised", "a callable that gives a bigbatch.Task"),
    "data": ("train_examples", "a callable that gives a bigbatch.Data"),
    "policy": ("at", "a callable that gives a bigbatch.Policy"),
}


def no_callable(name: str) -> Callable[..., Any]:
    """Refuses a callable of the user's: what a working directory names is never run."""
    allowed = "a bundled name. Callables of your own are named by a config file: give --config"
    raise UserError(Problem("", name, allowed))


def read_config(
    tree: Mapping[str, Any],
    experiment: str = "",
    named: Callable[[str], Callable[..., Any]] = no_callable,
) -> Config:
    """Reads nested values into a `Config`.

    Args:
      tree: the fields, as in a config file. `model`, `optimizer` and `policy` name one of
        `models.MODELS`, `optimizer.OPTIMIZERS` and `policy.POLICIES`, and hold its arguments beside
        the name; `transformations` is a list of such groups for `transform.TRANSFORMATIONS`,
        applied in the order written. `task` (in place of `model`), `data`, `optimizer` and `policy`
        may also name "package.module:callable". `tokens` in place of `epochs` is the length of the
        run in tokens, and a batch size may be a text such as "4Mi_tokens".
      experiment: its name, for the records.
      named: gives the callable of such a name, or raises a UserError.

    Returns:
      The config.

    Raises:
      UserError: with every mistake that was found.
    """
    problems: list[Problem] = []
    taught = "task" if "task" in tree else "model"
    problems += [
        Problem(name, tree.get(name, "nothing"), "a group of fields")
        for name in ("data", taught, "optimizer", "policy")
        if not isinstance(tree.get(name), Mapping)
    ]
    if "task" in tree and "model" in tree:
        problems.append(Problem("model", tree["model"], "none with a task, which has its own"))
    reader = _Reader(named, problems)
    data = reader.group("data", tree, {}, otherwise=sets.options_of(tree.get("data")))
    given_tree, tree = tree, in_examples(tree, data, problems)
    fields = _bind_top(_with_measurement(tree), problems)
    model = reader.group("model", tree, models.MODELS)
    task = reader.group("task", tree, {})
    optimizer = reader.group("optimizer", tree, OPTIMIZERS)
    context = {
        "train_examples": facts_of(data).train_examples if data is not None else None,
        # 0: the data does not say, or is not known.
        "tokens_per_example": tokens_per_example(data) or 0,
        "epochs": fields.epochs if fields else None,
        "batch_multiple_examples": fields.ghost_batch_examples if fields else None,
        "small_batch_examples": fields
        and (fields.noise_small_batch_examples or fields.ghost_batch_examples),
    }
    source = reader.group("policy", tree, _POLICIES, context)
    controller = source if isinstance(source, Controller) else None
    if controller is not None:
        source = controller.base_policy
        problems += _adaptive_problems(tree)
    else:
        # Plans are compared in its place; an adaptive run has none beforehand.
        reader.groups.pop("policy", None)
    if model is not None and data is not None and "task" not in tree:
        found = model.problems(facts_of(data))
        problems += [problem.under("model") for problem in found]
    smooths = isinstance(model, models.ModelConfig | None) and "task" not in tree
    if fields is not None and fields.label_smoothing and not smooths:
        allowed = "0 but for images: the loss of a task or a language model is its own"
        problems.append(Problem("label_smoothing", fields.label_smoothing, allowed, 0.0))
    policy = source
    for group in _transformations(tree, problems):
        prefix = f"transformations.{group.get('name', 'nothing')}"
        policy = reader.bound(group, prefix, TRANSFORMATIONS, {**context, "policy": policy})
    plan: Any = None
    source_plan: Any = None
    if policy is not None and fields is not None and data is not None:
        plan = _plan(policy, fields, context, tree, problems)
        try:
            Intervals.of(vars(fields), tokens_per_example=context["tokens_per_example"])
        except UserError as error:
            told = {problem.field for problem in problems}
            problems += [problem for problem in error.problems if problem.field not in told]
    if not problems:
        source_plan = plan
        if policy is not source:
            source_plan = _plan(source, fields, context, tree, problems)
    if not problems and hasattr(optimizer, "plan_problems"):
        problems += optimizer.plan_problems(plan.hypers)
    if problems:
        raise UserError(problems)
    return Config(
        **vars(fields),
        experiment=experiment,
        data=data,
        model=model,
        task=task,
        optimizer=optimizer,
        policy=policy,
        plan=plan,
        source_plan=source_plan,
        tree=given_tree,
        groups=reader.groups,
        controller=controller,
    )


class _Reader:
    """Binds the groups of a config.

    Attributes:
      groups: what each bound group's fields are, by the group's name, defaults included.
    """

    def __init__(self, named: Callable[[str], Callable[..., Any]], problems: list[Problem]):
        self._named, self._problems = named, problems
        self.groups: dict[str, dict[str, Any]] = {}

    def group(
        self,
        name: str,
        tree: Mapping[str, Any],
        registry: Mapping[str, Any],
        context: Mapping[str, Any] | None = None,
        otherwise: Callable[..., Any] | None = None,
    ) -> Any:
        """What a group of the config stands for; None if there is none, or it is wrong.

        Args:
          name: of the group.
          tree: the config.
          registry: bundled constructors by name.
          context: see `bind`.
          otherwise: the constructor of any other name, of which the name is an argument.
        """
        group = tree.get(name)
        if not isinstance(group, Mapping):
            return None
        value = self.bound(group, name, registry, context or {}, otherwise)
        if value is not None:
            given = {k: v for k, v in group.items() if k != "name"}
            if dataclasses.is_dataclass(value) and ":" not in str(group.get("name")):
                given = statistical(value)
            else:
                parameters = inspect.signature(self._named(group["name"])).parameters.values()
                empty = inspect.Parameter.empty
                given = {p.name: p.default for p in parameters if p.default is not empty} | given
            self.groups[name] = {**given, "name": group.get("name")}
        return value

    def bound(
        self,
        group: Mapping[str, Any],
        prefix: str,
        registry: Mapping[str, Any],
        context: Mapping[str, Any],
        otherwise: Callable[..., Any] | None = None,
    ) -> Any:
        """Binds the constructor that the group's field `name` names."""
        name = group.get("name", "nothing")
        arguments = {field: value for field, value in group.items() if field != "name"}
        constructor = otherwise
        is_own = prefix in _OWN and isinstance(name, str) and ":" in name
        if is_own:
            try:
                constructor = self._named(name)
            except UserError as error:
                self._problems += [problem.under(f"{prefix}.name") for problem in error.problems]
                return None
        elif otherwise is not None:
            arguments = dict(group)
        elif isinstance(name, str) and name in registry:
            constructor = registry[name]
        else:
            allowed, nearest = among(name, registry)
            allowed += ', "package.module:callable"' * (prefix in _OWN)
            self._problems.append(Problem(f"{prefix}.name", name, allowed, nearest))
            return None
        assert constructor is not None
        value = bind(constructor, arguments, self._problems, prefix=prefix, context=context)
        expected = _EXPECTED.get(prefix)
        # Where there is another mistake, None may mean that nothing was called.
        made = value is not None or not self._problems
        if made and is_own and expected and not hasattr(value, expected[0]):
            given = f"{name}, which gives a {type(value).__name__}"
            self._problems.append(Problem(f"{prefix}.name", given, expected[1]))
            return None
        return value


def _with_measurement(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields; an adaptive run measures the noise, by default from its ghost batches."""
    policy, name = tree.get("policy"), "noise_small_batch_examples"
    adaptive = isinstance(policy, Mapping) and policy.get("name") == "adaptive"
    if not adaptive or tree.get(name) is not None or "ghost_batch_examples" not in tree:
        return tree
    return {**tree, name: tree["ghost_batch_examples"]}


def _adaptive_problems(tree: Mapping[str, Any]) -> list[Problem]:
    """What an adaptive run cannot have beside its policy."""
    checks = Checks()
    allowed = "none with policy.name = 'adaptive', which makes its recipe while it runs"
    names = [group.get("name", "nothing") for group in _transformations(tree, [])]
    checks.require(not names, "transformations", names, allowed, [])
    return checks.problems


def _bind_top(tree: Mapping[str, Any], problems: list[Problem]) -> Any:
    """Binds the plain fields; groups count among the names that a misspelt one is compared with."""
    fields = [field.name for field in dataclasses.fields(Fields)]
    names = [*fields, *_GROUPS, "transformations", "tokens"]
    problems += [
        Problem(name, value, *_RENAMED.get(name, among(name, names, "a field of the config: ")))
        for name, value in tree.items()
        if name not in names
    ]
    return bind(Fields, {n: v for n, v in tree.items() if n in fields}, problems)


def _transformations(tree: Mapping[str, Any], problems: list[Problem]) -> list[Mapping[str, Any]]:
    """The groups of the list `transformations`."""
    value = tree.get("transformations", ())
    if isinstance(value, list | tuple) and all(isinstance(group, Mapping) for group in value):
        return list(value)
    allowed = "a list of groups of fields, each with a name"
    problems.append(Problem("transformations", value, allowed))
    return []


def _plan(
    policy: Policy,
    fields: Fields,
    context: Mapping[str, Any],
    tree: Mapping[str, Any],
    problems: list[Problem],
) -> Any:
    """Makes the plan; its problems are given the names that their fields have in the config."""
    try:
        return make_plan(
            policy,
            train_examples=context["train_examples"],
            tokens_per_example=context["tokens_per_example"] or None,
            epochs=fields.epochs,
            batch_multiple_examples=fields.ghost_batch_examples,
        )
    except UserError as error:
        found = [_named_as_in(tree, problem) for problem in error.problems]
        # Where a value is not the config's own, it is a mended one: its mistake is known already.
        problems.extend(problem for problem, is_own in found if is_own or not problems)
        return None


def _named_as_in(tree: Mapping[str, Any], problem: Problem) -> tuple[Problem, bool]:
    """The problem under its field's dotted name, and whether the config holds the value there."""
    # What the arithmetic calls a multiple is this field of a config.
    allowed = problem.allowed.replace("batch_multiple_examples", "ghost_batch_examples")
    problem = dataclasses.replace(problem, allowed=allowed)
    groups = [("policy", tree["policy"])]
    groups += [(f"transformations.{g['name']}", g) for g in _transformations(tree, [])]
    for prefix, group in groups:
        if problem.field in group and group[problem.field] == problem.given:
            return problem.under(prefix), True
    return problem, False
