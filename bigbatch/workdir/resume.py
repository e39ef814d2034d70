"""What a working directory holds, against what is asked for now.

What decides the result of a run (data, model, optimizer, seed, ghost batch, and the plan as far as
it has been trained) must be what it was. What the hardware asks for, and how often is logged,
evaluated and saved, may change at every start.
"""

import hashlib
import json
from collections.abc import Mapping, Set
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from bigbatch import distributed
from bigbatch.config.config import Config, read_config
from bigbatch.config.fields import UNITS
from bigbatch.errors import Problem, UserError
from bigbatch.schedule.plan import Plan
from bigbatch.workdir.checkpoint import Checkpoints, params_sha256
from bigbatch.workdir.files import Workdir, read_json, write_json, write_text

if TYPE_CHECKING:
    from bigbatch.engine.functions import State
    from bigbatch.training.run import Run

# Processes with other versions may compute something else.
_SAME_VERSIONS = ("bigbatch", "jax", "numpy", "optax")
_INTERVALS = ("log_every", "evaluate_every", "checkpoint_every", "keep_every")
# Fields that may change between two starts of a run.
_FREE_FIELDS = {
    "microbatch_examples_per_device",
    "shard_optimizer",
    "device_memory_bytes",
    "evaluation_batch_examples",
    "reestimate_examples",
    "keep_checkpoints",
    "data.directory",
    # Where it lies; what it holds is compared.
    "initial_params",
    "experiment",
    *(f"{interval}_{unit}" for interval in _INTERVALS for unit in UNITS),
}
# What a plan is made from: plans are compared instead. An adaptive run has no plan beforehand.
_PLAN_FIELDS = {"epochs", "policy", "transformations"}


def open_run(config: Config, files: Workdir, *, change_future: bool = False) -> Plan:
    """Claims a working directory for a run, new or begun.

    Args:
      config: what is asked for, from `network_file.identified`.
      files: the directory.
      change_future: whether the plan may differ from the directory's after what has been trained.

    With many processes all call it; process 0 writes, and the others read what it has written.

    Returns:
      The plan to train: the directory's own where the config still gives the same.

    Raises:
      UserError: the directory cannot be used, or holds another run; nothing in it was changed.
    """
    versions = {package: metadata.version(package) for package in _SAME_VERSIONS}
    asked = {
        **_flat(config.tree, {"data.directory", "initial_params"}),
        "change-future": change_future,
        "versions": versions,
        **distributed.devices(),
    }
    distributed.agree(asked, "value")
    plans: list[Plan] = []
    distributed.on_first(lambda: plans.append(_open(config, files, change_future)))
    plan = distributed.together(lambda: plans[0] if plans else _of_first(files))
    distributed.agree({"plan": plan.fingerprint}, "plan (a workdir that all processes see)")
    return plan


def _of_first(files: Workdir) -> Plan:
    """The plan that process 0 has written."""
    if not files.plan.exists():
        allowed = "a directory that all processes see; process 0 has written plan.json in its own"
        raise UserError(Problem("workdir", str(files.path), allowed))
    return read_plan(files)


def _open(config: Config, files: Workdir, change_future: bool) -> Plan:
    """What `open_run` does on the process that writes."""
    assert (config.initial_params is None) == (config.initial_params_sha256 is None), "identified"
    files.claim()
    tree = {"experiment": config.experiment, **config.tree}
    plan = config.plan
    if files.config.exists():
        check_same(files, config)
        if files.plan.exists():
            begun = read_plan(files)
            # What an adaptive run has decided, its checkpoint knows.
            adaptive = config.controller is not None
            plan = begun if adaptive else _continued(begun, config.plan, files, change_future)
            if plan is begun:
                if read_json(files.config) != tree:
                    write_json(files.config, tree)
                return plan
            files.result.unlink(missing_ok=True)
    write_json(files.config, tree)
    write_text(files.plan, plan.to_json())
    return plan


def read_plan(files: Workdir) -> Plan:
    """The plan of a run.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return Plan.from_json(files.plan.read_text(encoding="utf-8"))
    except (OSError, UserError) as error:
        raise UserError(
            Problem("workdir", str(files.plan), f"a readable plan ({error})")
        ) from error


def read_run_config(files: Workdir) -> Config:
    """The config of the run in a working directory."""
    tree = read_json(files.config)
    experiment = tree.pop("experiment", "")
    return read_config(tree, experiment)


def evaluate_run(files: Workdir) -> dict[str, Any]:
    """Evaluates the newest checkpoint of a run, with the config and plan in its directory.

    Returns:
      `updates` done at the checkpoint, `test_loss` and `test_accuracy`.

    Raises:
      UserError: there is no checkpoint yet, or a file is damaged.
    """
    from bigbatch.training.evaluate import evaluate

    run, state, updates = _newest(files)
    return {"updates": updates, **evaluate(run, state)}


def export_run(files: Workdir, out: Path) -> dict[str, Any]:
    """Writes the newest checkpoint's network as plain arrays that NumPy alone can read.

    Args:
      files: the run's directory.
      out: an npz file; `params/...` are the parameters, or their average where the optimizer keeps
        one, `running_statistics/...` those of batch norm, each by its place in the network.

    Returns:
      `updates` done at the checkpoint, how many `arrays`, and the `params_sha256` of those written.

    Raises:
      UserError: there is no checkpoint yet, a file is damaged, or `out` cannot be written.
    """
    from bigbatch.engine.transformations import evaluation_params
    from bigbatch.workdir import network_file

    _, state, updates = _newest(files)
    params = jax.device_get(evaluation_params(state.params, state.optimizer))
    network = network_file.Network(params, jax.device_get(state.running_statistics))
    arrays = network_file.write(out, network)
    return {"updates": updates, "arrays": arrays, "params_sha256": params_sha256(params)}


def _newest(files: Workdir) -> tuple["Run", "State", int]:
    """The run in a directory, its newest state that is whole, and the updates done at it."""
    from bigbatch.training.loop import restore
    from bigbatch.training.run import prepare

    run = prepare(read_run_config(files), read_plan(files))
    with Checkpoints(files.checkpoints) as checkpoints:
        state, progress = restore(run, checkpoints)
    if progress.updates == 0:
        allowed = "the directory of a run that has saved a checkpoint; this one has not yet"
        raise UserError(Problem("workdir", str(files.path), allowed))
    return run, state, progress.updates


def whose(config: Config) -> str:
    """A name of the run of a config: a hash of the fields that decide what it trains."""
    fields = json.dumps(
        _flat(config.tree, _FREE_FIELDS | _PLAN_FIELDS), sort_keys=True, default=str
    )
    return hashlib.sha256(fields.encode()).hexdigest()


def check_same(files: Workdir, config: Config) -> None:
    """Refuses a config that trains something else than the run in a working directory.

    Plans are not compared here; the policy of an adaptive run is.

    Raises:
      UserError: with every field that differs.
    """
    trees = read_json(files.config), config.tree
    adaptive = any(tree.get("policy", {}).get("name") == "adaptive" for tree in trees)
    free = _FREE_FIELDS if adaptive else _FREE_FIELDS | _PLAN_FIELDS
    before, now = (_flat(tree, free) for tree in trees)
    problems = [
        Problem(
            name,
            now.get(name, "nothing"),
            f"{before.get(name, 'nothing')!r}, with which the run in this workdir was begun, or a "
            "new workdir",
        )
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if problems:
        raise UserError(problems)


def _flat(tree: Mapping[str, Any], free: Set[str], prefix: str = "") -> dict[str, Any]:
    """The fields that are not free, by dotted name."""
    fields: dict[str, Any] = {}
    for name, value in tree.items():
        dotted = f"{prefix}{name}"
        if dotted in free:
            continue
        if isinstance(value, Mapping):
            fields |= _flat(value, free, f"{dotted}.")
        else:
            fields[dotted] = value
    return fields


def _continued(begun: Plan, asked: Plan, files: Workdir, change_future: bool) -> Plan:
    """The plan to go on with, if what has been trained allows it."""
    first = begun.diff(asked)
    if first is None:
        return begun
    with Checkpoints(files.checkpoints) as checkpoints:
        latest = checkpoints.latest()
    done = 0 if latest is None else latest[0]
    if first >= done and change_future:
        return asked
    if first >= done:
        allowed = (
            f"the plan of this workdir, which differs from update {first} on "
            f"({_words(begun, first)}); to change what comes after update {done}, the last one "
            "saved, add --change-future; or give a new workdir"
        )
    else:
        allowed = (
            f"the plan of this workdir as far as it is trained (update {done}), or a new workdir; "
            f"the first update that differs is {first} ({_words(begun, first)})"
        )
    raise UserError(Problem("plan", _words(asked, first), allowed))


def _words(plan: Plan, update: int) -> str:
    """An update of a plan in a few words."""
    if update >= plan.num_updates:
        return f"ends after {plan.num_updates} updates"
    row = plan.row(update)
    hyper = ", ".join(f"{name} {value:g}" for name, value in row.hyper.items())
    return f"batch size {row.batch_size}, {hyper}"
