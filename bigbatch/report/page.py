"""The report as one HTML page: no script, no network, readable on a phone and on a desk."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from bigbatch.report import figures, table
from bigbatch.report.figures import Panel, Style
from bigbatch.report.summary import Summary

# (name of the PNG file, heading, panels, caption)
FIGURES: tuple[tuple[str, str, tuple[Panel, ...], str], ...] = (
    (
        "growing_batch",
        "Training loss",
        (figures.loss_by_epochs, figures.loss_by_updates),
        "Mean over the seeds of the log training loss; the band is one standard deviation of a "
        "run. Losses are averages over whole epochs, in which every run has seen every example "
        "once. Dots mark where runs end. A dashed experiment has another noise scale than the "
        "reference.",
    ),
    (
        "curve_gap",
        "How far the curves are apart",
        (figures.curve_gap,),
        "Difference of the mean log losses divided by the standard deviation of one run between "
        "seeds, epoch by epoch. The band is twice what chance gives, up and down: an experiment "
        "that does not differ seldom leaves it. Beyond 4 the axis is logarithmic.",
    ),
    (
        "schedules",
        "Batch size and learning rate",
        (figures.batch_size, figures.learning_rate),
        "As logged by the first run of each experiment.",
    ),
    (
        "test_accuracy",
        "Test accuracy",
        (figures.accuracy_by_epochs, figures.accuracy_by_updates),
        "Mean over the seeds; the band is one standard deviation of a run. The lowest of the "
        "early evaluations lie below the figure.",
    ),
)

_STAGE_HEAD = (
    "stage",
    "first update",
    "updates",
    "first example",
    "epoch",
    "batch size",
    "learning rate",
    "momentum",
    "noise scale",
)

_CSS = """
:root { color-scheme: light; --ink: #1d1d1f; --soft: #5c5c63; --line: #e2e2e6; --tint: #f6f6f8; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 78rem; color: var(--ink);
  background: #fff; font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
  Arial, sans-serif; -webkit-text-size-adjust: 100%; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 .35rem; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.75rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
p, ul { margin: .6rem 0; max-width: 46rem; }
.lead, figcaption, .small { color: var(--soft); }
.small, figcaption { font-size: .875rem; }
ul { padding-left: 1.15rem; }
li { margin: .4rem 0; overflow-wrap: anywhere; }
.warnings { border: 1px solid #e6c37a; background: #fff9ea; border-radius: .5rem;
  padding: .3rem 1rem; margin: 1.5rem 0; max-width: 46rem; }
.warnings h2 { font-size: 1rem; margin: .6rem 0 0; }
figure { margin: 0; }
.panels { display: flex; flex-wrap: wrap; gap: 1rem; }
.panels img { flex: 1 1 19rem; min-width: 0; max-width: 100%; width: 19rem; height: auto; }
.panels img:only-child { flex-grow: 0; flex-basis: 33rem; }
figcaption { max-width: 46rem; margin-top: .4rem; }
.legend { display: flex; flex-wrap: wrap; gap: .15rem 1.4rem; list-style: none; padding: 0;
  margin: .3rem 0 .6rem; max-width: none; font-size: .875rem; }
.legend li { margin: 0; }
.legend svg { vertical-align: middle; margin-right: .45rem; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .55rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; white-space: normal; color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tbody th { font-weight: 600; }
.wide td { white-space: normal; overflow-wrap: anywhere; min-width: 7rem; }
code { font-size: .9em; background: var(--tint); padding: .05em .3em; border-radius: .25em; }
"""


def page(summary: Summary) -> str:
    """The whole page as HTML text.

    Args:
      summary: the experiments.

    Returns:
      A document without script, and with all images inside.
    """
    look = figures.styles(summary)
    title = _title(summary)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        f"<title>{escape(title)}</title><style>{_CSS}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(_lead(summary))}</p>',
        *_claims(summary),
        *_warnings(summary),
        *_figures(summary, look),
        "<h2>Numbers</h2>",
        _html_table(table.COLUMNS, table.table(summary)),
        f'<p class="small">{escape(table.notes(summary))}</p>',
        f'<p class="small">{escape(table.explanation(summary))}</p>',
        *_config_differences(summary),
        *_plans(summary),
        *_runs(summary),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _title(summary: Summary) -> str:
    names = [experiment.name for experiment in summary.experiments]
    if len(names) == 1:
        return f"{names[0]}: training runs"
    others = ", ".join(names[1:]) if len(names) <= 4 else f"{len(names) - 1} experiments"
    return f"{others} against {names[0]}"


def _lead(summary: Summary) -> str:
    run = summary.reference.runs[0]
    num_runs = sum(len(experiment.runs) for experiment in summary.experiments)
    sizes = {e.runs[0].train_examples for e in summary.experiments}
    examples = f"{run.train_examples:,}" if len(sizes) == 1 else "different numbers of"
    runs, experiments = _count(num_runs, "run"), _count(len(summary.experiments), "experiment")
    return f"{runs} of {experiments}, on {examples} training examples."


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _claims(summary: Summary) -> Iterator[str]:
    found = table.claims(summary)
    if found:
        yield "<ul>"
        for name, text in found:
            yield f"<li><strong>{escape(name)}</strong>: {escape(text)}</li>"
        yield "</ul>"


def _warnings(summary: Summary) -> Iterator[str]:
    if summary.warnings:
        yield '<section class="warnings"><h2>Missing or not comparable</h2><ul class="small">'
        yield from (f"<li>{escape(warning)}</li>" for warning in summary.warnings)
        yield "</ul></section>"


def _figures(summary: Summary, look: dict[str, Style]) -> Iterator[str]:
    for name, heading, panels, caption in FIGURES:
        if name == "curve_gap" and not has_gap(summary):
            continue
        yield f"<h2>{escape(heading)}</h2><figure>"
        yield from _legend(summary, look)
        yield '<div class="panels">'
        for panel in panels:
            image = base64.b64encode(figures.svg(panel, summary)).decode("ascii")
            text = escape((panel.__doc__ or heading).rstrip("."))
            yield f'<img alt="{text}" src="data:image/svg+xml;base64,{image}">'
        yield f"</div><figcaption>{escape(caption)}</figcaption></figure>"


def has_gap(summary: Summary) -> bool:
    """Whether there is a curve gap to draw."""
    return any(experiment.gap is not None for experiment in summary.experiments)


def _legend(summary: Summary, look: dict[str, Style]) -> Iterator[str]:
    yield '<ul class="legend">'
    for experiment in summary.experiments:
        style = look[experiment.name]
        dash = ' stroke-dasharray="6 3"' if style.dashed else ""
        yield (
            '<li><svg width="26" height="8" aria-hidden="true"><line x1="0" x2="26" y1="4" y2="4" '
            f'stroke="{style.colour}" stroke-width="{style.width}"{dash}/></svg>'
            f"{escape(experiment.name)}</li>"
        )
    yield "</ul>"


def _config_differences(summary: Summary) -> Iterator[str]:
    if len(summary.experiments) > 1:
        yield "<h2>What the experiments set differently</h2>"
        names = ["config field", *(experiment.name for experiment in summary.experiments)]
        rows = [(field, *values) for field, values in summary.config_differences.items()]
        yield _html_table(names, rows, kind="wide") if rows else "<p>Nothing in their configs.</p>"


def _plans(summary: Summary) -> Iterator[str]:
    plans = [
        (experiment.name, plan)
        for experiment in summary.experiments
        if (plan := next((run.plan for run in experiment.runs if run.plan is not None), None))
    ]
    if plans:
        yield "<h2>Plans</h2>"
    for name, plan in plans:
        total = f"{name}: {plan['num_updates']:,} updates, {plan['epochs']:g} epochs"
        yield f"<h3>{escape(total)}</h3>"
        yield _html_table(
            _STAGE_HEAD, [_stage_row(i, stage) for i, stage in enumerate(plan["stages"], 1)]
        )


def _stage_row(number: int, stage: Mapping[str, Any]) -> tuple[str, ...]:
    first, last = (_number(stage[name], ".4g") for name in ("learning_rate", "last_learning_rate"))
    return (
        str(number),
        _number(stage["first_update"], ","),
        _number(stage["num_updates"], ","),
        _number(stage["first_example"], ","),
        _number(stage["epoch"], ".4g"),
        _number(stage["batch_size"], ","),
        first if first == last else f"{first} to {last}",
        _number(stage["momentum"], ".6g"),
        _number(stage["noise_scale"], ".4g"),
    )


def _number(value: object, form: str) -> str:
    """The value as text; a plan may lack some, as Adam's has no momentum."""
    return format(value, form) if isinstance(value, int | float) else table.MISSING


def _runs(summary: Summary) -> Iterator[str]:
    yield "<h2>Runs</h2>"
    rows = []
    for experiment in summary.experiments:
        for run in experiment.runs:
            accuracy = (run.result or {}).get("test_accuracy")
            rows.append(
                (
                    str(run.path),
                    experiment.name,
                    table.MISSING if run.seed is None else str(run.seed),
                    "finished" if run.finished else f"at epoch {run.epochs:.1f}",
                    f"{100 * accuracy:.2f}" if isinstance(accuracy, float) else table.MISSING,
                )
            )
    yield _html_table(("directory", "experiment", "seed", "state", "test accuracy, %"), rows)


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    # Wide tables scroll in a box of their own, so that the page never does.
    lines = [f'<div class="scroll"><table class="{kind}"><thead><tr>']
    lines += [f'<th scope="col">{escape(cell)}</th>' for cell in head]
    lines.append("</tr></thead><tbody>")
    for row in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        lines.append(f'<tr><th scope="row">{escape(row[0])}</th>{cells}</tr>')
    lines.append("</tbody></table></div>")
    return "".join(lines)
