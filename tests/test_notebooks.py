"""The notebooks: what is committed is what the sources print and draw.

The .ipynb files are made from the sources by the command of CONTRIBUTING. Here every cell runs
once, in this process, and its output is compared loosely with the committed one: as many figures,
the same lines apart from their numbers, and the numbers to 1 %. A notebook that trains is cut
short: the names of its cell tagged `parameters` get other values. Then first lines are compared.
"""

import contextlib
import io
import re
import tempfile
import tomllib
from pathlib import Path

import IPython.display
import jupytext
import matplotlib.pyplot as plt
import nbformat
import pytest

from bigbatch.commands.critical.measure import Asked

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
ADDRESS = PROJECT["urls"]["Repository"]
# On the tests' eight devices, of which none is idle.
_TINY = [
    ("ghost_batch_examples", "4"),
    ("microbatch_examples_per_device", "4"),
    ("model.strides", "(2,2,1)"),
]
SHORT = {
    "train_digits": {
        "EXPERIMENTS": ["decay"],
        "SEEDS": 1,
        "OVERRIDES": [*_TINY, ("epochs", "0.2"), ("policy.boundaries_epochs", "[0.1]")],
    },
    "language_model": {
        "EXPERIMENTS": ["cosine"],
        "OVERRIDES": [
            *_TINY[:2],
            ("tokens", "20_000"),
            ("data.train_examples", "200"),
            ("data.test_examples", "16"),
            ("model.width", "8"),
        ],
    },
    "noise_scale": {
        "OVERRIDES": [
            *_TINY,
            ("noise_small_batch_examples", "4"),
            ("keep_every_updates", "5"),
            ("epochs", "0.2"),
            ("policy.boundaries_epochs", "[0.1]"),
        ],
        "FROM_UPDATE": 5,
        "ASKED": Asked(sizes=(32, 64, 128), branches=2, loss_share=0.05, most_epochs=0.5),
    },
}
_NUMBER = re.compile(r"(?<!\w)-?(?:\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?|nan|inf)\b")


def _committed(source: Path) -> nbformat.NotebookNode:
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def _printed(cell: nbformat.NotebookNode) -> str:
    """What it printed, and showed as Markdown."""
    shown = [out for out in cell.outputs if out.get("name") != "stderr"]
    return "".join(out.get("text") or out.data.get("text/markdown", "") for out in shown)


def _lines(text: str) -> list[str]:
    """Without numbers, and without the width that they take."""
    return [" ".join(_NUMBER.sub("#", line).split()) for line in text.splitlines()]


def _numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in _NUMBER.findall(text)]


@pytest.fixture
def run(monkeypatch, tmp_path, quick_networks):
    """Runs the cells of a notebook; what each printed, and how many figures it drew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(plt, "show", lambda: None)
    monkeypatch.setattr(IPython.display, "display", lambda shown: print(shown.data))
    plt.switch_backend("agg")

    def cells(source):
        names = {"__name__": "__main__"}
        for number, cell in enumerate(jupytext.read(source).cells):
            if cell.cell_type == "code":
                with contextlib.redirect_stdout(io.StringIO()) as printed:
                    exec(compile(cell.source, f"{source.name}, cell {number}", "exec"), names)
                if "parameters" in cell.metadata.get("tags", ()):
                    short = SHORT.get(source.stem, {})
                    assert {*short} <= {*names}
                    names |= short
                yield printed.getvalue(), len(plt.get_fignums())
                plt.close("all")

    return cells


def test_there_are_notebooks():
    made = {path.with_suffix(".py") for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {*SHORT, "pods", "schedules"} <= {path.stem for path in NOTEBOOKS}
    assert made == {*NOTEBOOKS}


@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_prints_and_draws_what_is_committed(source, run):
    committed = [cell for cell in _committed(source).cells if cell.cell_type == "code"]
    for cell, (printed, figures) in zip(committed, run(source), strict=True):
        assert figures == sum("image/png" in out.get("data", ()) for out in cell.outputs)
        ours, theirs = _lines(printed), _lines(_printed(cell))
        if source.stem in SHORT:
            assert ours[:1] == theirs[:1]
        else:
            assert ours == theirs
            assert _numbers(printed) == pytest.approx(_numbers(_printed(cell)), rel=0.01)


@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_its_source_with_outputs(source):
    expected, notebook = jupytext.read(source), _committed(source)
    nbformat.validate(notebook)
    cells = [[(c.cell_type, c.source) for c in each.cells] for each in (notebook, expected)]
    assert cells[0] == cells[1]
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    # No errors, and no values that happen to end a cell: they have addresses in memory.
    assert {out.output_type for out in outputs} == {"stream", "display_data"}
    # A path from the root on is that of one machine.
    assert not re.search(r"(?<![\w.:/])/\w+/", "".join(out.get("text", "") for out in outputs))
    assert source.with_suffix(".ipynb").stat().st_size < 300_000


@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_and_installs_in_colab(source):
    text = source.read_text("utf-8")
    opened = ADDRESS.replace("https://github.com", "https://colab.research.google.com/github")
    assert f"]({opened}/blob/main/notebooks/{source.stem}.ipynb)" in text
    assert f'"git+{ADDRESS}"' in text


def test_the_repository_has_one_address():
    found = {
        address
        for path in [*NOTEBOOKS, *ROOT.glob("*.*"), *(ROOT / "docs").rglob("*.md")]
        if path.is_file()
        for address in re.findall(r"https://github.com/[\w-]+/bigbatch", path.read_text("utf-8"))
    }
    assert found == {ADDRESS}
