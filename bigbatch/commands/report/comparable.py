"""What speaks against comparing runs: differing configs, plans, data sizes, repeated seeds."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bigbatch.commands.report.runs import LoggedRun
from bigbatch.schedule.durations import in_epochs


def within(name: str, runs: Sequence[LoggedRun]) -> Iterator[str]:
    """What speaks against taking runs as repetitions of one experiment, a sentence each."""
    finished = sum(run.finished for run in runs)
    if 0 < finished < len(runs):
        yield (
            f"{name}: {len(runs) - finished} of {len(runs)} runs are not finished and are left "
            "out of the numbers and figures."
        )
    if finished == 0:
        yield f"{name}: no run is finished; numbers and figures are those of the runs so far."
    seeds = [run.seed for run in runs]
    for seed in sorted({s for s in seeds if s is not None and seeds.count(s) > 1}):
        yield f"{name}: {seeds.count(seed)} runs have the seed {seed}; they are not independent."
    for field in _differing(runs):
        yield f"{name}: its runs differ in the config field {field}; they are not one experiment."
    planned = (run for run in runs if run.plan is not None and not run.decides)
    if len({json.dumps(run.plan) for run in planned}) > 1:
        yield f"{name}: its runs have different plans; they are not one experiment."


def between(name: str, run: LoggedRun, reference_name: str, reference: LoggedRun) -> Iterator[str]:
    """What speaks against comparing an experiment with the reference, a sentence each.

    Args:
      name: the experiment.
      run: a run of it.
      reference_name: the reference.
      reference: a run of it.

    Yields:
      The sentences.
    """
    own, other = run.train_examples, reference.train_examples
    if own != other:
        yield (
            f"{name}: trained on {own:,} examples and {reference_name} on {other:,}; their epochs "
            "are not alike, so there is no curve gap."
        )
    if run.plan is not None and reference.plan is not None:
        epochs, reference_epochs = run.plan["epochs"], reference.plan["epochs"]
        if epochs != reference_epochs:
            yield (
                f"{name}: planned for {in_epochs(epochs)} and {reference_name} for "
                f"{reference_epochs:g}; the curve gap is over the epochs that both have."
            )


def config_differences(runs: Sequence[LoggedRun]) -> dict[str, tuple[str, ...]]:
    """The config fields that are not the same in all runs.

    Args:
      runs: one run of each experiment.

    Returns:
      For each dotted field that differs, its value in each run as JSON text ("-" where the run
      lacks it), in the order of the runs.
    """
    configs = [_flat(run.config) for run in runs]
    return {field: tuple(c.get(field, "-") for c in configs) for field in _differing(runs)}


def _differing(runs: Sequence[LoggedRun]) -> list[str]:
    configs = [_flat(run.config) for run in runs]
    fields = dict.fromkeys(field for config in configs for field in config)
    return [field for field in fields if len({config.get(field) for config in configs}) > 1]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted field -> JSON text, without what names a run rather than sets it."""
    fields: dict[str, str] = {}
    for key, value in config.items():
        if not prefix and key in ("seed", "experiment"):
            continue
        if isinstance(value, dict) and value:
            fields.update(_flat(value, f"{prefix}{key}."))
        else:
            fields[f"{prefix}{key}"] = json.dumps(value, ensure_ascii=False)
    return fields
