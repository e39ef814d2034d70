"""From a config to a run: the one bridge to tasks, data, optimizers and the training loop."""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from bigbatch import distributed
from bigbatch.config.config import Config
from bigbatch.config.lengths import facts_of
from bigbatch.data.sets import Named
from bigbatch.data.source import TrainingData
from bigbatch.engine.functions import DATA_AXIS
from bigbatch.engine.task import Task
from bigbatch.errors import Problem, UserError
from bigbatch.places.paths import is_bucket, place
from bigbatch.schedule.adaptive.controller import Controller
from bigbatch.schedule.plan import Plan
from bigbatch.training import loop, progress
from bigbatch.training.prepare import prepare, specialised
from bigbatch.training.restore import end_of, expect_before
from bigbatch.training.run import Run
from bigbatch.workdir import network_file, packing, resume, storage, trackers
from bigbatch.workdir.files import Workdir, read_json
from bigbatch.workdir.network_file import Network

_SHA256 = "initial_params_sha256"
# What is said of a run that is finished.
_RESULT = {"updates": int, "examples": int, "seconds": float}
# How the fields end that say where files lie.
_PLACES = ("path", "directory")


def load_data(config: Config, *, show_progress: bool = False) -> TrainingData:
    """A config's data: arrays in memory, or open files.

    Args:
      config: names it.
      show_progress: whether to show a progress bar where something is made once.

    Raises:
      UserError: it is missing or does not fit, in the config's names.
    """
    if not isinstance(config.data, Named):
        data: TrainingData = config.data
        return data
    try:
        return config.data.load(show_progress=show_progress)
    except UserError as error:
        raise UserError(problem.under("data") for problem in error.problems) from error


def task_of(config: Config, data: Any) -> Task:
    """What a config trains on a data set, of which nothing but the facts are read."""
    if config.task is not None:
        task: Task = config.task
        return task
    assert config.model is not None
    return config.model.task(
        data,
        ghost_batch_examples=config.ghost_batch_examples,
        axis_name=DATA_AXIS,
        label_smoothing=config.label_smoothing,
    )


def network_shapes(config: Config) -> Network:
    """Shapes and dtypes of the config's network; of a bundled data set no file is read."""
    data = facts_of(config.data)
    _, shapes = specialised(task_of(config, data), data, config.ghost_batch_examples)
    return Network(shapes.params, shapes.running_statistics)


def prepared(config: Config, plan: Plan | Controller | None = None, **options: Any) -> Run:
    """The run of a config, with its programs compiled.

    Args:
      config: from `identified`, where it names initial parameters.
      plan: the one that the working directory holds; None for the config's, or its controller.
      **options: of `prepare`, in place of the config's, `data` and `task` among them.
    """
    data, task = options.pop("data", None), options.pop("task", None)
    data = load_data(config, show_progress=sys.stderr.isatty()) if data is None else data
    given = {
        "ghost_batch_examples": config.ghost_batch_examples,
        "microbatch_examples_per_device": config.microbatch_examples_per_device,
        "evaluation_batch_examples": config.evaluation_batch_examples,
        "noise_small_batch_examples": config.noise_small_batch_examples,
        "reproducible": config.reproducible,
        "shard": config.shard,
        "seed": config.seed,
        "initial": functools.partial(_initial, config) if config.initial_params else None,
        "device_memory_bytes": config.device_memory_bytes,
        "identity": identity_of(config, data),
    }
    task = task_of(config, data) if task is None else task
    plan = plan or config.controller or config.plan
    return prepare(task, data, plan, config.optimizer, **{**given, **options})


def train(
    config: Config,
    files: Workdir,
    *,
    data: TrainingData | None = None,
    change_future: bool = False,
    from_update: int | None = None,
    until: str | None = None,
    show_progress: bool = False,
    on_record: Callable[[Mapping[str, Any]], None] = lambda record: None,
) -> tuple[dict[str, Any], bool]:
    """Trains a config's run in a working directory; all of several processes call.

    Args:
      config: a validated config.
      files: the directory, new, or of the same run.
      data: of the config; None to load it.
      change_future: see `open_run`.
      from_update: likewise.
      until: see `loop.train`.
      show_progress: see `loop.train`.
      on_record: likewise.

    Returns:
      The result, and whether there was one before.

    Raises:
      UserError, RunError, StoppedError: as `prepare` and `loop.train`.
    """
    config = distributed.together(lambda: identified(config, files))
    if data is None:
        data = distributed.together(lambda: load_data(config, show_progress=show_progress))
    record = {"experiment": config.experiment, **_placed(config.tree)}
    identity = distributed.together(lambda: identity_of(config, data))
    decides = config.controller is not None
    # Before the directory is claimed: a mistake leaves nothing behind.
    ended = end_of(until, config.plan, config.plan.tokens_per_example, decides)
    distributed.on_first(lambda: trackers.expect(config.trackers, files))
    with files.released():
        # Before anything is compiled: what is refused is refused at once.
        plan = resume.open_run(
            files,
            identity,
            config.plan,
            record=record,
            adaptive=decides,
            change_future=change_future,
            from_update=from_update,
            sources=config.sources,
        )
        if files.result.exists():
            return read_json(files.result, _RESULT), True
        expect_before(ended, files)
        if show_progress and distributed.is_first():
            name = config.experiment or files.path.name
            progress.say_devices(progress.first_line(name, plan, decides))
        kept, plans = files.microbatch, config.controller or plan
        run = distributed.together(lambda: prepared(config, plans, data=data, kept=kept))
        options: dict[str, Any] = {
            "keep_checkpoints": config.keep_checkpoints,
            "change_future": change_future,
            "until": until,
            "record": record,
            "sources": config.sources,
            "trackers": config.trackers,
            "show_progress": show_progress,
            "on_record": on_record,
            **config.intervals,
        }
        return loop.train(run, files.path, **options), False


def _placed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A config's values with paths that hold from every directory, for its record."""
    names = [*_PLACES, network_file.FIELD]
    return {
        name: _placed(value)
        if isinstance(value, Mapping)
        else _absolute(value)
        if name in names and isinstance(value, str)
        else value
        for name, value in tree.items()
    }


def _absolute(path: str) -> str:
    return path if is_bucket(path) else os.path.abspath(os.path.expanduser(path))


def identity_of(config: Config, data: TrainingData) -> dict[str, Any]:
    """What decides the result of a config's run on its data, beside its plan."""
    identity, told = config.identity, data.description
    if isinstance(config.data, Named):
        identity["data"] = {**identity["data"], "fingerprint": told["fingerprint"]}
    else:
        # Where they lie is for the user's callable alone.
        given = {n: v for n, v in identity["data"].items() if not n.endswith(_PLACES)}
        identity["data"] = {**given, "description": told}
    if config.task is None:
        return identity
    task, shapes = specialised(config.task, data, config.ghost_batch_examples)
    identity |= {"parameters": packing.described(shapes.params)}
    frozen = {"frozen_sha256": packing.sha256(task.frozen)}
    return identity | (frozen if packing.num_bytes(task.frozen) else {})


def identified(config: Config, files: Workdir) -> Config:
    """The config with the sha256 of its initial parameters, without which no run is begun.

    The file is read and compared with the network. Where it is not there, what the working
    directory says of it counts, if that holds a checkpoint: the file is not needed any more.

    Raises:
      UserError: as `network_file.read`, or the arrays are others than the config's sha256 says.
    """
    if config.initial_params is None:
        return config
    sha256 = None
    if not place(config.initial_params, network_file.FIELD).exists():
        sha256 = _recorded(config.initial_params, files)
    if sha256 is None:
        sha256 = packing.sha256(network_file.named(_initial(config)))
    elif config.initial_params_sha256 is not None:
        # It is compared with the recorded one as every field is.
        sha256 = config.initial_params_sha256
    tree = {**config.tree, _SHA256: sha256}
    return dataclasses.replace(config, initial_params_sha256=sha256, tree=tree)


def _initial(config: Config) -> Network:
    """What the config's file of initial parameters holds."""
    path, asked = config.initial_params, config.initial_params_sha256
    assert path is not None
    network = network_file.read(path, network_shapes(config))
    sha256 = packing.sha256(network_file.named(network))
    if asked not in (None, sha256):
        allowed = f"{sha256!r}, of the arrays in {path}, or None"
        raise UserError(Problem(_SHA256, asked, allowed, sha256))
    return network


def _recorded(path: str, files: Workdir) -> str | None:
    """The sha256 of a file that the run in a working directory has no more need of, or None."""
    # Those that are being written have longer names.
    saved = any(name.isdigit() for name in storage.listed(files.checkpoints))
    if not saved or not files.config.exists():
        return None
    tree = read_json(files.config)
    found: str | None = tree.get(_SHA256)
    return found if tree.get(network_file.FIELD) in (path, _absolute(path)) else None
