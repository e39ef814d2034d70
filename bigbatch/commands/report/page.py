"""The report as one HTML page: no network, its own small script, readable on a phone and a desk."""

import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from bigbatch.commands.report import figures, linear_scaling, table
from bigbatch.commands.report.interactive import axes, page_data
from bigbatch.commands.report.runs import LoggedRun
from bigbatch.commands.report.summary import MeanSd, Summary
from bigbatch.commands.report.timing import StageSpeed, equal_budgets, input_wait_s, stage_speeds
from bigbatch.schedule.durations import in_epochs

_CAPTIONS = {
    "loss": "Mean over the seeds of the log training loss; the band is one standard deviation of a "
    "run. Losses are averages over whole epochs, in which every run has seen every example once. A "
    "dashed experiment has another noise scale than the reference.",
    "gap": "Difference of the mean log losses divided by the standard deviation of one run between "
    "seeds, epoch by epoch. The grey band is twice what chance gives, up and down: an experiment "
    "that does not differ seldom leaves it.",
    "accuracy": "Mean over the seeds; the band is one standard deviation of a run. The lowest of "
    "the early evaluations lie below the figure.",
    "metric": "Mean over the seeds; the band is one standard deviation of a run. The first "
    "evaluations may lie outside the figure.",
    "batch_size": "As logged by the first run of each experiment.",
    "learning_rate": "As logged by the first run of each experiment.",
    "noise_scale": "What the plan keeps where the learning rate falls or the batch grows.",
    "gradient_noise": "The batch size at which the noise of the gradient is as large as the "
    "gradient, from the gradients of the first run; the band is one standard error. The table of "
    "where linear scaling ends says whether of the training set or of the data distribution.",
    "throughput": "Evaluations and checkpoints included; mean over the seeds.",
}
# What is not in the page, a browser does not ask for.
_NO_NETWORK = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:"
)
_HOW = (
    "Drag to zoom, or hold Ctrl and turn the wheel, or pinch. With the keyboard: Tab to a figure, "
    "then arrows, + and \N{MINUS SIGN}, and 0 for all of it. The disk saves an SVG file."
)
_GLOSSARY = {
    "batch size": "examples of one update.",
    "update": "one step of the optimizer.",
    "noise scale": "learning rate / batch size as the paper has it, times the number of training "
    "examples, over 1 \N{MINUS SIGN} momentum. The plan keeps it where the batch grows.",
    "gradient noise scale": "the batch size at which the noise of the gradient is as large as the "
    "gradient. It is measured.",
    "curve gap": "how far two mean loss curves lie apart, in spreads between seeds.",
    "p": "how often chance deals the same runs into groups as far apart.",
    "ghost batch": "the examples that share the statistics of a normalisation.",
    "seed": "decides the initial parameters and the order of the examples.",
}
_START = ("command", "commit", "hardware")
# So many experiments are found by eye.
_FEW = 6
_FILES = Path(__file__).parent

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
    "seconds",
    "examples/s",
)


@np.errstate(over="ignore", divide="ignore", invalid="ignore")
def page(summary: Summary) -> str:
    """The whole page as HTML text.

    Args:
      summary: the experiments.

    Returns:
      A document with its script, style and data inside.
    """
    data = page_data(summary)
    title = _title(summary)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_NO_NETWORK}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        f"<title>{escape(title)}</title><style>{_file('page.css')}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(_lead(summary))}</p>',
        *_claims(summary),
        *_warnings(summary),
        *_figures(summary, data),
        "<h2>Numbers</h2>",
        _html_table(table.columns(summary), table.table(summary)),
        f'<p class="small">{escape(table.notes(summary))}</p>',
        f'<p class="small">{escape(table.explanation(summary))}</p>',
        *_budgets(summary),
        *_times(summary),
        *_linear_scaling(summary),
        *_config_differences(summary),
        *_plans(summary),
        *_runs(summary),
        *_what_was_run(summary),
        "<h2>Words</h2><dl>",
        *(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in _GLOSSARY.items()),
        "</dl>",
        f'<script type="application/json" id="data">{_json(data)}</script>',
        f"<script>{_bokeh()}</script>",
        f"<script>{_file('page.js')}</script>",
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
    tokens = f" of {run.tokens_per_example:,} tokens" if run.tokens_per_example else ""
    return f"{runs} of {experiments}, on {examples} training examples{tokens}."


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


def _figures(summary: Summary, data: Mapping[str, Any]) -> Iterator[str]:
    """The tools, and an empty box for every chart; the script fills them."""
    yield '<div class="tools"><fieldset aria-label="x axis">'
    names = axes(summary)
    for name in names:
        checked = " checked" if name == names[0] else ""
        yield f'<label><input type="radio" name="axis" value="{name}"{checked}>{name}</label>'
    yield '</fieldset><fieldset class="names" aria-label="experiments, shown or hidden">'
    for number, (experiment, style) in enumerate(figures.styles(summary).items()):
        dash = f' stroke-dasharray="{" ".join(map(str, style.dash))}"' if style.dash else ""
        yield (
            f'<button type="button" data-experiment="{number}" aria-pressed="true">'
            '<svg width="22" height="8" aria-hidden="true"><line x1="0" x2="22" y1="4" y2="4" '
            f'stroke="{style.colour}" stroke-width="{style.width}"{dash}/></svg>'
            f"{escape(experiment)}</button>"
        )
    yield "</fieldset>"
    if len(summary.experiments) > _FEW:
        yield '<input id="filter" type="search" placeholder="names with ..." aria-label="filter">'
    if any(len(experiment.runs) > 1 for experiment in summary.experiments):
        yield '<label><input type="checkbox" id="seeds">each seed</label>'
    yield "</div>"
    yield "<noscript><p>These figures need JavaScript; those beside this page do not.</p>"
    yield "</noscript>"
    yield f'<p class="small how">{_HOW}</p><div class="charts">'
    for chart in data["charts"]:
        name = chart["id"]
        yield f"<figure><h2>{escape(chart['title'])} "
        yield f'<button type="button" id="scale-{name}" title="linear or log"></button></h2>'
        yield f'<div class="chart" id="chart-{name}" role="group" tabindex="0"></div>'
        yield f"<figcaption>{escape(_CAPTIONS[chart['id']])}</figcaption></figure>"
    yield "</div>"


def _file(name: str) -> str:
    return (_FILES / name).read_text(encoding="utf-8")


def _bokeh() -> str:
    """The library's own script: a page that is opened needs no network."""
    # The package is not imported: that takes a second, and a home.
    locate = importlib.metadata.distribution("bokeh").locate_file
    names = [f"bokeh/server/static/js/bokeh{part}.min.js" for part in ("", "-api")]
    return "\n".join(Path(str(locate(name))).read_text("utf-8") for name in names)


def _json(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the element it stands in."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _budgets(summary: Summary) -> Iterator[str]:
    """The main metric, if anything was evaluated, at equal updates, examples and seconds."""
    groups = [experiment.runs for experiment in summary.experiments]
    if len(groups) > 1 and (metric := summary.metric):
        budgets = equal_budgets(groups, metric)
        yield f"<h2>Test {escape(metric.name)} at equal cost{metric.unit}</h2>"
        head = ["experiment", *(f"at {_amount(b.amount)} {b.unit}" for b in budgets)]
        rows = [
            (experiment.name, *(table.metric_text(MeanSd.of(b.values[i]), metric) for b in budgets))
            for i, experiment in enumerate(summary.experiments)
        ]
        yield _html_table(head, rows)
        yield (
            '<p class="small">At as much as the experiment that ended first has spent: the last '
            "evaluation until then, mean and standard deviation over the runs.</p>"
        )


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _times(summary: Summary) -> Iterator[str]:
    """Seconds of a run, and how many of them it waited for input."""
    waits = [[input_wait_s(run) for run in e.runs] for e in summary.experiments]
    if not np.isfinite(np.concatenate(waits)).any():
        return
    rows = []
    for experiment, waited in zip(summary.experiments, waits, strict=True):
        wait_s, seconds = float(np.mean(waited)), experiment.seconds.mean
        share = 100 * wait_s / seconds if seconds > 0 else np.nan
        cells = (
            _number(v, form) for v, form in ((seconds, ",.1f"), (wait_s, ",.2f"), (share, ".1f"))
        )
        rows.append((experiment.name, *cells))
    yield "<h2>Where the time went</h2>"
    yield _html_table(("experiment", "seconds", "of them waiting for input", "%"), rows)


def _linear_scaling(summary: Summary) -> Iterator[str]:
    """Where the noise was measured: how far the linear rule for the learning rate goes."""
    rows = linear_scaling.rows(summary)
    if rows:
        yield "<h2>Where linear scaling ends</h2>"
        yield _html_table(linear_scaling.COLUMNS, rows)
        yield f'<p class="small">{escape(linear_scaling.NOTE)}</p>'


def _config_differences(summary: Summary) -> Iterator[str]:
    if len(summary.experiments) > 1:
        yield "<h2>What the experiments set differently</h2>"
        names = ["config field", *(experiment.name for experiment in summary.experiments)]
        rows = [
            (field, *(_readable(value) for value in values))
            for field, values in summary.config_differences.items()
        ]
        yield _html_table(names, rows, kind="wide") if rows else "<p>Nothing in their configs.</p>"


def _readable(value: str) -> str:
    """A value's JSON without its quotes and braces: `name: grow_batch, max_batch_size: 320`."""
    try:
        return _words(json.loads(value))
    except ValueError:
        return value


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_words(inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, list):
        between = "; then " if any(isinstance(inner, dict) for inner in value) else ", "
        return between.join(map(_words, value)) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:,}" if isinstance(value, int) else str(value)


def _plans(summary: Summary) -> Iterator[str]:
    plans = [
        (experiment.name, runs, plan)
        for experiment in summary.experiments
        for runs in _of_one_plan(experiment.runs)
        if (plan := next((run.plan for run in runs if run.plan is not None), None))
    ]
    if plans:
        yield "<h2>Plans</h2>"
    for name, runs, plan in plans:
        which = f"{name}, seed {runs[0].seed}" if runs[0].decides else name
        total = f"{which}: {plan['num_updates']:,} updates, {in_epochs(plan['epochs'])}"
        yield f"<h3>{escape(total)}</h3>"
        stages = zip(plan["stages"], stage_speeds(runs), strict=True)
        yield _html_table(_STAGE_HEAD, [_stage_row(i, *pair) for i, pair in enumerate(stages, 1)])


def _of_one_plan(runs: Sequence[LoggedRun]) -> Sequence[Sequence[LoggedRun]]:
    return [[run] for run in runs] if runs[0].decides else [runs]


def _stage_row(number: int, stage: Mapping[str, Any], speed: StageSpeed) -> tuple[str, ...]:
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
        _number(speed.seconds, ",.1f"),
        _number(speed.examples_per_s, ",.0f"),
    )


def _number(value: object, form: str) -> str:
    """The value as text; a plan may lack some, as Adam's has no momentum, and a log its times."""
    known = isinstance(value, int | float) and np.isfinite(value)
    return format(value, form) if known else table.MISSING


def _runs(summary: Summary) -> Iterator[str]:
    yield "<h2>Runs</h2>"
    head = ("directory", "experiment", "seed", "state", *(m.heading for m in summary.metrics))
    rows = [
        (
            str(run.path),
            experiment.name,
            table.MISSING if run.seed is None else str(run.seed),
            "finished" if run.finished else f"at epoch {run.epochs:.1f}",
            *(table.final(run, m) if run.finished else table.MISSING for m in summary.metrics),
        )
        for experiment in summary.experiments
        for run in experiment.runs
    ]
    yield _html_table(head, rows)


def _what_was_run(summary: Summary) -> Iterator[str]:
    """Commands, commits, versions, hardware and dates: one row for all runs that share them."""
    groups: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for experiment in summary.experiments:
        for run in experiment.runs:
            for start in run.starts:
                versions = start.get("versions")
                packages = versions if isinstance(versions, dict) else {}
                said = tuple(str(start.get(name) or table.MISSING) for name in _START)
                told = (*said, ", ".join(f"{k} {v}" for k, v in packages.items()))
                groups.setdefault(told, []).append((experiment.name, str(start.get("date", ""))))
    if groups:
        yield "<h2>What was run</h2>"
        head = ("experiments", "starts", "first", "last", *_START, "versions")
        yield _html_table(head, [_start_row(*group) for group in groups.items()], kind="wide")


def _start_row(said: tuple[str, ...], of: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    names = ", ".join(dict.fromkeys(name for name, _ in of))
    dates = sorted(date for _, date in of)
    return (names, f"{len(of):,}", dates[0], dates[-1], *said)


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
