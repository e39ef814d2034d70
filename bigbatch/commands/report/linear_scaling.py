"""Where the learning rate stops growing with the batch size, by the noise that a run measured."""

from collections.abc import Sequence

import numpy as np

from bigbatch.commands.plan import abridged
from bigbatch.commands.report.runs import LoggedRun
from bigbatch.commands.report.summary import Summary
from bigbatch.schedule.adaptive.gradient_noise import best_learning_rate

COLUMNS = (
    "experiment",
    "stage",
    "batch size",
    "learning rate",
    "measured noise scale",
    "of the",
    "best learning rate at twice the batch size",
    "linear rule twice too large from",
)
NOTE = (
    "With the noise scale B_noise that a stage measured (median of its first run's records), the "
    "best learning rate of an update of B examples is lr_max / (1 + B_noise / B) (McCandlish et "
    "al. 2018, for plain SGD), here with lr_max such that the stage's own learning rate is the "
    "best at its own batch size B. It is linear in B far below B_noise only; from B_noise + 2 B "
    "examples on, the linear rule gives twice the best or more. A noise scale of the training set "
    "is one of its examples drawn without replacement, and one of the data distribution is of "
    "independent draws, which augmentation and dropout come close to."
)


def rows(summary: Summary) -> list[Sequence[str]]:
    """One row for each stage whose noise was measured, a text for each of `COLUMNS`."""
    found: list[Sequence[str]] = []
    for experiment in summary.experiments:
        own = [(experiment.name, *cells) for cells in _stages(experiment.runs[0])]
        found += abridged(own, len(COLUMNS))
    return found


def _stages(run: LoggedRun) -> list[tuple[str, ...]]:
    """The stages of a run, as far as they were measured."""
    scales, update = run.training["gradient_noise_scale"], run.training["update"]
    found: list[tuple[str, ...]] = []
    for number, stage in enumerate((run.plan or {}).get("stages", ()), 1):
        first, size, rate = stage["first_update"], stage["batch_size"], stage["learning_rate"]
        inside = (update > first) & (update <= first + stage["num_updates"])
        known = scales[inside & (scales > 0)]
        if not known.size:
            continue
        noise = float(np.median(known))
        best = best_learning_rate(2 * size, noise, largest=rate * (1 + noise / size))
        cells = f"{best:.3g} ({best / rate:.2f}x)", f"{noise + 2 * size:,.0f}"
        measured = f"{noise:,.0f}", run.noise_population
        found.append((f"{number}", f"{size:,}", f"{rate:.4g}", *measured, *cells))
    return found
