"""The noise scale of the norms' scales alone, and in each geometry, against the whole, along a run.

    python -m tests.benchmarks.noise_groups CONFIG UPDATES [--config.FIELD=VALUE ...]

Trains the config's first updates and measures at eight of them, 1.6 to 2 times apart, with the
parameters held, as `bigbatch critical` does (an epoch's examples at most). `norms` is the estimator
of Gray et al. 2024, the Euclidean noise scale of the arrays named scale. Below the table are, for
each column against `l2`, the correlation of the logarithms, the median ratio, and the factor within
which the ratio is about it (one standard deviation of its logarithm).
"""

import sys

import numpy as np

from bigbatch.commands.critical.geometries import noise_scales
from bigbatch.config.file import load_config
from bigbatch.training.updates import updates
from tests import trained

POINTS = 8


def main() -> None:
    path, last = sys.argv[1], int(sys.argv[2])
    pairs = [text.removeprefix("--config.").split("=", 1) for text in sys.argv[3:]]
    config = load_config(path, pairs)
    small = config.noise_small_batch_examples or config.ghost_batch_examples
    run = trained.prepared(config, noise_small_batch_examples=small)
    chosen = np.unique(np.geomspace(min(10, last), last, POINTS).astype(int)).tolist()
    print(f"`{' '.join(sys.argv[1:])}`, small batches of {small} examples\n")
    rows, names = [], None
    for row, state, sums in updates(run, run.first_state(), 0):
        if row.update + 1 not in chosen:
            continue
        found = noise_scales(run, state, run.plan.train_examples / 8)
        if names is None:
            names = list(found)
            print(
                f"| updates | loss | {' | '.join(names)} |\n| ---: | ---: |{' ---: |' * len(names)}"
            )
        told = [found.get(name, (np.nan, np.nan)) for name in names]
        rows.append([scale for scale, _ in told])
        loss = float(sums[run.task.minimised]) / float(sums["count"])
        cells = " | ".join(f"{scale:,.1f} ± {error:,.1f}" for scale, error in told)
        print(f"| {row.update + 1} | {loss:.3f} | {cells} |", flush=True)
        if row.update + 1 == last:
            break
    logs = np.log(np.array(rows))
    print()
    for name, column in zip(names[1:], logs.T[1:], strict=True):
        both = np.isfinite(column) & np.isfinite(logs[:, 0])
        apart = column[both] - logs[both, 0]
        correlation = np.corrcoef(column[both], logs[both, 0])[0, 1]
        print(
            f"- `{name}`: correlation {correlation:.2f} over {both.sum()} points, median ratio "
            f"{np.exp(np.median(apart)):.2f}, within a factor of {np.exp(np.std(apart)):.2f}"
        )


if __name__ == "__main__":
    main()
