"""Several experiments of one config file, each with several seeds, and reports on them.

Experiments named SCHEDULE-VARIANT, as in "increase-adam", are compared with "decay-VARIANT", or
with that of the first experiment, where it is among them: one report a variant, beside the report
on the names without one.
"""

import functools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bigbatch.bars import Bar
from bigbatch.commands.report import Report, write_report
from bigbatch.commands.report.summary import REFERENCE_NAME
from bigbatch.config.config import Config
from bigbatch.config.file import compared_names, file_and_experiment, load_config
from bigbatch.errors import Problem, UserError
from bigbatch.workdir.files import Workdir


def compare(
    reference: str,
    directory: Path,
    *,
    experiments: Sequence[str] | None,
    seeds: int,
    overrides: Sequence[tuple[str, str]] = (),
) -> list[Report]:
    """Trains and reports. Run again it continues; finished runs are not repeated.

    Args:
      reference: the config file.
      directory: gets EXPERIMENT/seed_S for each run, `report`, and a `report-VARIANT` for each
        variant.
      experiments: names; None for those that the file would have compared.
      seeds: how many, from 0 on.
      overrides: fields to change in every experiment.

    Returns:
      The reports, one for each directory written.

    Raises:
      UserError: with the mistakes of all the experiments, before anything is trained.
    """
    if seeds < 1:
        raise UserError(Problem("seeds", seeds, "a whole number >= 1", 1))
    path, experiment = file_and_experiment(reference)
    if experiment and experiments is None:
        experiments = [experiment]
    names = list(experiments or compared_names(path))
    for name in names:
        if name and (Path(name).name != name or name == ".."):
            allowed = "a name that a directory can have: runs are kept under it"
            raise UserError(Problem("experiments", name, allowed))
    problems: dict[Problem, None] = {}
    configs: dict[tuple[str, int], Config] = {}
    for seed in range(seeds):
        for name in names:
            try:
                fields = [*overrides, ("seed", str(seed))]
                config = load_config(f"{path}:{name}", fields)
                configs[name, seed] = config
                if config.initial_params is not None:
                    from bigbatch.config.assemble import identified

                    identified(config, _files(directory, name, seed))
            except UserError as error:
                # Most mistakes are common to all; each is said once.
                problems |= dict.fromkeys(error.problems)
    if problems:
        raise UserError(problems)

    from bigbatch.config.assemble import train
    from bigbatch.training.progress import in_words, main_metric, say_devices

    trained, start_s, done = 0, time.monotonic(), 0
    total = sum(
        config.plan.num_examples
        for key, config in configs.items()
        if not _files(directory, *key).result.exists()
    )
    say_devices(f"{len(configs)} runs")
    with Bar(total, "examples", show=total > 0) as bar:
        for number, ((name, seed), config) in enumerate(configs.items(), 1):
            files = _files(directory, name, seed)
            run = f"[{number}/{len(configs)}] {name}, seed {seed}"
            if not bar.shown:
                print(f"{run}: ", end="", file=sys.stderr, flush=True)
            bar.move(0, words=run)
            result, is_old = train(config, files, on_record=functools.partial(_move, bar, done))
            words = "finished before"
            if not is_old:
                shown = in_words(main_metric(result), result[main_metric(result)])
                words = f"{result['updates']} updates, {shown}, {result['seconds']:.1f} s"
                trained, done = trained + 1, done + config.plan.num_examples
                left_s = (time.monotonic() - start_s) / trained * (len(configs) - number)
                if left_s > 0:
                    minutes = f"about {left_s / 60:,.0f} min left" if left_s > 90 else "soon done"
                    words += f"; {minutes}"
            print(f"{run}: {words}" if bar.shown else words, file=sys.stderr)
    return [
        write_report(
            [_files(directory, name, seed).path for seed in range(seeds) for name in family],
            directory / (f"report-{variant}" if variant else "report"),
        )
        for variant, family in families(names).items()
    ]


def _move(bar: Bar, before: int, record: Mapping[str, Any]) -> None:
    """Moves the bar of all runs on to a record of one, after so many examples of others."""
    bar.move(0, completed=before + record["examples"])


def _files(directory: Path, name: str, seed: int) -> Workdir:
    return Workdir(directory / name / f"seed_{seed}")


def families(names: Sequence[str]) -> dict[str, list[str]]:
    """The experiments that are compared with one another: those with a reference of their own.

    Args:
      names: the experiments.

    Returns:
      Each variant and its experiments, in their order; "" is the variant of all others.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        variant = name.partition("-")[2]
        own = variant and {f"{n}-{variant}" for n in (REFERENCE_NAME, names[0])} & {*names}
        found.setdefault(variant if own else "", []).append(name)
    return found
