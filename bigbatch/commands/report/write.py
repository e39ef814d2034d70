"""Reads run directories, compares them, and writes the report's files."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from bigbatch.commands.report import figures, table
from bigbatch.commands.report.page import page
from bigbatch.commands.report.runs import LoggedRun, read_run
from bigbatch.commands.report.summary import Summary, summarise
from bigbatch.errors import Problem, UserError
from bigbatch.places.paths import place
from bigbatch.places.replacing import replacing


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """What `write_report` wrote.

    Attributes:
      page: the HTML page.
      table: the Markdown table.
      figures: the PNG files; each has an SVG file beside it.
      summary: the numbers.
    """

    page: Path
    table: Path
    figures: tuple[Path, ...]
    summary: Summary

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is missing, damaged or not comparable, one sentence each."""
        return self.summary.warnings


def write_report(run_dirs: Sequence[str | Path], out: str | Path) -> Report:
    """Writes `report.html`, `report.md` and the figures as PNG and SVG files.

    Args:
      run_dirs: working directories of `bigbatch train`, finished or not. They are only read. One
        named twice counts once, and what lies in `out` is left out: an earlier report is no run.
      out: the directory to write to; made if it does not exist, files of an earlier report are
        replaced.

    Returns:
      The paths, the numbers, and what is missing.

    Raises:
      UserError: a directory is no run, no run has a training record, or `out` cannot be written.
    """
    out_path = place(out, "out")
    problems: list[Problem] = []
    runs: list[LoggedRun] = []
    for path in _distinct(run_dirs, out_path):
        try:
            runs.append(read_run(path))
        except UserError as error:
            problems += [dataclasses.replace(p, field="run_dirs") for p in error.problems]
    if not problems and not any(run.usable for run in runs):
        given = [str(path) for path in run_dirs]
        allowed = "at least one run directory with a training record in its metrics.jsonl"
        problems.append(Problem("run_dirs", given, allowed))
    if out_path.exists() and not out_path.is_dir():
        problems.append(_cannot_write(out, "it is a file"))
    if problems:
        raise UserError(problems)
    summary = summarise(runs)
    try:
        out_path.mkdir(parents=True, exist_ok=True)
        return _write(summary, out_path)
    except OSError as error:
        raise UserError(_cannot_write(out, error.strerror)) from error


def _distinct(run_dirs: Sequence[str | Path], out: Path) -> list[Path]:
    own = out.resolve()
    places = [place(path, "run_dirs") for path in reversed(run_dirs)]
    paths = {path.resolve(): path for path in places}
    outside = [path for real, path in paths.items() if own not in (real, *real.parents)]
    return outside[::-1]


def _cannot_write(out: str | Path, reason: str | None) -> Problem:
    return Problem("out", str(out), f"a directory that can be written ({reason})")


def _write(summary: Summary, out: Path) -> Report:
    texts = {"report.md": table.markdown(summary), "report.html": page(summary)}
    # The page last: where it is, everything is.
    for suffix in (".png", ".svg"):
        (out / f"curve_gap{suffix}").unlink(missing_ok=True)
    drawn = {out / f"{name}.png": panels for name, panels in figures.panels(summary).items()}
    for path, panels in drawn.items():
        figures.save(panels, summary, path)
    for name, text in texts.items():
        with replacing(out / name) as file:
            file.write(text.encode())
    return Report(out / "report.html", out / "report.md", tuple(drawn), summary)
