"""The plan as a table of text, for `bigbatch plan`."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from bigbatch.config.config import Config
from bigbatch.layout.layout import Layout, idle_share
from bigbatch.schedule.diagnostics import diagnose, floors
from bigbatch.schedule.durations import short
from bigbatch.schedule.plan import Plan, Stage

_HEADER = (
    "first update",
    "updates",
    "first example",
    "epoch",
    "batch size",
    "learning rate",
    "momentum",
    "noise scale",
    "microbatches",
)
_TOKENS = ("tokens", "batch tokens")
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
    # What moves beside the learning rate, as Adam's do.
    moving = [n for n, c in plan.hypers.items() if n not in Stage._fields and np.ptp(c)]
    header = (*_HEADER, *(_TOKENS if plan.tokens_per_example else ()), *moving)
    rows = [
        (*_row(stage, layout), *_more(stage, plan, moving)) if isinstance(stage, Stage) else stage
        for stage in abridged(plan.stages, len(header))
    ]
    lines = [
        f"{config.experiment or 'plan'}: {plan.train_examples:,} training examples, "
        f"{plan.epochs:g} epochs",
        "",
        *aligned([header, *rows]),
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


def _row(stage: Stage, layout: Layout) -> tuple[str, ...]:
    rates = f"{stage.learning_rate:.4g}"
    if stage.last_learning_rate != stage.learning_rate:
        rates += f" .. {stage.last_learning_rate:.4g}"
    shapes = Counter(part.examples_per_device for part in layout.microbatches(stage.batch_size))
    cut = " + ".join(f"{count} x {layout.devices * shape:,}" for shape, count in shapes.items())
    return (
        f"{stage.first_update:,}",
        f"{stage.num_updates:,}",
        f"{stage.first_example:,}",
        f"{stage.epoch:.4g}",
        f"{stage.batch_size:,}",
        rates,
        f"{stage.momentum:.4g}",
        f"{stage.noise_scale:.4g}",
        cut,
    )


def _more(stage: Stage, plan: Plan, moving: Sequence[str]) -> tuple[str, ...]:
    """The cells that are there for tokens, and for what moves."""
    cells = [f"{plan.hypers[name][stage.first_update]:.4g}" for name in moving]
    if per_example := plan.tokens_per_example:
        counts = stage.first_example, stage.batch_size
        cells = [*(short(count * per_example) for count in counts), *cells]
    return tuple(cells)


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
