"""Runs that begin with the network of a file, as `bigbatch export` writes it."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from bigbatch import cli, models
from bigbatch.commands import saved
from bigbatch.config import assemble
from bigbatch.config.config import Config, read_config
from bigbatch.engine.functions import State
from bigbatch.engine.transformations import evaluation_params
from bigbatch.errors import UserError
from bigbatch.training.evaluate import evaluate
from bigbatch.training.restore import restore
from bigbatch.training.run import Run
from bigbatch.workdir import network_file
from bigbatch.workdir.checkpoint import Checkpoints
from bigbatch.workdir.files import Workdir
from bigbatch.workdir.packing import sha256 as params_sha256
from tests import perceptron_run, trained
from tests.test_distributed import ended, free_port, start
from tests.test_lost_processes import flags_of

DEVICES = 8
SMALL = {"ghost_batch_examples": 8, "epochs": 0.1, "microbatch_examples_per_device": 8}
AVERAGE = {"name": "momentum", "average_examples": 500}


@pytest.fixture(scope="module", autouse=True)
def networks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "convolution", trained.ConvolutionConfig)
        patch.setitem(models.MODELS, "perceptron", perceptron_run.PerceptronConfig)
        yield


def small(**changes) -> Config:
    return trained.config(model={"name": "convolution"}, **SMALL | changes)


def begin(config: Config, directory, devices: int) -> tuple[Run, State]:
    """The run of a config in a new directory, and the state with which it begins."""
    files = Workdir(directory)
    config = assemble.identified(config, files)
    trained.claimed(files, config, assemble.load_data(config))
    run = trained.prepared(config, devices)
    with Checkpoints(files.checkpoints, 2) as checkpoints:
        state, progress = restore(run, checkpoints)
    assert progress.updates == 0
    return run, state


@pytest.fixture(scope="module")
def exported(networks, tmp_path_factory):
    """The file of a network that was trained on all devices; what export and evaluate say of it."""
    directory = tmp_path_factory.mktemp("exported")
    files, out, config = Workdir(directory / "run"), directory / "network.npz", small(seed=3)
    trained.train(trained.prepared(config, DEVICES), files.path)
    said = saved.export(saved.run_of(files, None)(), files.path, out)
    return out, said, saved.evaluate_run(files)


@pytest.mark.parametrize(
    ("devices", "changes"),
    [
        (1, {}),
        (1, {"optimizer": AVERAGE}),
        (2, {"reproducible": True}),
        (4, {"microbatch_examples_per_device": 4}),
        (DEVICES, {"shard": "update", "optimizer": AVERAGE}),
    ],
    ids=["one device", "average", "reproducible", "shared ghost batches", "average in parts"],
)
def test_a_run_begins_with_the_exported_network(exported, tmp_path, devices, changes):
    out, said, measured = exported
    run, state = begin(small(initial_params=str(out), **changes), tmp_path, devices)
    for params in (state.params, evaluation_params(state.optimizer, state.params)):
        assert params_sha256(params) == said["params_sha256"]
    found = evaluate(run, state)
    # On other devices the same losses are added in another order.
    tolerance = 0 if devices == DEVICES else 1e-6
    for name in ("test_loss", "test_accuracy"):
        np.testing.assert_allclose(found[name], measured[name], rtol=tolerance)
    # All the rest is as without a file.
    plain = run.init_state()
    again = run.programs.state_from(plain.params, plain.running_statistics)
    jax.tree.map(np.testing.assert_array_equal, plain, again)
    # No two of its arrays share a buffer, which the first update would refuse.
    assert trained.train(run, tmp_path)["updates"] == run.plan.num_updates


def command(directory, *changes: str, verb: str = "train") -> int:
    fields = [f"--config.{change}" for change in ("epochs=0.5", *changes)]
    config = ["--config=tests/perceptron_run.py", f"--workdir={directory}"]
    return cli.main([verb, *config, *fields])


@pytest.fixture
def perceptron(tmp_path):
    """The file of a perceptron's network, and its arrays."""
    config = read_config(perceptron_run.get_config("").to_dict())
    shapes = assemble.network_shapes(config)
    filled = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.01, leaf.dtype), shapes)
    file = tmp_path / "network.npz"
    network_file.write(file, filled)
    with np.load(file) as arrays:
        return file, dict(arrays)


def test_the_file_is_needed_until_there_is_a_checkpoint(capsys, perceptron, tmp_path):
    file, arrays = perceptron
    run, given = tmp_path / "run", f"initial_params={file}"
    assert command(run, given) == 0
    result = json.loads((run / "result.json").read_text())

    def interrupt() -> None:
        (run / "result.json").unlink()
        shutil.rmtree(max((run / "checkpoints").iterdir(), key=lambda path: int(path.name)))

    # What lies there now is not what the run has begun with, nor is nothing.
    np.savez(file, **{**arrays, "params/Dense_0/bias": arrays["params/Dense_0/bias"] + 1})
    interrupt()
    kept = {path: path.read_bytes() for path in run.glob("*.json")}
    for changes in ((given,), ()):
        capsys.readouterr()
        assert command(run, *changes) == 2
        assert "  initial_params_sha256: given " in capsys.readouterr().err
        assert command(run, *changes, verb="evaluate") == 2
    assert {path: path.read_bytes() for path in run.glob("*.json")} == kept
    file.unlink()
    assert command(run, given) == 0
    assert json.loads((run / "result.json").read_text())["params_sha256"] == result["params_sha256"]
    assert command(run, given, verb="evaluate") == 0
    # The same arrays in another place and file.
    np.savez_compressed(tmp_path / "elsewhere.npz", **arrays)
    interrupt()
    assert command(run, f"initial_params={tmp_path / 'elsewhere.npz'}") == 0
    assert json.loads((run / "result.json").read_text())["params_sha256"] == result["params_sha256"]
    # Without a checkpoint it begins anew, and needs it again.
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints")
    capsys.readouterr()
    assert command(run, given) == 2
    said = f"  initial_params: given '{file}'; allowed: a file that is there"
    assert said in capsys.readouterr().err


KERNEL, BIAS = "params/Dense_0/kernel", "params/Dense_1/bias"
NETWORK = "allowed: the 4 arrays of this config's network"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({BIAS: None, KERNEL: None}, [f"without {KERNEL}, {BIAS}'", NETWORK]),
        ({"params/other": np.zeros(2)}, ["with params/other'", NETWORK]),
        (
            {KERNEL: np.zeros((64, 9), np.float32), BIAS: np.zeros(10)},
            [
                f"with {KERNEL} float32[64, 9], {BIAS} float64[10]'",
                f"allowed: {KERNEL} float32[64, 8], {BIAS} float32[10]",
            ],
        ),
        (
            {f"params/{number}": np.zeros(1) for number in range(9)},
            ["with " + ", ".join(f"params/{number}" for number in range(4)) + " and 5 more'"],
        ),
        ({BIAS: np.array([None])}, [f"with {BIAS} object[1]'", f"allowed: {BIAS} float32[10]"]),
    ],
    ids=["missing", "superfluous", "unlike", "many", "objects"],
)
def test_arrays_of_another_network_are_a_mistake(capsys, perceptron, tmp_path, changes, words):
    file, arrays = perceptron
    np.savez(file, **{n: a for n, a in (arrays | changes).items() if a is not None})
    assert command(tmp_path / "run", f"initial_params={file}") == 2
    said = capsys.readouterr().err
    for text in (f"  initial_params: given '{file}", *words):
        assert text in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [None, b"", b"no zip file"])
def test_a_file_that_cannot_be_read_is_a_mistake(capsys, perceptron, tmp_path, content):
    file, _ = perceptron
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    assert command(tmp_path / "run", f"initial_params={file}") == 2
    said = capsys.readouterr().err
    allowed = "a file that is there" if content is None else "an npz file that can be read"
    assert f"  initial_params: given '{file}'; allowed: {allowed}" in said
    assert not (tmp_path / "run").exists()


def test_a_file_with_another_sha256_than_was_asked_for_is_a_mistake(perceptron):
    file, arrays = perceptron
    tree = perceptron_run.get_config("").to_dict() | {"initial_params_sha256": "0" * 64}
    with pytest.raises(UserError, match=r"initial_params_sha256: .* None without initial_params"):
        read_config(tree)
    config = read_config(tree | {"initial_params": str(file)})
    with pytest.raises(UserError) as caught:
        assemble.identified(config, Workdir(Path()))
    (problem,) = caught.value.problems
    assert problem.field == "initial_params_sha256"
    assert problem.nearest == params_sha256(arrays)


def test_processes_begin_with_the_same_network_or_not_at_all(perceptron, tmp_path):
    file, arrays = perceptron
    other = tmp_path / "other.npz"
    np.savez(other, **{name: 2 * array for name, array in arrays.items()})
    # So little that no parameter changes.
    still = ["--config.epochs=0.5", "--config.policy.learning_rate=1e-30"]

    def trained_with(*files) -> list[tuple[int, str]]:
        port = free_port()
        flags = [
            [*flags_of(tmp_path / "run", port, process), *still, f"--config.initial_params={file}"]
            for process, file in enumerate(files)
        ]
        return ended([start(each, 1) for each in flags])

    for status, text in trained_with(file, other):
        assert status == 2, text
        assert "initial_params_sha256: given 'process 1: " in text
    assert not (tmp_path / "run").exists()
    for status, text in trained_with(file, file):
        assert status == 0, text
    config = read_config(perceptron_run.get_config("").to_dict())
    begun = network_file.read(str(file), assemble.network_shapes(config))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["params_sha256"] == params_sha256(begun.params)
