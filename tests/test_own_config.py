"""A task, data, an optimizer and a policy of one's own in a config file, through every verb."""

import itertools
import json
import math
import sys

import numpy as np
import pytest

from bigbatch import cli
from bigbatch.config.file import load_config
from bigbatch.data import stream
from bigbatch.errors import UserError
from tests import trained as trained_lib

PARTS = '''
import math

import jax.numpy as jnp
import numpy as np
import optax

import bigbatch as bb


def squared_error(prediction, examples):
    weight, error = examples["weight"], prediction - examples["y"]
    return {"loss": jnp.sum(weight * error**2), "count": jnp.sum(weight)}


def make_task(features: int, *, scale: float = 1.0, name: str = "w"):
    return bb.Task(
        init=lambda key: ({name: jnp.zeros(features)}, {}),
        apply=lambda params, _, examples, train: (scale * examples["x"] @ params[name], {}),
        loss=squared_error,
        metrics={"rmse": lambda means: math.sqrt(means["loss"])},
    )


def points(examples, features, seed):
    x = np.random.default_rng(seed).normal(size=(examples, features)).astype(np.float32)
    return {"x": x, "y": x @ np.arange(1, 1 + features, dtype=np.float32)}


def make_data(examples: int, features: int = 3, seed: int = 0):
    return bb.Data(points(examples, features, seed), test=points(40, features, seed + 1))


def make_optimizer(*, decay: float = 0.0):
    def rule(learning_rate, momentum=0.9):
        return optax.chain(optax.add_decayed_weights(decay), optax.sgd(learning_rate, momentum))

    return rule


def make_policy(learning_rate: float, *, epochs: float, batch_size: int = 16):
    recipe = bb.step_decay(
        learning_rate, batch_size, 0.9, boundaries_epochs=[epochs / 2], factor=0.5
    )
    return bb.grow_batch(recipe, max_batch_size=80)


class Module:
    """Has a method of that name, as Flax's modules have."""

    apply = None


def raises(what: str = "the disk"):
    raise OSError(f"cannot read {what}")


def nothing():
    pass


def module():
    return Module()
'''

CONFIG = """
PLACES = {"itself": "", "beside": "own_parts", "decay": "own_parts"}
EXPERIMENTS = tuple(PLACES)


def get_config(experiment):
    place = PLACES[experiment]
    policy = {"name": f"{place}:make_policy", "learning_rate": 0.02}
    tree = {
        "epochs": 3,
        "ghost_batch_examples": 8,
        "microbatch_examples_per_device": 16,
        "evaluation_batch_examples": 16,
        "log_every_updates": 1,
        "evaluate_every_epochs": 1,
        "checkpoint_every_updates": 4,
        "keep_every_updates": 4,
        "task": {"name": f"{place}:make_task", "features": 3, "scale": 0.5},
        "data": {"name": f"{place}:make_data", "examples": 160, "seed": 5},
        "optimizer": {"name": f"{place}:make_optimizer", "decay": 0.01},
        "policy": policy,
    }
    if experiment == "decay":
        tree["optimizer"] = {"name": "momentum", "weight_decay": 0.01}
        boundaries = {"boundaries_epochs": [1.5], "factor": 0.5}
        tree["policy"] = {**policy, "name": "step_decay", "batch_size": 16, "momentum": 0.9}
        tree["policy"] |= boundaries
    return tree
"""
GROUPS = ("data", "task", "optimizer", "policy")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A config file and the module beside it, which nothing has put on the path."""
    directory = tmp_path_factory.mktemp("own")
    (directory / "config.py").write_text(PARTS + CONFIG)
    (directory / "own_parts.py").write_text(PARTS)
    path = list(sys.path)
    yield directory
    sys.path[:] = path
    sys.modules.pop("own_parts", None)


@pytest.fixture(scope="module")
def runs(directory):
    """The directories of finished runs by experiment, two of them by `bigbatch compare`."""
    config, compared = f"--config={directory / 'config.py'}", directory / "compared"
    options = ("--experiments=beside,decay", "--seeds=1", "--compilation-cache=off")
    assert cli.main(["compare", config, f"--workdir={compared}", *options]) == 0
    one = directory / "one"
    assert cli.main(["train", f"{config}:itself", f"--workdir={one}", options[-1]]) == 0
    return {"itself": one, **{name: compared / name / "seed_0" for name in ("beside", "decay")}}


@pytest.fixture(params=["itself", "beside", "decay"])
def trained(request, directory, runs):
    """An experiment, the flag that names it, and the directory of its run."""
    flag = f"--config={directory / 'config.py'}:{request.param}"
    return request.param, flag, runs[request.param]


def run(*arguments, capsys):
    status = cli.main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def points(examples, seed):
    x = np.random.default_rng(seed).normal(size=(examples, 3)).astype(np.float32)
    return x, x @ np.array([1, 2, 3], np.float32)


def by_numpy(experiment):
    """The parameters at the end: heavy ball with decay, all in float64.

    In the middle of three epochs the learning rate halves, or else the batch size doubles.
    """
    x, y = points(160, 5)
    params, velocity, first = np.zeros(3), np.zeros(3), 0
    while first < 480:
        late = 1 + (first >= 240)
        size, rate = (16, 0.02 / late) if experiment == "decay" else (16 * late, 0.02)
        index = stream.indices(160, 0, first, size)
        own = 0.5 * x[index].astype(float)
        gradient = own.T @ (own @ params - y[index]) * 2 / size + 0.01 * params
        velocity = 0.9 * velocity + gradient
        params, first = params - rate * velocity, first + size
    return params


def mean_square(params):
    x, y = points(40, 6)
    return float(np.mean((0.5 * x @ params - y) ** 2))


def test_experiments_are_trained(trained):
    experiment, _, workdir = trained
    result = json.loads((workdir / "result.json").read_text())
    loss = mean_square(by_numpy(experiment))
    assert result["test_loss"] == pytest.approx(loss, rel=1e-4)
    assert result["test_rmse"] == pytest.approx(math.sqrt(loss), rel=1e-4)


def test_experiments_are_compared(directory, runs):
    page = (directory / "compared" / "report" / "report.html").read_text()
    assert all(text in page for text in ("beside", "decay", "rmse"))


def test_a_run_is_evaluated_and_exported(directory, runs, capsys):
    files = f"--config={directory / 'config.py'}:itself", f"--workdir={runs['itself']}"
    result, other = (
        json.loads((runs[name] / "result.json").read_text()) for name in ("itself", "beside")
    )
    # Where a callable is written changes nothing.
    assert result["params_sha256"] == other["params_sha256"]
    status, out, _ = run("evaluate", *files, capsys=capsys)
    assert (status, json.loads(out).items() <= result.items()) == (0, True)
    npz = directory / "exported.npz"
    status, _, _ = run("export", *files, f"--out={npz}", capsys=capsys)
    params = np.load(npz)["params/w"]
    assert status == 0
    np.testing.assert_allclose(params, by_numpy("itself"), rtol=1e-4)
    assert mean_square(params) == pytest.approx(result["test_loss"], rel=1e-5)


def test_the_directory_keeps_what_the_config_names(trained, directory):
    experiment, _, workdir = trained
    kept = {path.name: path.read_bytes() for path in (workdir / "source").iterdir()}
    names = ["config.py"] + ["own_parts.py"] * (experiment != "itself")
    assert kept == {name: (directory / name).read_bytes() for name in names}


def test_the_same_command_goes_on(trained, directory, capsys):
    _, flag, workdir = trained
    files = "train", flag, f"--workdir={workdir}", "--compilation-cache=off"
    status, out, _ = run(*files, capsys=capsys)
    assert (status, "nothing was trained" in out) == (0, True)
    for field, value in (("task.scale", 0.25), ("data.seed", 6), ("task.name", "own_parts:other")):
        status, _, err = run(*files, f"--config.{field}={value}", capsys=capsys)
        assert status == 2
        assert f"{field}: given" in err


def test_without_the_config_a_directory_asks_for_it(trained, tmp_path, capsys):
    experiment, _, workdir = trained
    own = ("data", "task") if experiment == "decay" else GROUPS
    for verb in ("evaluate", "export", "critical"):
        out = [f"--out={tmp_path / 'a.npz'}"] * (verb == "export")
        status, said, err = run(verb, f"--workdir={workdir}", *out, capsys=capsys)
        assert (status, said) == (2, "")
        lines = [line for line in err.splitlines() if "give --config" in line]
        assert [line.split(":")[0].strip() for line in lines] == [f"{name}.name" for name in own]
    assert list(tmp_path.iterdir()) == []


def test_a_config_is_planned_with_the_speeds_of_its_bench(directory, runs, tmp_path, capsys):
    flag, bench = f"--config={directory / 'config.py'}:beside", tmp_path / "bench.json"
    assert run("bench", flag, f"--out={bench}", capsys=capsys)[0] == 0
    assert json.loads(bench.read_text())["model"]["features"] == 3
    status, out, _ = run("plan", flag, "--json", f"--bench={bench}", capsys=capsys)
    planned = json.loads(out)
    # One weight for each feature.
    assert (status, planned["time"]["gradient_bytes"]) == (0, 3 * 4)
    plan = json.loads((runs["beside"] / "plan.json").read_text())
    assert planned["fingerprint"] == plan["fingerprint"]
    # 10 updates an epoch, half as many from the middle on.
    stages = [(stage["num_updates"], stage["batch_size"]) for stage in planned["stages"]]
    assert stages == [(15, 16), (8, 32)]
    status, out, _ = run("plan", flag, capsys=capsys)
    assert (status, "23 updates" in out) == (0, True)


def test_the_critical_batch_size_is_measured(trained, capsys):
    """How the learning rate goes with the batch size is known of SGD alone."""
    experiment, flag, workdir = trained
    asked = ("--at-updates=4", "--sizes=16,32,64", "--branches=2", "--loss-share=0.3")
    arguments = ("critical", flag, f"--workdir={workdir}", "--compilation-cache=off", *asked)
    status, _, err = run(*arguments, capsys=capsys)
    if experiment == "decay":
        assert (status, (workdir / "critical" / "critical.md").exists()) == (0, True)
    else:
        assert status == 2
        assert "optimizer.name: given" in err
        assert "one of sgd, momentum, nesterov" in err


@pytest.mark.parametrize("trained", ["decay"], indirect=True)
def test_a_directory_runs_nothing_and_is_reported(trained, tmp_path, capsys):
    """Not what any Python has either: this process would end, or a file would be there."""
    _, _, workdir = trained
    traces, copy = tmp_path / "traces", tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "run.json", "plan.json", "result.json", "metrics.jsonl"):
        (copy / name).write_bytes((workdir / name).read_bytes())
    tree = json.loads((copy / "config.json").read_text())
    calls = (
        {"name": "os:system", "command": f"touch {traces}"},
        {"name": "posix:_exit", "status": 3},
        {"name": "own_parts:raises", "what": "anything"},
    )
    for call, group in itertools.product(calls, (*GROUPS, "model", "transformations")):
        many = group == "transformations"
        changed = {**tree, group: [call] if many else call}
        (copy / "config.json").write_text(json.dumps(changed))
        field = f"transformations.{call['name']}.name" if many else f"{group}.name"
        for verb in ("evaluate", "export", "critical"):
            out = [f"--out={tmp_path / 'a.npz'}"] * (verb == "export")
            status, _, err = run(verb, f"--workdir={copy}", *out, capsys=capsys)
            assert status == 2
            assert f"{field}: given {call['name']!r}" in err
    # A report reads only.
    changed = {**tree, **dict.fromkeys(GROUPS, calls[0]), "experiment": "changed"}
    (copy / "config.json").write_text(json.dumps(changed))
    status, out, _ = run("report", copy, f"--out={tmp_path / 'report'}", capsys=capsys)
    assert status == 0
    assert "changed" in out
    assert "rmse" in out
    assert not traces.exists()


def refused(directory, experiment="itself", **changes):
    """The problems of the config with other fields."""
    fields = [(name.replace("__", "."), str(value)) for name, value in changes.items()]
    with pytest.raises(UserError) as caught:
        load_config(f"{directory / 'config.py'}:{experiment}", fields)
    return caught.value.problems


@pytest.mark.parametrize("group", GROUPS)
def test_a_name_that_stands_for_nothing(directory, group):
    field = f"{group}.name"
    (problem,) = refused(directory, **{f"{group}__name": "no_such_module:make"})
    assert (problem.field, problem.given) == (field, "no_such_module:make")
    assert "No module named 'no_such_module'" in problem.allowed
    for place, file in (("", "config.py"), ("own_parts", "own_parts.py")):
        (problem,) = refused(directory, **{f"{group}__name": f"{place}:make_{group[:3]}"})
        assert (problem.field, problem.nearest) == (field, f"{place}:make_{group}")
        assert problem.allowed == f"a callable in {directory / file}"
    (problem,) = refused(directory, **{f"{group}__name": "own_parts:zzzz"})
    assert problem.nearest is None
    # A module is there and is no callable.
    (problem,) = refused(directory, **{f"{group}__name": ":np"})
    assert problem.field == field


@pytest.mark.parametrize("group", GROUPS)
def test_a_callable_that_raises(directory, group):
    place = "own_parts" if group == "data" else ""
    group_only = f'{{"name": "{place}:raises", "what": "the tape"}}'
    (problem,) = refused(directory, **{group: group_only})
    assert (problem.field, problem.given) == (f"{group}.name", f"{place}:raises")
    assert problem.allowed == "Python code that runs (OSError: cannot read the tape)"


@pytest.mark.parametrize(
    ("group", "callable_", "kind"),
    [
        ("task", "nothing", "NoneType"),
        ("task", "module", "Module"),
        ("task", "make_optimizer", "function"),
        ("data", "nothing", "NoneType"),
        ("data", "module", "Module"),
        ("policy", "nothing", "NoneType"),
        ("policy", "module", "Module"),
    ],
)
def test_a_callable_that_gives_something_else(directory, group, callable_, kind):
    what = {"task": "Task", "data": "Data", "policy": "Policy"}[group]
    (problem,) = refused(directory, **{group: f'{{"name": ":{callable_}"}}'})
    assert problem.field == f"{group}.name"
    assert problem.given == f":{callable_}, which gives a {kind}"
    assert problem.allowed == f"a callable that gives a bigbatch.{what}"


@pytest.mark.parametrize("callable_", ["nothing", "module"])
def test_an_optimizer_that_is_none(directory, tmp_path, capsys, callable_):
    """Only with the task's parameters can be told what an optimizer is."""
    flag = f"--config={directory / 'config.py'}:itself"
    own = f'--config.optimizer={{"name": ":{callable_}"}}'
    arguments = ("train", flag, own, f"--workdir={tmp_path / 'a'}", "--compilation-cache=off")
    status, _, err = run(*arguments, capsys=capsys)
    assert status == 2
    said, mistakes, first = err.splitlines()[:3]
    assert (said.startswith("itself: "), mistakes) == (True, "bigbatch: 1 mistake")
    assert first.strip().startswith("optimizer")


@pytest.mark.parametrize("experiment", ["itself", "beside"])
def test_fields_are_those_of_the_signature(directory, experiment):
    problems = refused(
        directory, experiment, task__scael=2, data__examples="many", policy__batch_size=16.0
    )
    assert [(p.field, p.given, p.nearest) for p in problems] == [
        ("data.examples", "many", None),
        ("task.scael", 2, "scale"),
        ("policy.batch_size", 16.0, 16),
    ]
    without = '{"name": ":make_task"}'
    (problem,) = refused(directory, experiment, task=without)
    assert (problem.field, problem.given) == ("task.features", "nothing")
    # What the config knows is given by itself, and to no one else.
    (problem,) = refused(directory, experiment, policy__epochs=7)
    assert (problem.field, problem.given) == ("policy.epochs", 7)


def test_mistakes_that_a_callable_tells_are_its_fields(directory):
    (problem,) = refused(directory, policy__learning_rate=-1)
    assert (problem.field, problem.given) == ("policy.learning_rate", -1.0)


def test_a_task_has_a_loss_and_a_network_of_its_own(directory):
    model = '{"name": "wide_resnet", "depth": 10, "width": 1}'
    problems = refused(directory, model=model, label_smoothing=0.1)
    assert [p.field for p in problems] == ["model", "label_smoothing"]


FLAX = """
from __future__ import annotations

import dataclasses

import bigbatch as bb
from flax import linen as nn


@dataclasses.dataclass
class Width:
    hidden: int = 4


class Network(nn.Module):
    width: Width

    @nn.compact
    def __call__(self, image, train):
        x = nn.relu(nn.Dense(self.width.hidden)(image.reshape(len(image), -1) / 16))
        return nn.Dense(10)(x)


def make(hidden: int = 4):
    network = Network(Width(hidden))
    return bb.Task.from_linen(network, bb.cross_entropy_sums, metrics={"accuracy": "correct"})


def get_config(experiment):
    return {
        "epochs": 0.1,
        "ghost_batch_examples": 32,
        "microbatch_examples_per_device": 32,
        "evaluation_batch_examples": 360,
        "log_every_updates": 1,
        "evaluate_every_epochs": 1,
        "checkpoint_every_epochs": 1,
        "task": {"name": ":make"},
        "data": {"name": "digits"},
        "optimizer": {"name": "sgd"},
        "policy": {"name": "constant", "learning_rate": 0.1, "batch_size": 32, "momentum": 0.0},
    }
"""


def test_a_network_of_the_config_file_on_a_bundled_data_set(tmp_path, capsys):
    """Dataclasses look for the module that they are written in, where annotations are texts."""
    (tmp_path / "flax_config.py").write_text(FLAX)
    flag = f"--config={tmp_path / 'flax_config.py'}"
    arguments = (flag, f"--workdir={tmp_path / 'run'}")
    status, out, err = run("train", *arguments, "--compilation-cache=off", capsys=capsys)
    assert status == 0, err
    assert "test accuracy" in out


@pytest.mark.parametrize("group", ["model", "transformations"])
def test_groups_that_take_no_callables_name_their_own(group):
    named = {"name": "os:system"}
    with pytest.raises(UserError, match=r"name: given 'os:system'; allowed: one of w") as caught:
        trained_lib.config(**{group: [named] if group == "transformations" else named})
    assert len(caught.value.problems) == 1
    assert "package.module" not in str(caught.value)
