"""The committed tables are what today's code makes of the committed logs."""

import tarfile
from pathlib import Path

import pytest

from bigbatch.commands.report import read_run, summarise
from bigbatch.commands.report.table import markdown
from tests.benchmarks import __main__ as benchmarks
from tests.benchmarks import fastest_runs

RESULTS = Path(__file__).parent.parent / "notebooks" / "results"
# Each holds REPORT/EXPERIMENT/seed_S/..., in the order in which the experiments were run.
LOGS = sorted(RESULTS.glob("*/logs.tar.xz"))


def test_there_are_results():
    assert {path.parent.name for path in LOGS} == {"digits", "fashion_mnist", "language"}


@pytest.mark.parametrize("logs", LOGS, ids=lambda path: path.parent.name)
def test_the_tables_are_those_of_the_logs(logs, tmp_path):
    with tarfile.open(logs) as archive:
        archive.extractall(tmp_path, filter="data")
        names = [Path(name) for name in archive.getnames()]
    runs_of: dict[str, list[Path]] = {}
    for name in names:
        if name.name == "config.json":
            runs_of.setdefault(name.parts[0], []).append(tmp_path / name.parent)
    tables = {path.parent.name: path for path in logs.parent.rglob("report.md")}
    assert set(runs_of) == set(tables)
    for report, directories in runs_of.items():
        runs = [read_run(directory) for directory in directories]
        assert all(run.finished for run in runs)
        assert markdown(summarise(runs)) == tables[report].read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "arguments",
    [
        ("digits", "decay", "test_accuracy", "14000", "0.005"),
        ("fashion", "decay", "test_accuracy", "4000", "0.02"),
        ("language", "cosine", "test_perplexity", "100", "0.2"),
    ],
)
def test_the_tables_of_the_fastest_plan_are_those_of_its_runs(arguments, tmp_path, capsys):
    with tarfile.open(RESULTS / "fastest" / "runs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    name, *rest = arguments
    fastest_runs.main(tmp_path / name, *rest)
    page = (RESULTS / "fastest" / "README.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() in page


def test_the_docs_have_the_table_of_the_benchmarks():
    page = RESULTS.parent.parent / "docs" / "results" / "benchmarks.md"
    assert benchmarks.table() in page.read_text(encoding="utf-8")
