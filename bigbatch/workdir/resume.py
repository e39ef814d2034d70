"""What a working directory holds, against what is asked for now.

A run is its *identity*, plain values by dotted name that decide the result, and its plan. The
identity must be what it was, value for value as the run uses them; the plan as far as it has been
trained. Everything else may differ at every start: the hardware, where files lie, how often is
logged, evaluated and saved.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bigbatch import distributed
from bigbatch.errors import Problem, UserError
from bigbatch.places.paths import is_bucket
from bigbatch.schedule.plan import Plan
from bigbatch.workdir import starts, storage
from bigbatch.workdir.checkpoint import Checkpoints, version
from bigbatch.workdir.files import Workdir, read_json, write_json

# Processes with other versions may compute something else.
_SAME_VERSIONS = ("bigbatch", "jax", "numpy", "optax")
# Where files lie may differ between hosts.
_ELSEWHERE = ("data.directory", "data.path", "initial_params", "policy.path")

_FINGERPRINT = ".fingerprint."


def open_run(
    files: Workdir,
    identity: Mapping[str, Any],
    plan: Plan,
    *,
    record: Mapping[str, Any],
    metrics: Sequence[str] | None = None,
    adaptive: bool = False,
    change_future: bool = False,
    from_update: int | None = None,
    sources: Sequence[Path] = (),
) -> Plan:
    """Claims a working directory for a run, new or begun. May be called again.

    Process 0 holds it from then on, so that nobody else trains in it, until it is `released`.

    Args:
      files: the directory.
      identity: what decides the result, beside the plan.
      plan: what is asked for.
      record: nested plain values for config.json, which nothing is decided by.
      metrics: names of the task's metrics, the main one first; None where they are not known yet.
      adaptive: whether the plan is made while the run goes on; then the directory's own counts.
      change_future: whether the plan may differ from the directory's after what has been trained.
      from_update: goes back to the checkpoint with so many updates done.
      sources: files of the user's that are copied for the record.

    With many processes all call it; process 0 writes, and the others read what it has written.

    Returns:
      The plan to train: the directory's own where the same is asked for.

    Raises:
      UserError: the directory cannot be used, or holds another run; nothing in it was changed.
    """
    identity = plain(identity)
    versions = {package: version(package) for package in _SAME_VERSIONS}
    facts = {"plan": plan.fingerprint, "change-future": change_future, "versions": versions}
    # Two directories may be one, by another name on each host; a bucket's has one name.
    facts["workdir"] = str(files.path) if is_bucket(files.path) else "no bucket"
    asked = {**flat(plain(record)), **flat(identity), **facts, **distributed.devices()}
    distributed.agree({**asked, **dict.fromkeys(_ELSEWHERE)}, "value")
    plans: list[Plan] = []

    def open_first() -> None:
        is_start = files.claim()
        chosen = plan
        if from_update is not None:
            files.expect_run()
        if files.config.exists():
            check_same(files, identity)
            if from_update is not None:
                with Checkpoints(files.checkpoints) as checkpoints:
                    checkpoints.go_back(from_update)
                files.result.unlink(missing_ok=True)
            if files.plan.exists():
                begun = read_plan(files)
                # What an adaptive run has decided, its checkpoint knows.
                chosen = begun if adaptive else _continued(begun, plan, files, change_future)
                if chosen is not begun:
                    files.result.unlink(missing_ok=True)
        described = {"bigbatch": versions["bigbatch"], "metrics": metrics, "identity": identity}
        if metrics is None and files.run.exists():
            described["metrics"] = read_json(files.run).get("metrics")
        for path, value in ((files.config, plain(record)), (files.run, plain(described))):
            if not path.exists() or read_json(path) != value:
                write_json(path, value)
        if not files.plan.exists() or chosen is plan:
            storage.put(files.plan, chosen.to_json())
        for source in sources:
            storage.claim(files.source, "workdir")
            storage.put(files.source / source.name, storage.read(source))
        if is_start and not files.result.exists():
            starts.note(files, sources)
        plans.append(chosen)

    try:
        distributed.on_first(open_first)
    except BaseException:
        storage.release(files.lock)
        raise
    chosen = distributed.together(lambda: plans[0] if plans else _of_first(files))
    distributed.agree({"plan": chosen.fingerprint}, "plan (a workdir that all processes see)")
    return chosen


def _of_first(files: Workdir) -> Plan:
    """The plan that process 0 has written."""
    if not files.plan.exists():
        allowed = "a directory that all processes see; process 0 has written plan.json in its own"
        raise UserError(Problem("workdir", str(files.path), allowed))
    return read_plan(files)


def read_plan(files: Workdir) -> Plan:
    """The plan of a run.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return Plan.from_json(storage.read(files.plan))
    except (OSError, UserError) as error:
        raise UserError(
            Problem("workdir", str(files.plan), f"a readable plan ({error})")
        ) from error


def whose(identity: Mapping[str, Any]) -> str:
    """A name of a run: a hash of its identity."""
    text = json.dumps(plain(identity), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_same(files: Workdir, identity: Mapping[str, Any]) -> None:
    """Refuses an identity that is not that of the run in a working directory.

    Raises:
      UserError: with every value that differs; or an older version has begun the run.
    """
    before = (
        flat(read_json(files.run, {"identity": dict})["identity"]) if files.run.exists() else None
    )
    now = flat(plain(identity))
    told = {name for name in now if _FINGERPRINT in name}
    if before is None or (told and not any(_FINGERPRINT in name for name in before)):
        allowed = (
            "a new workdir: this run was begun by an older bigbatch, whose records say less of it "
            "(no fingerprint of its data). Finish it with that version, or `bigbatch export` its "
            "network with that version and begin here with initial_params"
        )
        raise UserError(Problem("workdir", str(files.path), allowed))
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


def plain(value: Any) -> Any:
    """Values as they come back from JSON; what JSON does not know, in words."""
    return json.loads(json.dumps(value, default=str))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested groups, by dotted name."""
    fields: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            fields |= flat(value, f"{prefix}{name}.")
        else:
            fields[f"{prefix}{name}"] = value
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
