"""Configs: nested plain values, read into one typed and validated value.

Nothing is believed, and all mistakes are reported together. Config files and the command line are
read in `bigbatch.config.file`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from bigbatch import models
from bigbatch.checks import Checks
from bigbatch.config.binding import bind
from bigbatch.config.fields import DataConfig, Every, Fields
from bigbatch.engine.optimizer import OPTIMIZERS, Optimizer
from bigbatch.errors import Problem, UserError, nearest_name
from bigbatch.layout.layout import Layout
from bigbatch.layout.sharing import layout_over
from bigbatch.schedule.adaptive.controller import Controller
from bigbatch.schedule.from_file import plan_file
from bigbatch.schedule.plan import Plan, make_plan
from bigbatch.schedule.policy import POLICIES, Policy
from bigbatch.schedule.transform import TRANSFORMATIONS


@dataclasses.dataclass(frozen=True)
class Config:
    """A validated config.

    Attributes:
      experiment: name of the experiment in its file.
      seed: of the initial parameters, the order of the examples and their augmentation.
      initial_params: an npz file, as `bigbatch export` writes it, with whose parameters and running
        statistics the run begins, the optimizer's state being fresh; None for random ones. Once the
        run has a checkpoint the file is not needed any more.
      initial_params_sha256: of what that file holds; None until `network_file.identified` has read
        it. Where it is given, another file is refused.
      epochs: length of the run.
      ghost_batch_examples: examples that share batch-norm statistics.
      microbatch_examples_per_device: the largest share of a microbatch that a device is given; a
        hardware quantity, without influence on the result. Less than a ghost batch lets
        neighbouring devices share one.
        With `"auto"` in the config the largest that could be of use, until `run.prepare` has found
        the largest that fits.
      automatic_microbatch: whether it is so.
      device_memory_bytes: of each device, for that; None for what the devices report.
      evaluation_batch_examples: examples evaluated at a time.
      full_batch_norm: takes batch-norm statistics over each update's whole batch, for comparison.
      shard_optimizer: divides the optimizer's state over the devices; a hardware quantity.
      label_smoothing: share of each label that is spread over all classes.
      reestimate_examples: training examples from which the running statistics are estimated anew
        before each evaluation; None to use those that training has kept.
      noise_small_batch_examples: examples of the small batches from which the gradient noise is
        measured; None to measure nothing. More than four in a device's share of a microbatch are a
        loop within a program, in which XLA's CPU client computes much slower: there let
        `microbatch_examples_per_device` be one to four small batches (noise_cpu.md).
      reproducible: sums exactly, so that devices and processes change no bit of the result. Each
        then computes one ghost batch (or small batch) in a call, however many would fit.
      data: the data set.
      model: a config of `bigbatch.models`.
      optimizer: one of `bigbatch.engine.optimizer`.
      plan: every update's batch size and hyperparameters; of an adaptive run, those that it would
        have if nothing grew.
      policy: what the plan was made from.
      controller: decides an adaptive run's updates while it runs; None for a planned one.
      source_plan: the plan of the policy before any transformation.
      log_every: interval of the training records.
      evaluate_every: interval of the evaluations.
      checkpoint_every: interval of the checkpoints.
      keep_checkpoints: how many of the newest are kept.
      keep_every: interval of checkpoints that are kept for good; None for none.
      tree: the plain nested values that all this was read from.
    """

    experiment: str
    seed: int
    initial_params: str | None
    initial_params_sha256: str | None
    epochs: float
    ghost_batch_examples: int
    microbatch_examples_per_device: int
    automatic_microbatch: bool
    device_memory_bytes: int | None
    evaluation_batch_examples: int
    full_batch_norm: bool
    shard_optimizer: bool
    label_smoothing: float
    reestimate_examples: int | None
    noise_small_batch_examples: int | None
    reproducible: bool
    data: DataConfig
    model: models.ModelConfig
    optimizer: Optimizer
    policy: Policy
    plan: Plan
    source_plan: Plan
    log_every: Every
    evaluate_every: Every
    checkpoint_every: Every
    keep_checkpoints: int
    keep_every: Every | None
    tree: Mapping[str, Any]
    controller: Controller | None = None

    @property
    def microbatch_unit_examples(self) -> int:
        """What a device's share of a microbatch holds whole numbers of, where it holds one."""
        return self.noise_small_batch_examples or self.ghost_batch_examples

    def layout(self, plan: Plan, devices: int) -> Layout:
        """How a plan's updates are cut over so many devices; see `sharing.layout_over`.

        The layout of an adaptive run is made for every batch size that can come.
        """
        return layout_over(
            plan if self.controller is None else self.controller.likely_batch_sizes,
            ghost_batch_examples=self.ghost_batch_examples,
            devices=devices,
            microbatch_examples_per_device=self.microbatch_examples_per_device,
            full_batch_norm=self.full_batch_norm,
            noise_small_batch_examples=self.noise_small_batch_examples,
            reproducible=self.reproducible,
        )


_GROUPS = ("data", "model", "optimizer", "policy")
_POLICIES = {**POLICIES, "plan_file": plan_file, "adaptive": Controller}


def read_config(tree: Mapping[str, Any], experiment: str = "") -> Config:
    """Reads nested values into a `Config`.

    Args:
      tree: the fields, as in a config file. `model`, `optimizer` and `policy` name one of
        `models.MODELS`, `optimizer.OPTIMIZERS` and `policy.POLICIES`, and hold its arguments beside
        the name; `transformations` is a list of such groups for `transform.TRANSFORMATIONS`,
        applied in the order written.
      experiment: its name, for the records.

    Returns:
      The config.

    Raises:
      UserError: with every mistake that was found.
    """
    problems: list[Problem] = []
    problems += [
        Problem(name, tree.get(name, "nothing"), "a group of fields")
        for name in _GROUPS
        if not isinstance(tree.get(name), Mapping)
    ]
    fields = _bind_top(_with_measurement(tree), problems)
    small_batch_examples = None
    if fields is not None:
        small_batch_examples = fields.noise_small_batch_examples or fields.ghost_batch_examples
    data: Any = None
    if isinstance(tree.get("data"), Mapping):
        data = bind(DataConfig, tree["data"], problems, prefix="data")
    model = _bind_named(models.MODELS, tree.get("model"), "model", problems, {})
    optimizer = _bind_named(OPTIMIZERS, tree.get("optimizer"), "optimizer", problems, {})
    context = {
        "train_examples": data.info.train_examples if data else None,
        "epochs": fields.epochs if fields else None,
        "batch_multiple_examples": fields.ghost_batch_examples if fields else None,
        "small_batch_examples": small_batch_examples,
    }
    source = _bind_named(_POLICIES, tree.get("policy"), "policy", problems, context)
    controller = source if isinstance(source, Controller) else None
    if controller is not None:
        source = controller.base_policy
        problems += _adaptive_problems(tree)
    policy = source
    for group in _transformations(tree, problems):
        prefix = f"transformations.{group.get('name', 'nothing')}"
        policy = _bind_named(
            TRANSFORMATIONS, group, prefix, problems, {**context, "policy": policy}
        )
    plan: Any = None
    source_plan: Any = None
    if policy is not None and fields is not None and data is not None:
        plan = _plan(policy, fields, data, tree, problems)
    if not problems:
        source_plan = plan if policy is source else _plan(source, fields, data, tree, problems)
    if not problems:
        problems += optimizer.plan_problems(plan.hypers)
    if problems:
        raise UserError(problems)
    return Config(
        experiment=experiment,
        seed=fields.seed,
        initial_params=fields.initial_params,
        initial_params_sha256=fields.initial_params_sha256,
        epochs=fields.epochs,
        ghost_batch_examples=fields.ghost_batch_examples,
        microbatch_examples_per_device=_most_per_device(fields, plan),
        automatic_microbatch=fields.microbatch_examples_per_device == "auto",
        device_memory_bytes=fields.device_memory_bytes,
        evaluation_batch_examples=fields.evaluation_batch_examples,
        full_batch_norm=fields.full_batch_norm,
        shard_optimizer=fields.shard_optimizer,
        label_smoothing=fields.label_smoothing,
        reestimate_examples=fields.reestimate_examples,
        noise_small_batch_examples=fields.noise_small_batch_examples,
        reproducible=fields.reproducible,
        data=data,
        model=model,
        optimizer=optimizer,
        policy=policy,
        plan=plan,
        source_plan=source_plan,
        log_every=fields.every("log_every"),
        evaluate_every=fields.every("evaluate_every"),
        checkpoint_every=fields.every("checkpoint_every"),
        keep_checkpoints=fields.keep_checkpoints,
        keep_every=fields.every_or_none("keep_every"),
        tree=tree,
        controller=controller,
    )


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
    allowed = "False with policy.name = 'adaptive', which measures the noise between ghost batches"
    whole = tree.get("full_batch_norm", False)
    checks.require(not whole, "full_batch_norm", whole, allowed, False)
    return checks.problems


def _bind_top(tree: Mapping[str, Any], problems: list[Problem]) -> Any:
    """Binds the plain fields; groups count among the names that a misspelt one is compared with."""
    fields = [field.name for field in dataclasses.fields(Fields)]
    names = [*fields, *_GROUPS, "transformations"]
    for name in [name for name in tree if name not in names]:
        allowed = "a field of the config: " + ", ".join(names)
        problems.append(Problem(name, tree[name], allowed, nearest_name(name, names)))
    return bind(Fields, {n: v for n, v in tree.items() if n in fields}, problems)


def _bind_named(
    registry: Mapping[str, Any],
    group: Any,
    prefix: str,
    problems: list[Problem],
    context: Mapping[str, Any],
) -> Any:
    """Binds the constructor that the group's field `name` names; None if there is no group."""
    if not isinstance(group, Mapping):
        return None
    name = group.get("name", "nothing")
    if not isinstance(name, str) or name not in registry:
        allowed = "one of " + ", ".join(registry)
        nearest = nearest_name(str(name), list(registry))
        problems.append(Problem(f"{prefix}.name", name, allowed, nearest))
        return None
    arguments = {field: value for field, value in group.items() if field != "name"}
    return bind(registry[name], arguments, problems, prefix=prefix, context=context)


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
    data: DataConfig,
    tree: Mapping[str, Any],
    problems: list[Problem],
) -> Any:
    """Makes the plan; its problems are given the names that their fields have in the config."""
    try:
        return make_plan(
            policy,
            train_examples=data.info.train_examples,
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


def _most_per_device(fields: Fields, plan: Plan) -> int:
    """The largest microbatch that is asked for; for "auto" one that holds any batch of the plan."""
    if fields.microbatch_examples_per_device != "auto":
        return fields.microbatch_examples_per_device
    unit = fields.noise_small_batch_examples or fields.ghost_batch_examples
    if fields.reproducible:
        return unit
    return -(-int(plan.batch_sizes.max()) // unit) * unit
