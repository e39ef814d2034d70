"""What a run says of itself while it trains: progress, the records of the log, the bar."""

import importlib.metadata
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from bigbatch.bars import Bar
from bigbatch.engine.functions import EXAMPLES, GRADIENT_IS_FINITE, PARAMS_ARE_FINITE
from bigbatch.engine.parts import NONE, named
from bigbatch.engine.task import COUNT, Sums
from bigbatch.errors import RunError
from bigbatch.layout import memory
from bigbatch.schedule import divergence
from bigbatch.schedule.adaptive import gradient_noise
from bigbatch.schedule.durations import short
from bigbatch.schedule.intervals import Every
from bigbatch.schedule.plan import Plan, Row
from bigbatch.training.run import Run


class Progress(NamedTuple):
    """How far a run is, in plain numbers; a checkpoint keeps it beside the state.

    Attributes:
      updates: done so far.
      seconds: spent so far, over all resumes.
      loss_sum: training loss summed over the examples since the last record of the log.
      loss_count: what it is divided by.
      loss_examples: those examples.
      empty_updates: updates since that record in which nothing had a weight.
      input_wait_s: seconds for which the loop has waited for examples since that record.
      record_seconds: when that record was written, in the same seconds.
      train_loss: of that record.
      test: the last evaluation's results, by name; empty before the first.
      evaluation_due: whether the evaluation after the last update was cut short.
      spent_s: seconds of the wall time up to the newest checkpoint, by `starts.KINDS`.
      noise: averages of the gradient noise, empty where it is not measured.
      controller: an adaptive run's decisions so far and what the next is made from; see `course`.
    """

    updates: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_count: float = 0.0
    loss_examples: float = 0.0
    empty_updates: int = 0
    input_wait_s: float = 0.0
    record_seconds: float = 0.0
    train_loss: float = math.nan
    test: dict[str, float] = {}  # noqa: RUF012 - never changed in place
    controller: dict[str, Any] | None = None
    evaluation_due: bool = False
    spent_s: dict[str, float] = {}  # noqa: RUF012 - likewise
    noise: gradient_noise.Smoothed = gradient_noise.Smoothed()

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Progress":
        """What `_asdict` gave, after a way through JSON."""
        return cls(**{**values, "noise": gradient_noise.Smoothed(*values.get("noise", ()))})


def record(
    run: Run,
    progress: Progress,
    row: Row,
    sums: Sums,
    now_s: float,
    log_every: Every,
    write: Callable[[dict[str, Any]], None],
) -> Progress:
    """Adds an update's sums to the progress, and writes a record where one is due."""
    check_finite(run, row, sums, progress.train_loss)
    count = float(sums[COUNT])
    progress = progress._replace(
        updates=row.update + 1,
        loss_sum=progress.loss_sum + float(sums[run.task.minimised]),
        loss_count=progress.loss_count + count,
        loss_examples=progress.loss_examples + float(sums[EXAMPLES]),
        empty_updates=progress.empty_updates + (count == 0),
        input_wait_s=progress.input_wait_s + float(sums["input_wait_s"]),
    )
    noise, noise_fields = _noise(run, progress.noise, row, sums)
    progress = progress._replace(noise=noise)
    if not log_every.due(*span(run, row)) and progress.updates < run.plan.num_updates:
        return progress
    fields: dict[str, Any] = {}
    if progress.loss_count:
        fields["train_loss"] = progress.loss_sum / progress.loss_count
    if progress.empty_updates:
        fields["empty_updates"] = progress.empty_updates
    rate = progress.loss_examples / max(now_s - progress.record_seconds, 1e-9)
    speed = {"examples_per_s": round(rate, 1), "input_wait_s": round(progress.input_wait_s, 6)}
    if per_example := run.tokens_per_example:
        speed["tokens_per_s"] = round(rate * per_example, 1)
    write(position(run, row) | fields | speed | noise_fields)
    return progress._replace(
        loss_sum=0.0,
        loss_count=0.0,
        loss_examples=0.0,
        empty_updates=0,
        input_wait_s=0.0,
        record_seconds=now_s,
        train_loss=fields.get("train_loss", progress.train_loss),
    )


def check_finite(run: Run, row: Row, sums: Mapping[str, Any], last_loss: float) -> None:
    """Makes sure that what an update gave is finite.

    Args:
      run: which it is of.
      row: the update.
      sums: of the update.
      last_loss: the training loss that was logged last.

    Raises:
      RunError: its loss, its gradient or the parameters after it are not; with a diagnosis.
    """
    loss = float(sums[run.task.minimised])
    what = None
    if not math.isfinite(loss):
        what = f"the training loss is {loss}"
    elif not float(sums[GRADIENT_IS_FINITE]):
        what = "the gradient is not finite"
    elif not float(sums[PARAMS_ARE_FINITE]):
        what = "the parameters are not finite"
    if what is not None:
        raise RunError(divergence.diagnosis(run.plan, row, what, last_loss))


def _noise(
    run: Run, smoothed: gradient_noise.Smoothed, row: Row, sums: Sums
) -> tuple[gradient_noise.Smoothed, dict[str, Any]]:
    """The averages with an update's estimates in them, and what the log says of the noise.

    `gradient_square` and `gradient_variance` are this update's own; the noise scale is that of the
    averages, which forget over one epoch. Where there is none, the status says why.
    """
    measured = run.measurement(row, sums)
    if measured is None:
        return smoothed, {}
    estimate = gradient_noise.estimate(measured)
    smoothed = gradient_noise.smooth(
        smoothed, estimate, measured, memory_examples=run.plan.train_examples
    )
    return smoothed, gradient_noise.log_fields(smoothed, estimate, run.noise_population)


def span(run: Run, row: Row) -> tuple[int, int, int, int]:
    """What an interval asks of an update."""
    return row.first_example, row.batch_size, row.update, run.plan.train_examples


def position(run: Run, row: Row) -> dict[str, Any]:
    """What every record of the log says of the time at which it was written."""
    examples = row.first_example + row.batch_size
    return {
        "update": row.update + 1,
        "examples": examples,
        **run.tokens(examples),
        "epoch": examples / run.plan.train_examples,
        "batch_size": row.batch_size,
        **row.hyper,
        "noise_scale": row.noise_scale,
    }


def memory_line(run: Run) -> str:
    """What a run needs on each device, in one line for the user."""
    needs = {name: f"{size / memory.MIB:,.1f}" for name, size in run.programs.device_bytes.items()}
    largest, shard = run.microbatch_examples_per_device, run.programs.shard
    lies = "" if shard == NONE else f", state in parts (shard {named(shard)})"
    return (
        f"microbatches of up to {largest:,} examples a device{lies}; MiB a device: parameters, "
        f"statistics and optimizer {needs['state']}, with accumulate {needs['accumulate']}, with "
        f"apply_update {needs['apply_update']}"
    )


def evaluation_line(run: Run, row: Row, progress: Progress, test: Mapping[str, float]) -> str:
    """An evaluation in one line for the user."""
    examples = row.first_example + row.batch_size
    epoch, tokens = examples / run.plan.train_examples, run.tokens_per_example
    done = f", {short(examples * tokens)} tokens" if tokens else ""
    results = "".join(f", {in_words(name, value)}" for name, value in test.items())
    return (
        f"epoch {epoch:.4g} of {run.plan.epochs:g}{done}, update {row.update + 1:,} of "
        f"{run.plan.num_updates:,}, batch size {row.batch_size:,}: train loss "
        f"{progress.train_loss:.4g}{results}"
    )


def in_words(name: str, value: float) -> str:
    """A result such as `test_accuracy`, for the user.

    >>> in_words("test_accuracy", 0.97222), in_words("test_perplexity", 12.3456)
    ('test accuracy 97.22%', 'test perplexity 12.35')
    """
    shown = f"{value:.2%}" if name.endswith("accuracy") else f"{value:.4g}"
    return f"{name.replace('_', ' ')} {shown}"


def main_metric(result: Mapping[str, Any]) -> str:
    """The name of the result that a run is judged by: its task's first metric, or a loss."""
    tested = [name for name in result if name.startswith("test_")]
    return next((name for name in tested if name != "test_loss"), (*tested, "train_loss")[0])


def result_line(result: Mapping[str, Any]) -> str:
    """The end of a run in one line for the user: its main metric, its updates, its seconds."""
    main = main_metric(result)
    tokens = f"{short(result['tokens'])} tokens, " if "tokens" in result else ""
    return (
        f"{in_words(main, result[main])} after {result['updates']} updates, {result['examples']} "
        f"examples, {tokens}{result['seconds']:.1f} s"
    )


def first_line(name: str, plan: Plan, decides: bool) -> str:
    """What a run is about to do, in one line for the user, before anything is compiled."""
    least, most = (f"{size:,}" for size in (plan.batch_sizes.min(), plan.batch_sizes.max()))
    sizes = least if least == most else f"{least} to {most}"
    updates = (
        "batch sizes that it decides" if decides else f"{plan.num_updates:,} updates of {sizes}"
    )
    return f"{name}: {plan.num_examples:,} examples, {updates}"


def say_devices(words: str) -> None:
    """Says on standard error what is begun and on which devices, and if these are a fallback."""
    devices = jax.devices()
    kind = f"{len(devices)} x {devices[0].device_kind}"
    print(f"{words}; {kind}; compiling ...", file=sys.stderr)
    if devices[0].platform == "cpu" and not jax.config.values["jax_platforms"]:
        for plugin in importlib.metadata.entry_points(group="jax_plugins"):
            print(
                f"bigbatch: warning: this runs on the CPU: JAX's plugin {plugin.name} is installed "
                "and finds no device (where that is meant: JAX_PLATFORMS=cpu)",
                file=sys.stderr,
            )


def progress_bar(run: Run, progress: Progress, show: bool) -> Bar:
    """A bar over the examples of the whole plan, or over the tokens that they have."""
    done = progress.updates
    at_end = done == run.plan.num_updates
    initial = run.plan.num_examples if at_end else int(run.plan.first_examples[done])
    each, unit = run.tokens_per_example or 1, "tokens" if run.tokens_per_example else "examples"
    return Bar(run.plan.num_examples * each, unit, show=show, done=initial * each)


def move(bar: Bar, run: Run, row: Row, train_loss: float) -> None:
    """Moves the bar on by an update."""
    each = run.tokens_per_example or 1
    words = f"update {row.update + 1:,}  batch {row.batch_size:,}"
    if not math.isnan(train_loss):
        words += f"  loss {train_loss:.3g}"
    bar.move(row.batch_size * each, total=run.plan.num_examples * each, words=words)


def change(plan: Plan, row: Row) -> str | None:
    """An update with a new batch size in one line; None where sizes change all the time."""
    sizes, update = plan.batch_sizes, row.update
    if update == 0 or sizes[update] == sizes[update - 1]:
        return None
    held = sizes[max(update - max(plan.num_updates // 100, 1), 0) : update]
    if (held != held[-1]).any():
        return None
    hypers = ", ".join(f"{name.replace('_', ' ')} {v:.4g}" for name, v in row.hyper.items())
    return (
        f"epoch {row.epoch:.4g}, update {update:,}: batch size {held[-1]:,} -> "
        f"{row.batch_size:,}, {hypers}"
    )
