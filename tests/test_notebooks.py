"""The notebooks run, in a fast mode, and agree with their sources.

The .ipynb files are made by `jupytext --to ipynb notebooks/*.py`.
"""

import os
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("*.py"))


def test_there_are_notebooks():
    assert [path.stem for path in SOURCES] == ["noise_scale", "pods", "schedules", "train_digits"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_runs_as_a_script(source):
    fast = os.environ | {"BIGBATCH_FAST": "1", "MPLBACKEND": "agg"}
    command = [sys.executable, "-W", "error", source.name]
    done = subprocess.run(
        command, cwd=NOTEBOOKS, env=fast, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_is_its_source(source):
    expected = jupytext.read(source)
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)

    def cells(of):
        return [(cell.cell_type, cell.source) for cell in of.cells]

    assert cells(notebook) == cells(expected)
    assert all(not cell.get("outputs") for cell in notebook.cells)
