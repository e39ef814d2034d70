"""Config files as users write them: wherever they lie, whatever they import and raise."""

import shutil
from pathlib import Path

import pytest

from bigbatch.commands.compare import compare
from bigbatch.config.file import compared_names, load_config
from bigbatch.errors import UserError

DIGITS = Path("configs/digits.py")


def test_a_colon_in_the_path_is_no_experiment(tmp_path, monkeypatch):
    for name in ("run_10:30:00/digits.py", "a:decay.py", "plain.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        shutil.copy(DIGITS, path)
        assert load_config(f"{path}:increase").experiment == "increase"
        assert load_config(str(path)).experiment == "decay"
        assert load_config(f"{path}:").experiment == "decay"
        with pytest.raises(UserError, match=r"given 'increse'.*nearest: 'increase'"):
            load_config(f"{path}:increse")
    monkeypatch.chdir(tmp_path)
    assert load_config("a:decay.py:increase").experiment == "increase"
    with pytest.raises(UserError, match="given 'none'; allowed: a Python file"):
        load_config("none:decay")


def test_annotations_that_are_texts_and_siblings(tmp_path):
    shutil.copy(DIGITS, tmp_path / "of_the_user_base.py")
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\n"
        "import dataclasses\n"
        "from of_the_user_base import get_config as base\n"
        "@dataclasses.dataclass\n"
        "class Lr:\n  value: float = 0.25\n"
        "def get_config(experiment):\n"
        "  config = base('decay')\n"
        "  config.policy.learning_rate = Lr().value\n"
        "  return config\n"
    )
    assert load_config(str(path)).plan.hyper(0)["learning_rate"] == 0.25


def test_of_two_groups_of_a_name_an_override_names_none(tmp_path):
    path = tmp_path / "two.py"
    path.write_text(
        "from configs.digits import get_config as base\n"
        "def get_config(experiment):\n"
        "  config = base('decay').to_dict()\n"
        "  config['transformations'] = [{'name': 'scale', 'factor': f} for f in (2, 3)]\n"
        "  return config\n"
    )
    assert load_config(str(path)).plan.hyper(0)["learning_rate"] == pytest.approx(0.6)
    with pytest.raises(UserError, match=r"^transformations.scale.factor: .*several are named"):
        load_config(str(path), [("transformations.scale.factor", "5")])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("import sys; sys.exit(3)", r"SystemExit: 3"),
        ("def get_config(e): raise SystemExit('no')", r"SystemExit: no"),
        ("def get_config(e):\n  import os\n  exit()", r"SystemExit"),
        ("EXPERIMENTS = 7\ndef get_config(e): return {}", "a list of names as EXPERIMENTS"),
        ("COMPARED = 'decay'\ndef get_config(e): return {}", "a list of names as COMPARED"),
        ("def get_config(e):\n  a = {}\n  a['a'] = a\n  return a", "RecursionError"),
        ("def get_config(): return {}", "TypeError"),
        ("def get_config(e): return 3", "returns a ConfigDict"),
        ("x = 1", "defines get_config"),
        ("def (", "SyntaxError"),
        ("\0", r"(SyntaxError|ValueError)"),
    ],
)
def test_what_a_file_raises_is_a_mistake_with_its_name(tmp_path, body, words):
    path = tmp_path / "bad.py"
    path.write_text(body)
    with pytest.raises(UserError, match=rf"^config: given .*{words}"):
        (compared_names if "COMPARED" in body else load_config)(str(path))


@pytest.mark.parametrize("name", ["..", "a/b", "/tmp/x"])
def test_experiments_are_names_of_directories(tmp_path, name):
    path = tmp_path / "names.py"
    path.write_text(f"EXPERIMENTS = [{name!r}]\ndef get_config(e): return {{}}")
    with pytest.raises(UserError, match="a name that a directory can have"):
        compare(str(path), tmp_path / "out", experiments=None, seeds=1, overrides=[])
    assert not (tmp_path / "out").exists()
