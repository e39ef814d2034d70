"""README, CONTRIBUTING and the pages of docs/: code runs, commands parse, links hold."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from bigbatch import cli
from bigbatch.commands import check_log, plan_verb
from bigbatch.commands import data as data_verbs
from bigbatch.commands.plan_time import times
from bigbatch.config.file import load_config
from bigbatch.layout.time_model import Speeds

ROOT = Path(__file__).parents[1]
FLAT = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [*(ROOT / name for name in FLAT), *sorted((ROOT / "docs").rglob("*.md"))]
}
README = PAGES["README.md"]
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Whose programs run in tests of their own: test_own and test_noise_in_loops.
ELSEWHERE = {"docs/own.md", "docs/noise_in_your_loop.md"}
# Run, parsed, compared; a part of a file; other tools'; what Sphinx makes something of.
LANGUAGES = {"python", "sh", "text", "py", "console", "json", "yaml"}
DIRECTIVES = re.compile(r"\{(toctree|figure|glossary|generated|eval-rst)\}.*")


def blocks(page: str, language: str) -> list[str]:
    return [code for tag, code in FENCE.findall(PAGES[page]) if tag == language]


def commands(page: str) -> list[list[str]]:
    """Those of bigbatch, also behind srun, quotes, or on other machines."""
    found = []
    for code in blocks(page, "sh") + blocks(page, "console"):
        start = r"^ *(?:!|all '.*/|srun .* |\.venv/bin/)?bigbatch (-?.*)$"
        found += re.findall(start, code.replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(re.split(r" > | *'$", command)[0]) for command in found]


COMMANDS = [command for page in PAGES for command in commands(page)]
PROGRAMS = [page for page in PAGES if blocks(page, "python") and page not in ELSEWHERE]
PRINTED = [
    (page, *found)
    for page, text in PAGES.items()
    for found in re.findall(r"```sh\n(bigbatch [^\n]*)\n```\n\n```text\n(.*?)```", text, re.DOTALL)
]


def test_there_is_something_to_test():
    assert {"README.md", "docs/plan.md", "docs/recipe.md"} <= set(PROGRAMS)
    verbs = {"compare", "plan", "train", "evaluate", "export", "report", "data", "bench"}
    assert verbs | {"critical", "check-log"} == {command[0] for command in COMMANDS}
    assert PRINTED


def test_every_block_says_what_it_is():
    tags = {(page, tag) for page, text in PAGES.items() for tag, _ in FENCE.findall(text)}
    assert {(p, t) for p, t in tags if t not in LANGUAGES and not DIRECTIVES.match(t)} == set()


@pytest.mark.parametrize("page", PROGRAMS)
def test_python_runs_as_printed(page, tmp_path):
    path = tmp_path / "printed.py"
    path.write_text("\n".join(blocks(page, "python")))
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_printed_config_plans(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(next(c for c in blocks("docs/recipe.md", "python") if "get_config" in c))
    assert cli.main(["plan", f"--config={path}:growing"]) == 0
    assert "fewer updates" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_parse(command, monkeypatch):
    """Every verb is called with the arguments that are printed, but does nothing."""
    monkeypatch.chdir(ROOT)
    called = []
    for module in (check_log, plan_verb):
        monkeypatch.setattr(module, "run", called.append)
    for verb in ("_train", "_evaluate", "_export", "_compare", "_critical", "_report", "_bench"):
        monkeypatch.setattr(cli, verb, called.append)
    for verb in ("_prepare", "_info", "_bench"):
        monkeypatch.setattr(data_verbs, verb, called.append)
    assert cli.main(command) == 0
    (options,) = called
    if getattr(options, "config", None):
        load_config(options.config, options.overrides)


@pytest.mark.parametrize(("page", "command", "printed"), PRINTED, ids=lambda text: text[:40])
def test_what_is_printed_is_what_the_command_prints(page, command, printed, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert cli.main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out == printed


def test_the_hours_are_those_of_the_time_model():
    rows = re.findall(r"^\| ([\d,]+) \| ([\d.]+) h \| ([\d.]+) h \| ([\d.]+) \|$", README, re.M)
    config = load_config("imagenet_inception_resnet_v2:increase")
    found = times(config, 2560, Speeds(examples_per_s=400.0, allreduce_gbps=400.0))
    hours = [{s.devices: s.seconds / 3600 for s in way} for way in (found.original, found.growing)]
    assert len(rows) == 4
    for devices, *printed in rows:
        recipe, growing = (way[int(devices.replace(",", ""))] for way in hours)
        assert printed == [f"{recipe:.3g}", f"{growing:.3g}", f"{recipe / growing:.2f}"]


def test_the_readme_is_short():
    prose = FENCE.sub("", README)
    assert len(prose.split()) < 1_000
    assert max(len(line) for code in blocks("README.md", "sh") for line in code.splitlines()) < 90


def slugs(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    heads = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", PAGES[page]))
    for link in [link for link in links if not link.startswith("https://")]:
        target, _, anchor = link.partition("#")
        path = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        assert path.exists(), link
        if anchor:
            assert anchor in slugs(path.read_text(encoding="utf-8")), link


def test_versions_and_badges_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} < set(citation)
    newest = re.search(r"^## ([\d.]+),", PAGES["CHANGELOG.md"], re.MULTILINE)
    assert newest
    assert project["version"] == citation["version"] == newest[1]
    assert f"[Licence: {project['license']}]" in README
    assert citation["license"] == project["license"]
    assert f"[Python: {project['requires-python'].removeprefix('>=')} or newer]" in README
