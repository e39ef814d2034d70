"""The plan as a table of text, for `bigbatch plan`."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigbatch.config.config import Config
from bigbatch.layout.layout import Layout, idle_share
from bigbatch.schedule.diagnostics import diagnose, floors
from bigbatch.schedule.durations import in_epochs, short
from bigbatch.schedule.plan import Plan, Stage

# A plan whose every update differs has thousands of stages.
_MAX_ROWS = 40


def text(config: Config, *, devices: int) -> str:
    """The stage table, the totals, the layout's idle share, and what is worth a warning.

    Args:
      config: a validated config.
      devices: how many to lay the plan out for; none is looked for.

    Raises:
      UserError: the layout cannot be formed.
    """
    plan = config.plan
    layout = config.layout(plan, devices)
    shares = (f"{layout.devices * shape // devices}" for shape in layout.shapes)
    source, rule = config.source_plan, config.policy.rule
    columns = {"learning rate": plan.hypers["learning_rate"], "noise scale": plan.noise_scales}
    columns |= {n: c for n, c in plan.hypers.items() if n != "learning_rate"}
    constant = [n for n, c in columns.items() if n != "learning rate" and not np.ptp(c)]
    fixed = ", ".join(f"{name} {_number(columns.pop(name)[0])}" for name in constant)
    header = ("update", "updates", "epoch", "batch size", *columns, "microbatches")
    if plan.tokens_per_example:
        header = (*header[:3], "tokens", "batch size", "in tokens", *header[4:])
    rows = [
        _row(stage, plan, layout, columns) if isinstance(stage, Stage) else stage
        for stage in abridged(plan.stages, len(header))
    ]
    lines = [
        f"{config.experiment or 'plan'}: {plan.train_examples:,} training examples, "
        + in_epochs(plan.epochs),
        "",
        *aligned([header, *rows]),
        *([f"throughout: {fixed}"] if fixed else []),
        "",
        f"{plan.num_updates:,} updates, {plan.num_examples:,} examples{tokens(plan)}; "
        f"{source.num_updates / plan.num_updates:.2f} times fewer updates than the "
        f"{source.num_updates:,} of the policy without transformations",
        f"planned for {devices} device{'s' * (devices > 1)} (--devices; none was looked for): "
        f"microbatches of {' or '.join(shares)} examples a device, "
        f"{100 * layout.masked_share(plan):.1f} % of the computed examples masked (idle)",
        f"fingerprint {plan.fingerprint}",
        "",
    ]
    if rule.learning_rate_power != 1 or "b1" in plan.hypers:
        lines.append(f"rule {rule.name}: {rule.evidence}")
    held = floors(plan, config.policy)
    diagnostics = [*held, *diagnose(plan, source), idle_share(plan, layout)]
    lines += [diagnostic.text for diagnostic in diagnostics]
    lines += [f"warning: {found.warning}" for found in diagnostics if found.warning]
    return "\n".join(lines)


def _row(
    stage: Stage, plan: Plan, layout: Layout, columns: Mapping[str, np.ndarray]
) -> tuple[str, ...]:
    """A stage: where it begins, and how what moves moves in it."""
    own = slice(stage.first_update, stage.first_update + stage.num_updates)
    shapes = Counter(part.examples_per_device for part in layout.microbatches(stage.batch_size))
    each = plan.tokens_per_example
    return (
        f"{stage.first_update:,}",
        f"{stage.num_updates:,}",
        f"{stage.epoch:.4g}",
        *([short(stage.first_example * each)] if each else []),
        f"{stage.batch_size:,}",
        *([short(stage.batch_size * each)] if each else []),
        *(_course(values[own]) for values in columns.values()),
        " + ".join(f"{count} x {layout.devices * shape:,}" for shape, count in shapes.items()),
    )


def _course(values: np.ndarray) -> str:
    """First and last of some values, and between them the least and the greatest.

    >>> _course(np.array([0.1, 3.2, 0.01])), _course(np.array([0.5, 0.5]))
    ('0.1 to 3.2 to 0.01', '0.5')
    """
    turns = sorted({0, int(np.argmin(values)), int(np.argmax(values)), len(values) - 1})
    shown = [_number(values[turn]) for turn in turns]
    return " to ".join(text for text, _ in itertools.groupby(shown))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1_000 else f"{value:.3g}"


def tokens(plan: Plan) -> str:
    """The tokens of a plan, exactly, where its examples have them."""
    if not plan.tokens_per_example:
        return ""
    count = plan.num_examples * plan.tokens_per_example
    return f", {count:,} tokens ({plan.tokens_per_example:,} an example)"


def abridged(rows: Sequence[Sequence[Any]], columns: int) -> list[Sequence[Any]]:
    """The first and the last rows of a long table, with a line that says how many are left out."""
    if len(rows) <= _MAX_ROWS:
        return list(rows)
    half = _MAX_ROWS // 2
    left_out = (f"... {len(rows) - 2 * half} stages ...", *[""] * (columns - 1))
    return [*rows[:half], left_out, *rows[-half:]]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]
