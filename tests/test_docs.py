"""The docs site: it builds without a warning, and its reference has everything that is public."""

import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bigbatch
from bigbatch import models
from bigbatch.config.fields import Fields
from bigbatch.data.sets import Options
from bigbatch.data.tokens import TokenOptions
from bigbatch.engine.optimizer import OPTIMIZERS
from bigbatch.schedule.policy import POLICIES
from bigbatch.schedule.transform import TRANSFORMATIONS

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages by their names, built in a process of its own."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    command += ["-d", str(out / "trees"), str(DOCS), str(out / "html")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    html = out / "html"
    return {str(p.relative_to(html)): p.read_text("utf-8") for p in html.rglob("*.html")}


def drawn(name, monkeypatch):
    """A module of docs/."""
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module(name)


def test_every_page_is_there(site):
    pages = {str(path.relative_to(DOCS).with_suffix(".html")) for path in DOCS.rglob("*.md")}
    assert pages <= set(site)
    assert len(pages) > 20


def test_every_public_name_is_in_the_reference(site):
    text = "".join(page for name, page in site.items() if name.startswith("reference/"))
    names = [f"bigbatch.{name}" for name in bigbatch.__all__ if name != "noise"]
    names += [f"bigbatch.noise.{name}" for name in bigbatch.noise.__all__]
    assert [name for name in names if f'id="{name}"' not in text] == []


def test_every_field_of_a_config_is_in_the_reference(site):
    text = site["reference/config.html"]
    groups = [Options, TokenOptions, *models.MODELS.values(), *OPTIMIZERS.values()]
    fields = {field.name for kind in (Fields, *groups) for field in dataclasses.fields(kind)}
    makers = [*POLICIES.values(), *TRANSFORMATIONS.values()]
    fields |= {name for maker in makers for name in inspect.signature(maker).parameters}
    # What a config does not say.
    fields -= {"policy", "arguments", "kwargs", "tokens_per_example"}
    shown = set(re.findall(r'<dt><code[^>]*><span class="pre">(\w+)</span></code></dt>', text))
    assert fields - shown == set()
    for name in (*models.MODELS, *OPTIMIZERS, *POLICIES, *TRANSFORMATIONS):
        assert f'<span class="pre">{name}</span>' in text


def test_every_field_says_what_it_is(monkeypatch):
    generated = drawn("generated", monkeypatch)
    rows = list(generated.rows(Fields, set()))
    for group, makers in generated.GROUPS.items():
        context = generated.CONTEXT.get(group, set())
        rows += [row for maker in makers.values() for row in generated.rows(maker, context)]
    assert [row for row in rows if not row.text or not row.type] == []
    kinds = {row.name: row.kind for row in rows}
    assert (kinds["seed"], kinds["workers"]) == ("statistical", "hardware")


def test_pages_need_no_network(site):
    remote = re.compile(r"<(?:script|link|img)[^>]+(?:src|href)=\"(?:https?:)?//[^>]*>")
    assert {name: remote.findall(page) for name, page in site.items() if remote.search(page)} == {}


def test_the_pictures_are_what_the_code_draws(monkeypatch):
    """Where this fails: `python docs/pictures.py`. An import more is no reason: it is an arc."""
    pictures = drawn("pictures", monkeypatch)
    drawings = {picture.__name__: pictures.svg(picture) for picture in pictures.PICTURES}
    files = {path.stem: path.read_text("utf-8") for path in (DOCS / "pictures").glob("*.svg")}
    for each in (drawings, files):
        each["architecture"] = re.sub(r"<path .*\n", "", each["architecture"])
    assert files == drawings
