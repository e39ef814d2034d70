"""The command where its surroundings are not as usual: no traceback, and a status that says it."""

import io
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from bigbatch import cli
from bigbatch.errors import UserError
from bigbatch.training import progress
from tests import trained
from tests.test_distributed import ROOT

PLAN = ["plan", "--config=digits:decay"]
# Whoever runs it is in no list of users, as in a container with a number for a user.
NOBODY = """
import pwd, sys
from bigbatch.cli import main
def nobody(_):
    raise KeyError
pwd.getpwuid = pwd.getpwnam = nobody
sys.exit(main(sys.argv[1:]))
"""


def command(*arguments, environment=None, **options):
    found = {**os.environ, **(environment or {})}
    found = {name: value for name, value in found.items() if value is not None}
    return subprocess.Popen(
        [sys.executable, "-m", "bigbatch", *arguments],
        cwd=ROOT,
        env=found,
        stderr=subprocess.PIPE,
        **{"stdout": subprocess.PIPE, **options},
    )


@pytest.mark.parametrize("arguments", [PLAN, ["--version"]])
def test_nobody_reads_what_is_printed(arguments):
    read, write = os.pipe()
    os.close(read)
    process = command(*arguments, stdout=write)
    os.close(write)
    assert process.communicate()[1] == b""
    assert process.returncode == 141


def test_a_full_disk_behind_standard_output():
    with open("/dev/full", "wb") as full:
        process = command(*PLAN, stdout=full)
        said = process.communicate()[1]
    assert process.returncode == 1
    assert said == b"bigbatch: what was to be said cannot be written (No space left on device)\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_characters_that_standard_output_lacks(tmp_path, monkeypatch, encoding):
    path = tmp_path / "ü\N{EN DASH}.npz"
    images, labels = np.zeros((4, 2, 2), np.uint8), np.arange(4)
    parts = {"train_images": images, "test_images": images}
    np.savez(path, train_labels=labels, test_labels=labels, **parts)
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    assert cli.main(["data", "info", "arrays", f"--path={path}"]) == 0
    last = written.getvalue().decode(encoding).splitlines()[-1].rpartition("/")[2]
    expected = {"ascii": "\\xfc\\u2013.npz", "latin-1": "ü\\u2013.npz", "utf-8": path.name}
    assert last == expected[encoding]


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_platforms_that_are_not_there(tmp_path, platform):
    train = ["train", "--config=digits:decay", f"--workdir={tmp_path / 'run'}"]
    process = command(*train, environment={"JAX_PLATFORMS": platform})
    _, said = process.communicate()
    assert process.returncode == 2, said
    assert f"JAX_PLATFORMS: given '{platform}'; allowed: platforms".encode() in said
    assert b"Traceback" not in said


@pytest.mark.parametrize(("asked", "count"), [(None, 1), ("cpu", 0)])
def test_a_cpu_in_place_of_what_is_installed(tmp_path, monkeypatch, capsys, asked, count):
    """A plugin of JAX for other devices, of which none is here."""
    place = tmp_path / "jax_cuda99_plugin-1.0.dist-info"
    place.mkdir()
    (place / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: jax-cuda99-plugin\nVersion: 1.0\n"
    )
    (place / "entry_points.txt").write_text("[jax_plugins]\nxla_cuda99 = nowhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = jax.config.values["jax_platforms"]
    jax.config.update("jax_platforms", asked)
    try:
        progress.say_devices("a run")
    finally:
        jax.config.update("jax_platforms", before)
    said = capsys.readouterr().err
    assert said.startswith("a run; 8 x cpu; compiling ...\n")
    assert said.count("warning: this runs on the CPU: JAX's plugin xla_cuda99 is") == count


def test_programs_that_are_not_to_be_compiled():
    with jax.disable_jit(), pytest.raises(UserError, match="JAX_DISABLE_JIT: given True"):
        trained.prepared(trained.config(), 1)


def test_a_user_without_home_or_passwd_entry(tmp_path):
    run, lacks = tmp_path / "run", ["HOME", "USER", "LOGNAME", "JAX_COMPILATION_CACHE_DIR"]
    lacks += ["XDG_CACHE_HOME", "XDG_CONFIG_HOME"]
    environment = {k: v for k, v in os.environ.items() if k not in lacks}
    train = ["train", "--config=digits:decay", "--config.epochs=0.05", f"--workdir={run}"]
    for arguments in (train, ["report", str(run), f"--out={tmp_path / 'report'}"]):
        command = [sys.executable, "-c", NOBODY, *arguments]
        environment["PYTHONPATH"] = str(ROOT)
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report", "run"]
    assert (tmp_path / "report" / "growing_batch.png").exists()
