"""The fastest plan trained: predicted and realised updates and hours, beside other recipes'.

    python -m tests.benchmarks.fastest_runs FOLDER REFERENCE METRIC EXAMPLES_PER_S UPDATE_S

FOLDER holds fastest.json, the answer of `plan --fastest --json`, and RECIPE/SEED, a run of each
recipe and seed. A run has arrived where its smoothed training loss is first at that which the
reference's runs have, in the mean, after shares of their updates. Losses are averaged as by
`bigbatch critical`, over a quarter of the time before and after, but not past the run's end.
"""

import json
import sys
from pathlib import Path

import numpy as np
import scipy.stats

from bigbatch.commands.critical.fit import WINDOW_SHARE
from bigbatch.schedule.fastest import EDGES

SHARES = (1 / 4, 1 / 2, 3 / 4, 19 / 20)
LEAST_EXAMPLES = 512


def losses_of(run):
    """The loss of every update: a record's is the mean of the updates since the last one."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    train = [(r["update"], r["train_loss"]) for r in records if "train_loss" in r]
    updates, losses = zip(*train, strict=True)
    return np.repeat(losses, np.diff(updates, prepend=0))


def smoothed(losses, batch_size):
    """Moments, in updates done, and mean losses about them."""
    times = np.arange(len(losses), dtype=float)
    half = np.maximum(WINDOW_SHARE * times, LEAST_EXAMPLES / 2 / batch_size)
    inside = times >= half
    times, half = times[inside], np.minimum(half, len(losses) - 1 - times)[inside]
    edges, sums = np.arange(len(losses) + 1) - 0.5, np.r_[0.0, np.cumsum(losses)]
    ends = (np.interp(times + way * (half + 0.5), edges, sums) for way in (1, -1))
    return times, (next(ends) - next(ends)) / (2 * half + 1)


def arrived(times, means, target):
    """Updates after which the loss is at a target, interpolated; NaN where it never is."""
    below = np.flatnonzero(means <= target)
    if not len(below) or not below[0]:
        return times[0] if len(below) else np.nan
    at = slice(below[0] - 1, below[0] + 1)
    return np.interp(-target, -means[at], times[at])


class Run:
    def __init__(self, path, metric, speeds):
        columns = json.loads((path / "plan.json").read_text())["columns"]
        self.sizes = np.concatenate([np.full(n, size) for size, n in columns["batch_size"]])
        self.curve = smoothed(losses_of(path), self.sizes.min())
        self.metric = json.loads((path / "result.json").read_text())[metric]
        self.hours = np.cumsum(speeds[1] + self.sizes / speeds[0]) / 3600

    def seconds(self, updates):
        """That so many updates take; more than there are have the last one's size."""
        more = np.maximum(0, updates - len(self.sizes)) * np.diff(self.hours)[-1]
        count = np.arange(len(self.sizes)) + 1
        return 3600 * (np.interp(updates, count, self.hours) + more)

    def reached(self, target):
        updates = arrived(*self.curve, target)
        return updates, self.seconds(updates)


def predicted(answer, name, recipe, reference):
    """Updates at shares of the reference's, by the law."""
    count = len(reference.sizes)
    if name == "fastest":
        parts = answer["stretches"]
        epochs = [*(part["recipe_epoch"] for part in parts), answer["recipe_epochs"]]
        updates = [*(part["first_update"] for part in parts), answer["num_updates"]]
        return np.interp([share * answer["recipe_epochs"] for share in SHARES], epochs, updates)
    scales = np.repeat(answer["noise_scales"], np.diff(answer["edges"]))
    starts = np.cumsum(reference.sizes) - reference.sizes
    place = np.searchsorted(np.cumsum(recipe.sizes), starts, "right")
    sizes = recipe.sizes[np.minimum(place, len(recipe.sizes) - 1)]
    done = np.cumsum((1 + scales / sizes) / (1 + scales / reference.sizes))
    return done[[round(share * count) - 1 for share in SHARES]]


def interval(values):
    """Mean and half of its 95 % interval; how many there are, if some are not."""
    values = np.asarray(values)
    if np.isnan(values).any():
        return f"{np.sum(~np.isnan(values))} of {len(values)}"
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    digits = max(0, 2 - int(np.floor(np.log10(max(half, 1e-9)))) - 1)
    return f"{values.mean():,.{digits}f} ± {half:,.{digits}f}"


def main(folder, reference, metric, *speeds):
    folder, speeds = Path(folder), tuple(map(float, speeds))
    answer = json.loads((folder / "fastest.json").read_text())
    names = sorted({path.parent.parent.name for path in folder.glob("*/*/result.json")})
    runs = {
        name: [Run(done.parent, metric, speeds) for done in folder.glob(f"{name}/*/result.json")]
        for name in sorted(names, key=(reference, "fastest").__contains__, reverse=True)
    }
    first = runs[reference]
    times, means = first[0].curve[0], np.mean([run.curve[1] for run in first], axis=0)
    targets = [np.interp(share * len(first[0].sizes), times, means) for share in SHARES]
    shares = (np.cumsum(first[0].sizes) - first[0].sizes) / first[0].sizes.sum()
    answer["edges"] = np.searchsorted(shares, EDGES)
    row("recipe", "loss", "predicted updates", "realised", "ratio", "predicted s", "realised s")
    row("---", *["---:"] * 6)
    for name, each in runs.items():
        told = predicted(answer, name, each[0], first[0])
        for target, law in zip(targets, told, strict=True):
            updates, seconds = np.array([run.reached(target) for run in each]).T
            ratio = np.mean(updates) / law
            cells = f"{target:.4f}", f"{law:,.0f}", interval(updates)
            cells += "" if np.isnan(ratio) else f"{ratio:.2f}", f"{each[0].seconds(law):.3g}"
            row(name, *cells, interval(seconds))
    print()
    row("recipe", "updates", metric, f"less {reference}'s, 95 %")
    row("---", *["---:"] * 3)
    for name, each in runs.items():
        own, base = ([run.metric for run in some] for some in (each, first))
        low, high = scipy.stats.ttest_ind(own, base, equal_var=False).confidence_interval(0.95)
        difference = "" if name == reference else f"{low:+.4f} to {high:+.4f}"
        row(name, len(each[0].sizes), interval(own), difference)


def row(*cells):
    print("|", " | ".join(map(str, cells)), "|")


if __name__ == "__main__":
    main(*sys.argv[1:])
