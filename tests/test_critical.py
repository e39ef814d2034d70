"""`bigbatch critical` on a short run on the digits: what it finds, keeps and refuses."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest

from bigbatch import cli, models
from bigbatch.commands.critical import branches as critical_branches
from bigbatch.commands.critical import measure as critical
from bigbatch.commands.critical.fit import Fit, Intervals, spread_sizes
from bigbatch.commands.critical.table import Noise, Point, SizeResult, along, section
from bigbatch.config import assemble
from bigbatch.workdir.files import Workdir
from bigbatch.workdir.resume import read_plan
from tests import perceptron_run, trained

# The first epoch, with a checkpoint in its middle.
CHANGES = {
    "model": {"name": "perceptron"},
    "epochs": 1,
    "transformations": [],
    "policy": {"name": "constant", "learning_rate": 0.05, "batch_size": 32, "momentum": 0.9},
    "keep_every_updates": 24,
    "checkpoint_every_updates": 24,
    "log_every_updates": 10,
}
QUICK = ("--branches=2", "--sizes=32,128,512", "--loss-share=0.3", "--most-epochs=4")


def claimed(directory, **changes):
    files = Workdir(directory)
    config = trained.config(**CHANGES | changes)
    trained.claimed(files, config, assemble.load_data(config))
    return files, config


@pytest.fixture(scope="module", autouse=True)
def networks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "perceptron", perceptron_run.PerceptronConfig)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run's directory with checkpoints after 24 updates and at its end."""
    files, config = claimed(tmp_path_factory.mktemp("run") / "run")
    trained.train(trained.prepared(config), files.path)
    return files.path


def run(*arguments, capsys):
    status = cli.main(["critical", "--compilation-cache=off", *arguments])
    return status, *capsys.readouterr()


def test_branches_are_measured_kept_and_not_run_again(finished, tmp_path, capsys, monkeypatch):
    directory = tmp_path / "run"
    shutil.copytree(finished, directory)
    asked = (f"--workdir={directory}", *QUICK)
    status, out, err = run(*asked, capsys=capsys)
    assert status == 0
    assert err.count("branch") == 6
    assert "## Update 24, epoch 0.5344" in out
    [point] = json.loads((directory / "critical" / "critical.json").read_text())
    assert point["target_loss"] == pytest.approx(0.7 * point["noise"]["loss"])
    assert point["noise"]["scale"] > 0
    assert point["noise"]["population"] == "training set"
    assert "noise scale of the training set" in out
    # The rule: the run's own rate at its own batch size.
    rates = {size["batch_size"]: size["learning_rate"] for size in point["sizes"]}
    assert rates[32] == pytest.approx(0.05)
    noise = point["noise"]["scale"]
    for size in (128, 512):
        assert rates[size] / rates[32] == pytest.approx((1 + noise / 32) / (1 + noise / size))
    updates = [np.mean(size["updates"]) for size in point["sizes"]]
    assert updates[0] > updates[1] > updates[2]
    assert 0 < point["fit"]["critical_batch_size"] < 5_000
    # A branch that is gone is run again, alone, and is what it was.
    branches = sorted((directory / "critical" / "update_24").glob("batch_512*"))
    kept = branches[0].read_text()
    branches[0].unlink()
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return branch(*arguments)

    branch = critical_branches.branch
    monkeypatch.setattr(critical, "branch", counted)
    assert run(*asked, capsys=capsys)[:2] == (0, out)
    assert (len(calls), branches[0].read_text()) == (1, kept)
    # Done: nothing is compiled.
    monkeypatch.setattr(assemble, "prepare", None)
    assert run(*asked, capsys=capsys)[:2] == (0, out)


def test_a_size_that_does_not_get_there_is_left_out(finished, tmp_path, capsys):
    directory = tmp_path / "run"
    shutil.copytree(finished, directory)
    rare = ("--branches=2", "--sizes=32,64,1408", "--loss-share=0.5", "--most-epochs=2")
    status, out, _ = run(f"--workdir={directory}", *rare, capsys=capsys)
    assert status == 0
    assert "| not reached by 2 of 2; left out |" in out.split("| 1,408 ")[1].split("\n")[0]
    assert "No fit: fewer than three batch sizes reached the loss" in out


def test_a_branch_trains_from_a_copy_on_examples_of_its_own(finished):
    begun = read_plan(Workdir(finished))
    prepared = trained.prepared(
        trained.config(**CHANGES, noise_small_batch_examples=32), batch_sizes=[64, 512]
    )
    row = begun.row(24)
    plan = critical_branches.constant_plan(begun, row, 64, 0.05, 0.3)
    assert (plan.num_updates, set(plan.batch_sizes.tolist())) == (7, {64})
    assert set(plan.hypers["momentum"]) == {0.9}
    state = prepared.init_state()
    target = critical_branches.Target("loss", 0.0)
    first, again, other = (
        critical_branches.branch(prepared, state, plan, seed, target) for seed in (1, 1, 2)
    )
    assert first == again
    assert len(first.losses) == len(first.variances) == 7
    assert first.losses != other.losses
    # At learning rate 0 the loss is that of a pass over the examples.
    noise = critical_branches.noise_at(prepared, state, row)
    assert noise.status == "ready"
    assert noise.loss == pytest.approx(first.losses[0], rel=0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes=16,64,128"], "sizes: given 16; nearest: 32"),
        (["--sizes=32,64,64"], "sizes: given [32, 64, 64]; allowed: at least three different"),
        (["--branches=1"], "branches: given 1; nearest: 2"),
        (
            ["--loss-share=1"],
            "loss_share: given 1.0; nearest: 0.999; allowed: a share above 0 and below 1",
        ),
        (["--most-epochs=0"], "most_epochs: given 0.0; allowed: a number of epochs above 0"),
        (["--lr-factors=1,0"], "lr_factors: given 0; allowed: numbers above 0"),
        (["--target=loss=nan"], "target: given nan; allowed: a finite number"),
        (
            ["--at-updates=20"],
            "at_updates: given 20; nearest: 24\n    allowed: updates with a checkpoint: 24 (keep",
        ),
        (["--config.seed=1"], "config.seed: given '1'; allowed: nothing without --config"),
    ],
)
def test_mistakes(finished, capsys, arguments, message):
    status, _, err = run(f"--workdir={finished}", *arguments, capsys=capsys)
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert not (finished / "critical").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "the directory of a run that has saved a checkpoint before its end"),
        (
            {"optimizer": {"name": "lars", "weight_decay": 0.0}},
            "optimizer.name: given 'lars'; allowed: one of sgd, momentum, nesterov",
        ),
        ({"reproducible": True}, "allowed: False, or True in a run with"),
    ],
)
def test_runs_that_cannot_be_asked(tmp_path, capsys, changes, message):
    files, _ = claimed(tmp_path / "run", **changes)
    status, _, err = run(f"--workdir={files.path}", capsys=capsys)
    assert status == 2
    assert message in err


def test_no_run(tmp_path, capsys):
    status, _, err = run(f"--workdir={tmp_path / 'none'}", capsys=capsys)
    assert (status, "the directory of a run" in err) == (2, True)
    with pytest.raises(SystemExit):
        cli.main(["critical", "--workdir=x", "--sizes=a,b"])
    assert "argument --sizes: given 'a,b'; allowed: numbers with commas" in capsys.readouterr().err


def point(noise=200.0, sizes=(), fit=None, intervals=None):
    found = Noise(1.0, noise, 10.0, "ready" if noise else "not positive")
    return Point(45, 1.0, 32, 0.1, found, 0.5, tuple(sizes), fit, intervals)


def test_what_is_said_of_agreement():
    sizes = [SizeResult(s, 0.1, (n, n + 2), None) for s, n in ((32, 200), (256, 60), (1024, 49))]
    fitted = Fit(40.0, 1.0, 8_000.0, 1.0, 200.0, 1.0)
    spans = (35.0, 45.0), (7_000.0, 9_000.0)
    text = section(point(sizes=sizes, fit=fitted, intervals=Intervals(*spans, (150.0, 260.0))))
    assert "measured / predicted = 1.00 (0.75 to 1.30): they agree within the interval." in text
    text = section(point(sizes=sizes, fit=fitted, intervals=Intervals(*spans, (205.0, np.inf))))
    assert "measured / predicted = 1.00 (1.02 to no limit): they disagree." in text
    # The noise scale's own updates keep its ratio: (1 + 200/32) / (1 + 200/1024).
    cells = [line.split("|")[5] for line in text.splitlines() if line.startswith("| ")][2:]
    predicted = [float(cell.replace(",", "")) for cell in cells]
    assert predicted[0] / predicted[2] == pytest.approx(7.25 / 1.1953, rel=2e-3)
    assert "One learning rate was tried" in text
    several = dataclasses.replace(point(sizes=sizes, fit=fitted), lr_factors=(0.5, 1.0))
    several = dataclasses.replace(several, intervals=Intervals(*spans, (150.0, 260.0)))
    assert "One learning rate was tried" not in section(several)
    assert "no branches" in section(point(noise=None))
    unlimited = Fit(-1.0, 1.0, 8_000.0, 1.0, np.inf, np.inf)
    text = section(point(sizes=sizes, fit=unlimited, intervals=Intervals(*spans, (9e3, np.inf))))
    assert "no limit seen (9,000 to no limit)" in text


def test_which_noise_scale_predicts_along_a_run():
    """Two checkpoints with a fit, of which one knows no Adam; one without a limit is left out."""
    geometries = {"l2": (100.0, 10.0), "adam": (400.0, 40.0)}, {"l2": (400.0, 0.0)}, {}
    sizes, intervals = (200.0, 200.0, np.inf), ((160.0, 250.0), (0.0, np.inf), (9e3, np.inf))
    points = [
        dataclasses.replace(
            point(fit=Fit(1, 1, 1, 1, size, 1), intervals=Intervals((1, 2), (1, 2), interval)),
            noise=Noise(1.0, 100.0, 10.0, "ready", geometries=found),
        )
        for found, size, interval in zip(geometries, sizes, intervals, strict=True)
    ]
    header, _, first, second, last = along(points).splitlines()[2:]
    assert header == "| epoch | critical batch size | l2 | adam |"
    low, high = (math.exp(math.hypot(math.log(1.25), 0.196)) ** sign for sign in (-1, 1))
    ratios = [f"{ratio:.2f} ({ratio * low:.2f} to {ratio * high:.2f})" for ratio in (2, 0.5)]
    assert first == f"| 1 | 200 (160 to 250) | 100 ± 10: {ratios[0]} | 400 ± 40: {ratios[1]} |"
    assert second == "| 1 | 200 (0 to no limit) | 400 ± 0: 0.50 (0.00 to no limit) |  |"
    assert last == "| all |  | 1.00, within 2.00 | 0.50, within 1.00 |"
    assert along(points[2:]) == ""


def test_sizes_are_spread_about_the_noise_scale():
    for noise in (5, 90, 333.3, 2_000):
        sizes = spread_sizes(noise, 16, 10**6)
        assert len(sizes) == 6
        assert sizes[-1] >= 30 * sizes[0]
        assert all(size % 16 == 0 for size in sizes)
        assert sizes[0] <= max(16, noise / 5)
