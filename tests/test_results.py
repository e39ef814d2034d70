"""The committed tables are what today's code makes of the committed logs."""

import tarfile
from pathlib import Path

import pytest

from bigbatch.report import read_run, summarise
from bigbatch.report.table import markdown

RESULTS = Path(__file__).parent.parent / "notebooks" / "results"
# A directory with logs.tar.xz (VARIANT/EXPERIMENT/seed_S/...) has a table for each variant.
LOGS = sorted(RESULTS.glob("*/logs.tar.xz"))


def test_there_are_results():
    assert {path.parent.name for path in LOGS} == {"digits", "fashion_mnist"}


@pytest.mark.parametrize("logs", LOGS, ids=lambda path: path.parent.name)
def test_a_table_is_that_of_its_logs(logs, tmp_path):
    with tarfile.open(logs) as archive:
        archive.extractall(tmp_path, filter="data")
    variants = sorted(tmp_path.iterdir())
    tables = {path.parent.name: path for path in logs.parent.glob("*/report.md")}
    assert {path.name for path in variants} == set(tables)
    for variant in variants:
        runs = [read_run(path) for path in sorted(variant.glob("*/seed_*"))]
        assert len(runs) >= 9
        assert all(run.finished for run in runs)
        # The order of the experiments is that of the run; the numbers do not depend on it.
        lines = markdown(summarise(runs)).splitlines()
        assert sorted(lines) == sorted(tables[variant.name].read_text().splitlines())
