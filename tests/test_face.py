"""What `import bigbatch` gives, and what a wheel of it holds."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import bigbatch
from bigbatch.config.file import experiment_names, load_config
from bigbatch.errors import UserError

ROOT = Path(__file__).parents[1]
PUBLIC = [name for name in bigbatch.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there(name):
    no_functions = ("POLICIES", "TRANSFORMATIONS", "noise")
    assert callable(getattr(bigbatch, name)) or name in no_functions


def test_the_public_names():
    engine = {"Task", "Data", "prepare", "Run", "train", "fit", "evaluate", "report", "GhostNorm"}
    optimizers = {"Sgd", "Momentum", "Nesterov", "Adam", "AdamW", "Lars", "Lamb"}
    schedules = {"constant", "step_decay", "cosine", "from_optax", "grow_batch", "adaptive"}
    assert engine | optimizers | schedules | {"make_plan", "Plan"} < set(PUBLIC)
    assert len(set(PUBLIC)) == len(PUBLIC)
    assert set(bigbatch.__all__) <= set(dir(bigbatch))
    with pytest.raises(AttributeError, match="'bigbatch' has no attribute 'no_such_name'"):
        bigbatch.no_such_name  # noqa: B018 - the attribute is asked for


def test_the_version_is_that_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert bigbatch.__version__ == project["version"]


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import bigbatch", {"numpy", "jax", "flax", "importlib.metadata"}),
        ("from bigbatch import make_plan, step_decay, grow_batch", {"jax", "flax", "matplotlib"}),
    ],
)
def test_only_what_is_asked_for_is_imported(statement, absent):
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not absent & set(done.stdout.split())


def test_a_type_checker_sees_the_names(tmp_path):
    path = tmp_path / "user.py"
    names = [f"bb.{name}" for name in [*bigbatch.__all__, "no_such_name"]]
    path.write_text("\n".join(["import bigbatch as bb", *names]))
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=skip"]
    command += [f"--cache-dir={tmp_path}", str(path), "bigbatch/__init__.pyi"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    (line,) = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert line.endswith('Module has no attribute "no_such_name"  [attr-defined]')


def test_a_bundled_config_goes_by_its_name(monkeypatch, tmp_path):
    of_the_clone = load_config(f"{ROOT}/configs/digits.py:increase").plan.fingerprint
    monkeypatch.chdir(tmp_path)
    assert load_config("digits:increase").plan.fingerprint == of_the_clone
    assert "increase" in experiment_names("digits")
    # A file of that name comes first.
    (tmp_path / "digits").write_text("")
    with pytest.raises(UserError, match="ending in"):
        load_config("digits")


def test_a_name_that_is_not_bundled():
    with pytest.raises(UserError) as caught:
        load_config("fashion_mnis:increase")
    (problem,) = caught.value.problems
    assert (problem.field, problem.nearest) == ("config", "fashion_mnist")
    names = problem.allowed.partition("bundled one: ")[2].split(", ")
    assert names[:2] == ["fashion_mnist", "fashion_mnist_wrn16_4"]
    assert sorted(names) == sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def planned(site: Path, cwd: Path) -> str:
    """What `bigbatch plan --config=digits:increase` prints, with the package of a directory."""
    command = [sys.executable, "-m", "bigbatch", "plan", "--config=digits:increase", "--json"]
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=cwd, env=environment
    )
    return done.stdout


def test_bundled_configs_outside_of_a_clone(tmp_path):
    """With the files where a wheel puts them."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "bigbatch", tmp_path / "site" / "bigbatch", ignore=ignored)
    shutil.copytree(ROOT / "configs", tmp_path / "site" / "bigbatch" / "configs", ignore=ignored)
    assert planned(tmp_path / "site", tmp_path) == planned(ROOT, tmp_path)


@pytest.mark.long
def test_a_wheel(tmp_path):
    """Built by pip, which fetches setuptools; it holds every file of bigbatch/ and of configs/."""
    pip = [sys.executable, "-m", "pip", "-q"]
    source = tmp_path / "source"
    files = subprocess.run(["git", "ls-files", "-z"], capture_output=True, check=True, cwd=ROOT)
    for name in filter(None, files.stdout.decode().split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    subprocess.run([*pip, "wheel", "--no-deps", f"--wheel-dir={tmp_path}", str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", f"--target={tmp_path}/site", str(wheel)], check=True
    )
    held = {file.relative_to(tmp_path / "site") for file in tmp_path.glob("site/bigbatch/**/*.*")}
    wanted = {Path("bigbatch") / file.relative_to(source) for file in source.glob("configs/*.py")}
    wanted |= {file.relative_to(source) for file in source.glob("bigbatch/**/*.*")}
    assert {file for file in held if "__pycache__" not in file.parts} == wanted
    assert planned(tmp_path / "site", tmp_path) == planned(ROOT, tmp_path)
