"""`bigbatch evaluate` and `bigbatch export`: what a run's newest checkpoint is and holds."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bigbatch.config.assemble import identified, identity_of, load_data, prepared
from bigbatch.config.config import Config, read_config
from bigbatch.engine.parts import AUTO
from bigbatch.places.paths import place
from bigbatch.training.evaluate import evaluate
from bigbatch.training.restore import newest
from bigbatch.training.run import Run
from bigbatch.workdir import network_file, packing, resume
from bigbatch.workdir.files import Workdir, read_json


def run_of(files: Workdir, config: Config | None) -> Callable[..., Run]:
    """What prepares the run in a working directory, with the plan that it holds.

    Args:
      files: the directory.
      config: of the run; None for the directory's own, which names nothing but what is bundled.

    Returns:
      A function of options of `prepare`, to be used in place of the run's.

    Raises:
      UserError: the config is of another run, or the run has callables of its user's.
    """
    if config is None:
        tree = read_json(files.config)
        config = read_config(tree, tree.pop("experiment", ""))
        # How the state lay on other devices binds nobody.
        config = dataclasses.replace(config, shard=AUTO)
    config = identified(config, files)
    data = load_data(config)
    resume.check_same(files, identity_of(config, data))
    return functools.partial(prepared, config, plan=resume.read_plan(files), data=data)


def evaluate_run(
    files: Workdir, config: Config | None = None, update: int | None = None
) -> dict[str, Any]:
    """Evaluates a checkpoint of a run.

    Args:
      files: the run's directory.
      config: see `run_of`.
      update: of the checkpoint with so many updates done; None: of the newest.

    Returns:
      `updates` done at the checkpoint, and the test results by name.

    Raises:
      UserError: there is no checkpoint yet, or a file is damaged.
    """
    run = run_of(files, config)()
    state, updates = newest(run, files.path, update)
    return {"updates": updates, **evaluate(run, state)}


def export(
    run: Run, directory: str | Path, out: str | Path, update: int | None = None
) -> dict[str, Any]:
    """Writes a checkpoint's network as plain arrays that NumPy alone can read.

    Args:
      run: from `prepare`.
      directory: the run's.
      out: an npz file; `params/...` are the parameters, or those that the optimizer evaluates with,
        `running_statistics/...` those of batch norm, each by its place in the network.
      update: of the checkpoint with so many updates done; None: of the newest.

    Returns:
      `updates` done at the checkpoint, how many `arrays`, and the `params_sha256` of those written.

    Raises:
      UserError: there is no checkpoint yet, a file is damaged, or `out` cannot be written.
    """
    state, updates = newest(run, directory, update)
    params = run.optimizer.evaluation_params(state.optimizer, state.params)
    network = network_file.Network(params, state.running_statistics)
    arrays = network_file.write(place(out, "out"), network)
    return {"updates": updates, "arrays": arrays, "params_sha256": packing.sha256(params)}
