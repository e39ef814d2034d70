"""No config and no file ends in a traceback, fills memory or takes long; see `tests.fuzz`."""

import json
import subprocess
import sys

import numpy as np
import pytest

from bigbatch.checks import parsed
from bigbatch.commands.report import figures
from bigbatch.commands.report.runs import read_run
from bigbatch.commands.report.summary import summarise
from bigbatch.commands.report.table import markdown
from bigbatch.errors import UserError
from bigbatch.schedule.plan import Plan, make_plan
from bigbatch.schedule.policy import constant
from tests.report_runs import DECAY, falling_loss, write_run
from tests.test_distributed import ROOT


@pytest.mark.parametrize(
    ("what", "count"),
    [
        ("configs", 150),
        ("files", 150),
        ("figures", 4),
        ("texts", 150),
        pytest.param("configs", 4_000, marks=pytest.mark.long),
        pytest.param("files", 2_000, marks=pytest.mark.long),
        pytest.param("figures", 300, marks=pytest.mark.long),
        pytest.param("texts", 4_000, marks=pytest.mark.long),
    ],
)
def test_whatever_is_read_ends_in_a_sentence(what, count):
    command = [sys.executable, "-m", "tests.fuzz", what, str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [], done.stderr


def test_a_plan_has_so_many_updates_and_no_more():
    recipe, most = constant(0.1, 1, 0.9), 2**24
    said = r"^epochs: given 1000.0; nearest: 16.* about 1.05e\+09, which take 25.2 GB"
    with pytest.raises(UserError, match=said):
        make_plan(recipe, train_examples=2**20, epochs=1000)
    text = make_plan(recipe, train_examples=4, epochs=2).to_json()
    for count in (most + 1, 10**17, 10**400, 0, -1, 1.5e300):
        with pytest.raises(UserError, match=r"^plan: "):
            Plan.from_json(text.replace("[1, 8]", f"[1, {count}]"))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("[" * 100_000, list),
        ("[true]", [int]),
        ('{"a": [1, "2"]}', {"a": [int]}),
        ("1" * 30, int),
        ("1" * 5_000, int),
        ("{}", {"a": int}),
        ("null", dict),
        (b"\xff", dict),
    ],
)
def test_json_of_another_kind_is_refused(text, kind):
    with pytest.raises(ValueError, match=r"\w"):
        parsed(text, kind)
    assert np.isnan(parsed('{"a": NaN}', {"a": float})["a"])


@pytest.mark.parametrize("name", ["a$b$c", "$\\frac$", "a\nb", "<b>|*x*|", "\udcff", "a_b^2"])
def test_names_are_no_markup(tmp_path, name):
    path = write_run(tmp_path, "decay", 0, DECAY, falling_loss(0))
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(fields | {"experiment": name}))
    summary = summarise([read_run(path)])
    rows = [line for line in markdown(summary).splitlines() if line.startswith("|")]
    assert len({row.replace("\\|", "").count("|") for row in rows}) == 1
    assert len(rows) == 3
    (panels, *_) = figures.panels(summary).values()
    figures.save(panels, summary, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1_000
