"""Several experiments of one config file, each with several seeds, and a report on them."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bigbatch.config import Config
from bigbatch.config_file import compared_names, load_config
from bigbatch.errors import Problem, UserError
from bigbatch.resume import open_run
from bigbatch.workdir import Workdir

if TYPE_CHECKING:
    from bigbatch.report import Report


def compare(
    reference: str,
    directory: Path,
    *,
    experiments: Sequence[str] | None,
    seeds: int,
    overrides: Sequence[tuple[str, str]] = (),
) -> "Report":
    """Trains and reports. Run again it continues; finished runs are not repeated.

    Args:
      reference: the config file.
      directory: gets EXPERIMENT/seed_S for each run, and `report`.
      experiments: names; None for those that the file would have compared.
      seeds: how many, from 0 on.
      overrides: fields to change in every experiment.

    Returns:
      The report.

    Raises:
      UserError: with the mistakes of all the experiments, before anything is trained.
    """
    if seeds < 1:
        raise UserError(Problem("seeds", seeds, "a whole number >= 1", 1))
    path, _, experiment = reference.partition(":")
    if experiment and experiments is None:
        experiments = [experiment]
    names = list(experiments or compared_names(path))
    problems: dict[Problem, None] = {}
    configs: dict[tuple[str, int], Config] = {}
    for seed in range(seeds):
        for name in names:
            try:
                fields = [*overrides, ("seed", str(seed))]
                configs[name, seed] = load_config(f"{path}:{name}", fields)
            except UserError as error:
                # Most mistakes are common to all; each is said once.
                problems |= dict.fromkeys(error.problems)
    if problems:
        raise UserError(problems)

    from bigbatch.report import write_report
    from bigbatch.run import prepare
    from bigbatch.train import train

    run_dirs = []
    for number, ((name, seed), config) in enumerate(configs.items(), 1):
        files = Workdir(directory / name / f"seed_{seed}")
        run_dirs.append(files.path)
        plan = open_run(config, files)
        print(
            f"[{number}/{len(configs)}] {name}, seed {seed}: ", end="", file=sys.stderr, flush=True
        )
        if files.result.exists():
            print("finished before", file=sys.stderr)
            continue
        result = train(prepare(config, plan), files.path)
        print(
            f"{result['updates']} updates, test accuracy {100 * result['test_accuracy']:.2f} %, "
            f"{result['seconds']:.1f} s",
            file=sys.stderr,
        )
    return write_report(run_dirs, directory / "report")
