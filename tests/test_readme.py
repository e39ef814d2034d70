"""The README's code runs as printed; its commands and those of the guides parse."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bigbatch import cli
from bigbatch.commands import check_log, plan_verb
from bigbatch.commands import data as data_verbs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    parts = [shlex.split(part) for line in lines for part in line.split(" && ")]
    return [part[1:] for part in parts if part[0].endswith("bigbatch")]


def guide_commands() -> list[list[str]]:
    """The commands within the longer lines of docs/: behind srun, quotes, or on other machines."""
    found = []
    for guide in sorted((ROOT / "docs").glob("*.md")):
        text = guide.read_text(encoding="utf-8").replace("\\\n", " ")
        found += re.findall(r"^(?:!|all '.*/|srun .* )?bigbatch ((?:--?\w|\w).*)$", text, re.M)
    return [shlex.split(re.split(r" > | *'$", command)[0]) for command in found]


def test_there_is_something_to_test():
    assert len(blocks("python")) >= 2
    assert {command[0] for command in commands()} == {
        "compare",
        "plan",
        "train",
        "evaluate",
        "report",
        "data",
    }
    assert {"plan", "bench", "train", "data"} < {command[0] for command in guide_commands()}


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.split("\n", 1)[0])
def test_python_runs_as_printed(code, tmp_path):
    path = tmp_path / "printed.py"
    path.write_text(code)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_printed_config_plans(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(next(code for code in blocks("python") if "get_config" in code))
    assert cli.main(["plan", f"--config={path}:growing"]) == 0
    assert "fewer updates" in capsys.readouterr().out


@pytest.mark.parametrize("command", commands() + guide_commands(), ids=" ".join)
def test_commands_parse(command, monkeypatch):
    """Every verb is called with the arguments that are printed, but does nothing."""
    monkeypatch.chdir(ROOT)
    called = []
    for module in (check_log, plan_verb):
        monkeypatch.setattr(module, "run", called.append)
    for verb in ("_train", "_evaluate", "_compare", "_report", "_bench"):
        monkeypatch.setattr(cli, verb, called.append)
    for verb in ("_prepare", "_info", "_bench"):
        monkeypatch.setattr(data_verbs, verb, called.append)
    assert cli.main(command) == 0
    (options,) = called
    for reference in [getattr(options, "config", None)]:
        if reference:
            from bigbatch.config.file import load_config

            load_config(reference, options.overrides)


def test_the_printed_plan_is_what_the_command_prints(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (printed,) = blocks("text")
    command = next(command for command in commands() if command[0] == "plan")
    assert cli.main(command) == 0
    assert capsys.readouterr().out == printed
