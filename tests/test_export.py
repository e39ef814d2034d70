"""`bigbatch export`: the network of a run in a file that NumPy alone can read."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from bigbatch import cli
from bigbatch.workdir.files import Workdir
from bigbatch.workdir.packing import sha256 as params_sha256
from tests import trained

pytestmark = pytest.mark.usefixtures("quick_networks")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of a few updates on all devices, and its result."""
    files = Workdir(tmp_path_factory.mktemp("run"))
    config = trained.config(epochs=0.1)
    run = trained.prepared(config, jax.device_count())
    return run, files.path, trained.train(run, files.path)


def exported(file) -> tuple[dict, dict]:
    """The trees in a file, as the network takes them."""
    with np.load(file) as arrays:
        flat = {tuple(name.split("/")): arrays[name] for name in arrays.files}
    tree = unflatten_dict(flat)
    return tree["params"], tree["running_statistics"]


def test_the_exported_network_is_the_trained_one(capsys, finished, tmp_path):
    run, directory, result = finished
    out = tmp_path / "network.npz"
    assert cli.main(["export", f"--workdir={directory}", f"--out={out}"]) == 0
    said = json.loads(capsys.readouterr().out)
    params, running = exported(out)
    assert said["params_sha256"] == result["params_sha256"] == params_sha256(params)
    assert said["updates"] == result["updates"]
    # It gives the accuracy that the run has measured last.
    test, data = run.data.test, run.data
    module = run.config.model.module(num_classes=10, ghost_batch_examples=32)
    images = (test.images.astype(np.float32) - np.asarray(data.mean)) / np.asarray(data.std)
    variables = {"params": params, "running_statistics": running}
    logits = jax.jit(lambda x: module.apply(variables, x, train=False))(np.float32(images))
    accuracy = np.mean(np.argmax(logits, axis=1) == test.labels)
    np.testing.assert_allclose(accuracy, result["test_accuracy"], atol=1e-6)


def test_the_devices_of_a_run_bind_no_reader(capsys, finished, tmp_path):
    """How its state lay on them was in its config."""
    directory = shutil.copytree(finished[1], tmp_path / "run")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"shard": {"layer": 5}}))
    out = tmp_path / "network.npz"
    assert cli.main(["export", f"--workdir={directory}", f"--out={out}"]) == 0
    assert json.loads(capsys.readouterr().out)["params_sha256"] == finished[2]["params_sha256"]


@pytest.mark.parametrize("out", ["", "missing/network.npz", "."])
def test_a_place_that_cannot_be_written_is_a_mistake(capsys, finished, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", f"--workdir={finished[1]}", f"--out={out}"]) == 2
    assert "out: given" in capsys.readouterr().err


def test_a_workdir_without_a_run(capsys, tmp_path):
    out = tmp_path / "network.npz"
    assert cli.main(["export", f"--workdir={tmp_path}", f"--out={out}"]) == 2
    assert "workdir: given" in capsys.readouterr().err
    assert not out.exists()
