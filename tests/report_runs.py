"""Writes run directories as `bigbatch train` would, from a loss that the test chooses."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Stage = tuple[float, int, float]  # epochs, batch size, learning rate

DECAY: list[Stage] = [(2, 20, 0.1), (2, 20, 0.02)]


def write_run(
    root: Path,
    experiment: str,
    seed: int,
    stages: Sequence[Stage],
    loss: Callable[[float], float],
    *,
    train_examples: int = 1000,
    updates_per_record: int = 1,
    accuracy: Callable[[float], float] = lambda epoch: 0.9,
    metrics: Mapping[str, Callable[[float], float]] | None = None,
    test_loss: Callable[[float], float] | None = lambda epoch: 0.1,
    finished: bool = True,
    config: dict[str, Any] | None = None,
) -> Path:
    """Writes one run; `loss(epoch)` is the loss of the example at that epoch.

    `metrics` are those of its task; None: it is a run of bigbatch 0.1, with `accuracy` alone.
    Without a `test_loss` nothing is evaluated.
    """
    path = root / experiment / f"seed_{seed}"
    path.mkdir(parents=True)
    fields = {"experiment": experiment, "seed": seed, "data": {"name": "synthetic"}}
    (path / "config.json").write_text(json.dumps(fields | (config or {})))
    if metrics is not None:
        (path / "run.json").write_text(json.dumps({"metrics": list(metrics), "bigbatch": "0.2.0"}))
    tested = {"loss": test_loss, **({"accuracy": accuracy} if metrics is None else metrics)}

    def evaluation(epoch: float) -> dict[str, float]:
        return {f"test_{name}": at(epoch) for name, at in tested.items()} if test_loss else {}

    records, stage_rows = [], []
    update, examples, since, epoch_end = 0, 0, 0, 0.0
    next_evaluation = 1
    for epochs, batch_size, learning_rate in stages:
        epoch_end += epochs
        noise_scale = learning_rate / 0.1 * train_examples / batch_size
        hyper = {"batch_size": batch_size, "learning_rate": learning_rate, "momentum": 0.9}
        first_update, first_example = update, examples
        while examples < epoch_end * train_examples:
            update, examples = update + 1, examples + batch_size
            position = {
                "update": update,
                "examples": examples,
                "epoch": examples / train_examples,
                **hyper,
                "noise_scale": noise_scale,
            }
            if update % updates_per_record == 0:
                points = (since + np.arange(examples - since) + 0.5) / train_examples
                value = float(np.mean([loss(point) for point in points[:: len(points) // 32 or 1]]))
                records.append(position | {"train_loss": value, "examples_per_s": 500.0})
                since = examples
            if test_loss and examples >= next_evaluation * train_examples:
                next_evaluation = examples // train_examples + 1
                records.append(position | evaluation(examples / train_examples))
        stage_rows.append(
            {
                "first_update": first_update,
                "num_updates": update - first_update,
                "first_example": first_example,
                "epoch": first_example / train_examples,
                **hyper,
                "last_learning_rate": learning_rate,
                "noise_scale": noise_scale,
            }
        )
    plan = {
        "train_examples": train_examples,
        "epochs": epoch_end,
        "num_updates": update,
        "num_examples": examples,
        "stages": stage_rows,
        "fingerprint": "00",
        "columns": {"batch_size": []},
    }
    (path / "plan.json").write_text(json.dumps(plan))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    if finished:
        result = {
            "updates": update,
            "examples": examples,
            **evaluation(epoch_end),
            "train_loss": records[-1].get("train_loss", 0.1),
            "seconds": examples / 500,
            "compilations": 2,
            "params_sha256": "00",
        }
        (path / "result.json").write_text(json.dumps(result))
    return path


def falling_loss(
    seed: int, *, offset: float = 0.0, spread: float = 0.1, epochs: int = 30, drop: float = 0.0
) -> Callable[[float], float]:
    """A loss that falls by orders of magnitude, with a wandering log error of its own per seed.

    Args:
      seed: of the error.
      offset: added to the log loss.
      spread: standard deviation of the error of one run.
      epochs: length.
      drop: further fall of the log loss from a third of the run on.
    """
    rng = np.random.default_rng(seed)
    errors = rng.standard_normal(epochs + 2)
    for i in range(1, len(errors)):
        errors[i] = 0.6 * errors[i - 1] + 0.8 * errors[i]
    knots = np.arange(len(errors))

    def loss(epoch: float) -> float:
        fall = 2.3 * np.exp(-epoch / 2) + 0.02 * np.exp(-epoch / 15)
        log = np.log(fall) + offset + spread * np.interp(epoch, knots, errors)
        return float(np.exp(log - drop * (epoch > epochs / 3)))

    return loss
