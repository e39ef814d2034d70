"""The command as a user meets it: exit status, stdout and stderr, and what it leaves on disk."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bigbatch import cli
from bigbatch.commands.report import runs as report_runs
from bigbatch.config.fields import Fields
from bigbatch.errors import UserError
from bigbatch.workdir.files import Workdir

DIGITS = "configs/digits.py"
CIFAR = "configs/cifar10.py"
QUICK = (
    "--config.epochs=0.2",
    "--config.policy.boundaries_epochs=[0.1]",
    "--config.model.strides=(2,2,1)",
    "--config.evaluate_every_updates=4",
    "--config.checkpoint_every_updates=4",
)


pytestmark = pytest.mark.usefixtures("quick_networks")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])


def run(*arguments, capsys):
    status = cli.main(arguments)
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize(
    ("experiment", "updates", "examples"),
    # Totals by hand, stage for stage: e.g. increase is 23,438 + 4,688 + 625 + 391.
    [
        ("decay", 78_125, 10_000_000),
        ("hybrid", 34_376, 10_000_384),
        ("increase", 29_142, 10_002_304),
        ("increase_uncapped", 28_876, 10_000_384),
        ("increase_lr", 6_407, 10_000_640),
        ("increase_momentum", 2_305, 10_000_640),
    ],
)
def test_plan_json_of_cifar10_where_the_data_is_not(capsys, experiment, updates, examples):
    status, out, err = run("plan", f"--config={CIFAR}:{experiment}", "--json", capsys=capsys)
    plan = json.loads(out)
    assert (status, err) == (0, "")
    assert out.count("\n") == 1
    assert list(plan) == [
        "train_examples",
        "epochs",
        "num_updates",
        "num_examples",
        "stages",
        "fingerprint",
    ]
    assert (plan["train_examples"], plan["epochs"]) == (50_000, 200)
    assert (plan["num_updates"], plan["num_examples"]) == (updates, examples)
    assert sum(s["num_updates"] for s in plan["stages"]) == updates
    assert sum(s["num_updates"] * s["batch_size"] for s in plan["stages"]) == examples
    names = "first_update num_updates first_example epoch batch_size learning_rate"
    names += " last_learning_rate momentum noise_scale"
    assert list(plan["stages"][0]) == names.split()


def test_plan_table(capsys):
    status, out, _ = run("plan", f"--config={CIFAR}:increase", "--devices=8", capsys=capsys)
    assert status == 0
    assert "2.68 times fewer updates than the 78,125" in out
    assert "planned for 8 devices" in out
    # 128 examples are one ghost batch: seven of eight devices have nothing to do at first.
    rows = [line.split() for line in out.splitlines() if line.strip()[:1].isdigit()]
    assert [row[3] for row in rows[:4]] == ["128", "640", "3,200", "5,120"]


def test_plan_starts_no_backend_and_imports_nothing_heavy():
    code = (
        "import sys; from bigbatch import cli; "
        f"status = cli.main(['plan', '--config={CIFAR}:increase_lr']); "
        "heavy = {'jax', 'flax', 'optax', 'orbax', 'tensorflow', 'tensorflow_datasets'}; "
        "print(sorted(heavy & sys.modules.keys()), file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "[]\n")


MISTAKES = [
    (["--config.polcy.batch_size=64"], ["polcy", "nearest: 'policy'"]),
    (["--config.policy.batchsize=64"], ["policy.batchsize: given 64", "nearest: 'batch_size'"]),
    (["--config.policy.batch_size=large"], ["policy.batch_size: given 'large'", "a whole number"]),
    (["--config.policy.batch_size=64.0"], ["policy.batch_size: given 64.0", "nearest: 64"]),
    (
        ["--config.policy.batch_size=40"],
        ["policy.batch_size: given 40", "multiples of 32", "nearest: 32"],
    ),
    (
        ["--config.policy.boundaries_epochs=9,24,18"],
        ["policy.boundaries_epochs", "[9.0, 18.0, 24.0]"],
    ),
    (["--config.policy.momentum=1.0"], ["policy.momentum: given 1.0", "below 1", "nearest: 0.999"]),
    (["--config.policy.momentum=-0.1"], ["policy.momentum: given -0.1", "nearest: 0"]),
    (
        ["--config.policy.name=step_decya"],
        ["policy.name: given 'step_decya'", "nearest: 'step_decay'"],
    ),
    (["--config.epochs=0"], ["epochs: given 0.0", "above 0"]),
    (["--config.seed=-1"], ["seed: given -1", "nearest: 0"]),
    (["--config.data.name=digit"], ["data.name: given 'digit'", "nearest: 'digits'"]),
    (["--config.model.depth=12"], ["model.depth: given 12", "6n + 4", "nearest: 10"]),
    (["--config.optimizer.name=sgdm"], ["optimizer.name: given 'sgdm'", "nearest: 'sgd'"]),
    (["--config.optimizer.name=sgd"], ["policy.momentum: given 0.9", "no momentum"]),
    (
        ["--config.microbatch_examples_per_device=100"],
        ["microbatch_examples_per_device: given 100", "nearest: 96"],
    ),
    (["--config.log_every_updates=0"], ["log_every_updates: given 0", "above 0"]),
    (
        ["--config.transformations.grow_batch.max_batch_size=100"],
        ["transformations.grow_batch.max_batch_size: given 100", "nearest: 96"],
    ),
    (
        ["--config.transformations.grow.max_batch_size=100"],
        ["transformations.grow.max_batch_size", "nearest: 'grow_batch'"],
    ),
    (["--config.ghost_batch_examples=0"], ["ghost_batch_examples: given 0", "nearest: 1"]),
    (["--config.transformations=3"], ["transformations: given 3", "a list of groups"]),
    (["--config.policy=3"], ["policy: given 3", "a group of fields"]),
    (
        [
            "--config.seed=-1",
            "--config.model.width=0",
            "--config.policy.batch_size=33",
            "--config.epohcs=3",
        ],
        ["4 mistakes", "seed", "model.width", "policy.batch_size", "nearest: 'epochs'"],
    ),
]


@pytest.mark.parametrize(
    ("arguments", "first"),
    [
        (["pln"], "verb: given 'pln'; nearest: 'plan'"),
        (["data", "inf"], "verb: given 'inf'; nearest: 'info'; allowed: one of info, "),
        (["plan", "--confg=digits"], "flag: given '--confg'; nearest: '--config'"),
        (
            ["train", "--config=digits", "--workdr=x"],
            "flag: given '--workdr'; nearest: '--workdir'",
        ),
        (
            ["plan", "--config=digits", "--config.seed", "3"],
            "flag: given '--config.seed'; nearest: ",
        ),
        (["plan", "--config=digits:incraese"], "config: given 'incraese'; nearest: 'increase'"),
        (
            ["plan", "--config=digits", "--config.polcy.batch_size=3"],
            "polcy: given {'batch_size': 3}; nearest: 'policy'",
        ),
    ],
)
def test_a_typo_is_answered_in_a_short_line(capsys, arguments, first):
    """And of many names that there are, with a few."""
    status, out, err = run(*arguments, capsys=capsys)
    head, line, *rest = err.splitlines()
    assert (status, out, head) == (2, "", "bigbatch: 1 mistake")
    assert line.startswith(f"  {first}")
    assert len(line) <= 80
    assert err.count(",") <= 7
    assert [text[:13] for text in rest] == ["    allowed: "] * len(rest)


def test_where_no_name_is_near_all_are_told(capsys):
    *_, err = run("plan", "--config=digits", "--config.zzz=3", capsys=capsys)
    fields = {field.name for field in dataclasses.fields(Fields)}
    assert fields < set(err.partition("allowed: a field of the config: ")[2].strip().split(", "))


@pytest.mark.parametrize(("overrides", "expected"), MISTAKES, ids=lambda v: " ".join(v)[:60])
@pytest.mark.parametrize("verb", ["plan", "train"])
def test_mistakes_in_a_config(capsys, tmp_path, verb, overrides, expected):
    workdir = [] if verb == "plan" else [f"--workdir={tmp_path / 'run'}"]
    status, out, err = run(verb, f"--config={DIGITS}:increase", *workdir, *overrides, capsys=capsys)
    assert (status, out) == (2, "")
    for text in expected:
        assert text in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        (f"{DIGITS}:increse", ["config: given 'increse'", "nearest: 'increase'"]),
        ("configs/digit.py:decay", ["configs/digit.py", "nearest: 'configs/digits.py'"]),
        ("README.md", ["config: given 'README.md'"]),
    ],
)
def test_mistakes_in_the_name_of_a_config(capsys, reference, expected):
    status, out, err = run("plan", f"--config={reference}", capsys=capsys)
    assert (status, out) == (2, "")
    for text in expected:
        assert text in err


def test_a_config_file_that_fails_is_named(capsys, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import no_such_module\n")
    status, _, err = run("plan", f"--config={path}", capsys=capsys)
    assert status == 2
    assert "no_such_module" in err


def test_devices(capsys):
    status, _, err = run("plan", f"--config={DIGITS}", "--devices=0", capsys=capsys)
    assert (status, "devices: given 0" in err) == (2, True)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CIFAR, "data.name: given 'cifar10'"),
        ("configs/imagenet_resnet50.py", "data.name: given 'imagenet2012'"),
    ],
)
def test_data_that_is_not_there(capsys, tmp_path, config, expected):
    data = f"--config.data.directory={tmp_path / 'none'}"
    workdir = f"--workdir={tmp_path / 'run'}"
    status, _, err = run("train", f"--config={config}", workdir, data, capsys=capsys)
    assert status == 2
    assert expected in err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of a few updates."""
    workdir = tmp_path_factory.mktemp("run") / "a" / "b"
    root = Path(__file__).parents[1]
    assert (
        cli.main(["train", f"--config={root / DIGITS}:increase", f"--workdir={workdir}", *QUICK])
        == 0
    )
    return workdir


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_train_writes_what_it_says(finished):
    result = json.loads((finished / "result.json").read_text())
    assert list(result) == [
        "updates",
        "examples",
        "test_loss",
        "test_accuracy",
        "train_loss",
        "seconds",
        "compilations",
        "params_sha256",
    ]
    plan = json.loads((finished / "plan.json").read_text())
    assert (result["updates"], result["examples"]) == (plan["num_updates"], plan["num_examples"])
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    training = [r for r in records if "train_loss" in r]
    tests = [r for r in records if "test_loss" in r]
    common = [
        "update",
        "examples",
        "epoch",
        "batch_size",
        "learning_rate",
        "momentum",
        "noise_scale",
    ]
    assert list(training[0]) == [*common, "train_loss", "examples_per_s", "input_wait_s", "unix_s"]
    assert all(0 <= record["input_wait_s"] < 600 for record in training)
    assert list(tests[0]) == [*common, "test_loss", "test_accuracy", "unix_s"]
    assert [r["update"] for r in training] == list(range(1, result["updates"] + 1))
    assert training[-1]["examples"] == result["examples"]
    assert tests[-1]["update"] == result["updates"]
    assert tests[-1]["test_accuracy"] == result["test_accuracy"]
    assert report_runs.read_run(finished).finished


def test_train_on_a_finished_run_says_so(capsys, finished):
    before = snapshot(finished)
    status, out, _ = run(
        "train", f"--config={DIGITS}:increase", f"--workdir={finished}", *QUICK, capsys=capsys
    )
    assert status == 0
    assert "finished" in out
    assert snapshot(finished) == before


def test_evaluate_gives_the_final_evaluation_again(capsys, finished):
    status, out, _ = run("evaluate", f"--workdir={finished}", capsys=capsys)
    result = json.loads((finished / "result.json").read_text())
    assert status == 0
    evaluated = json.loads(out)
    assert evaluated == {k: result[k] for k in ("updates", "test_loss", "test_accuracy")}


REFUSED = [
    (["--config.seed=1"], ["seed: given 1", "0, with which"]),
    (["--config.optimizer.weight_decay=0.1"], ["optimizer.weight_decay: given 0.1", "0.0005"]),
    (["--config.policy.learning_rate=0.2"], ["plan: given", "first update that differs is 0"]),
    (["--config.epochs=0.3"], ["plan: given", "--change-future"]),
]


@pytest.mark.parametrize(("overrides", "expected"), REFUSED, ids=lambda v: " ".join(v)[:40])
def test_another_run_in_the_workdir_is_refused(capsys, finished, overrides, expected):
    before = snapshot(finished)
    status, _, err = run(
        "train",
        f"--config={DIGITS}:increase",
        f"--workdir={finished}",
        *QUICK,
        *overrides,
        capsys=capsys,
    )
    assert status == 2
    for text in expected:
        assert text in err
    assert snapshot(finished) == before


def test_a_changed_future_is_trained_when_asked_for(capsys, tmp_path):
    arguments = ["train", f"--config={DIGITS}:increase", f"--workdir={tmp_path}", *QUICK]
    assert run(*arguments, capsys=capsys)[0] == 0
    first = json.loads((tmp_path / "result.json").read_text())
    longer = [*arguments, "--config.epochs=0.4", "--change-future"]
    assert run(*longer, capsys=capsys)[0] == 0
    second = json.loads((tmp_path / "result.json").read_text())
    assert second["updates"] > first["updates"]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    updates = [r["update"] for r in records if "train_loss" in r]
    assert updates == list(range(1, second["updates"] + 1))


def test_hardware_and_intervals_may_change(capsys, finished):
    status, out, _ = run(
        "train",
        f"--config={DIGITS}:increase",
        f"--workdir={finished}",
        *QUICK,
        "--config.microbatch_examples_per_device=64",
        "--config.log_every_epochs=1",
        capsys=capsys,
    )
    assert (status, "finished" in out) == (0, True)


def test_a_run_goes_back_to_a_checkpoint_and_ends_as_before(capsys, finished, tmp_path):
    """And `evaluate` and `export` show that checkpoint, too."""
    workdir = tmp_path / "again"
    shutil.copytree(finished, workdir)
    command = ["train", f"--config={DIGITS}:increase", f"--workdir={workdir}", *QUICK]
    status, _, err = run(*command, "--from-update=5", capsys=capsys)
    assert status == 2
    assert "from-update: given 5; nearest: 6\n    allowed: updates done at a checkpoint" in err
    assert "that is kept: 6, 4\n" in err
    for verb, out in (("evaluate", ()), ("export", (f"--out={tmp_path / 'network.npz'}",))):
        status, shown, _ = run(verb, f"--workdir={workdir}", "--update=4", *out, capsys=capsys)
        assert (status, json.loads(shown)["updates"]) == (0, 4)
    assert run(*command, "--from-update=4", "--until=5_updates", capsys=capsys)[0] == 3
    assert not (workdir / "result.json").exists(), "it is not finished any more"
    assert run(*command, capsys=capsys)[0] == 0
    before, after = (json.loads((each / "result.json").read_text()) for each in (finished, workdir))
    assert before["params_sha256"] == after["params_sha256"]


@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_a_foreign_workdir_is_refused(capsys, tmp_path, verb):
    (tmp_path / "plan.json").write_text("years of work")
    config = [f"--config={DIGITS}:increase"] if verb == "train" else []
    status, _, err = run(verb, *config, f"--workdir={tmp_path}", capsys=capsys)
    assert status == 2
    assert "workdir: given" in err
    assert "holds 'plan.json' and no config.json" in err
    assert snapshot(tmp_path) == {str(tmp_path / "plan.json"): b"years of work"}


def test_stray_files_are_no_reason_to_refuse_a_workdir(tmp_path):
    files, names = Workdir(tmp_path), {".DS_Store", "train.log", "thesis.tex", "lost+found"}
    (tmp_path / "lost+found").mkdir()
    for name in names - {"lost+found"}:
        (tmp_path / name).touch()
    with files.released():
        files.claim()
    assert {path.name for path in tmp_path.iterdir()} == names
    (tmp_path / "checkpoints").mkdir()
    with files.released(), pytest.raises(UserError, match="holds 'checkpoints'"):
        files.claim()


@pytest.mark.parametrize("name", ["back\\slash", "\udcff", "/gs/bucket"])
def test_a_workdir_that_cannot_hold_checkpoints_is_refused_before_training(capsys, tmp_path, name):
    workdir = f"--workdir={tmp_path / name}"
    status, _, err = run("train", f"--config={DIGITS}:increase", workdir, *QUICK, capsys=capsys)
    assert status == 2
    assert "workdir: given" in err
    assert "a path without a backslash" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "missing", "empty", "file/inside"])
def test_a_workdir_without_a_run(capsys, tmp_path, monkeypatch, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    workdir = str(tmp_path / name) if name else ""
    status, _, err = run("evaluate", f"--workdir={workdir}", capsys=capsys)
    assert status == 2
    assert "workdir: given" in err
    if name in ("", "file/inside"):
        status, _, err = run("train", f"--config={DIGITS}", f"--workdir={workdir}", capsys=capsys)
        assert status == 2
        assert "workdir: given" in err


@pytest.mark.parametrize("name", ["config.json", "run.json", "plan.json"])
def test_a_damaged_file_is_named_and_kept(capsys, finished, tmp_path, name):
    for file in ("config.json", "run.json", "plan.json", "metrics.jsonl"):
        (tmp_path / file).write_bytes((finished / file).read_bytes())
    (tmp_path / name).write_text('{"half":')
    before = snapshot(tmp_path)
    status, _, err = run(
        "train", f"--config={DIGITS}:increase", f"--workdir={tmp_path}", *QUICK, capsys=capsys
    )
    assert status == 2
    assert name in err
    assert snapshot(tmp_path) == before


def test_compare_reports_every_run_and_repeats_none(capsys, tmp_path):
    arguments = [
        "compare",
        f"--config={DIGITS}",
        f"--workdir={tmp_path}",
        "--experiments=decay,increase_lr",
        "--seeds=2",
        *QUICK,
    ]
    status, out, err = run(*arguments, capsys=capsys)
    assert status == 0
    assert "increase\\_lr" in out
    assert err.count("updates, test accuracy") == 4
    assert (tmp_path / "report" / "report.html").exists()
    assert (tmp_path / "report" / "growing_batch.png").exists()
    status, again, err = run(*arguments, capsys=capsys)
    assert (status, again) == (0, out)
    assert err.count("finished before") == 4
    run_dirs = [str(tmp_path / "decay" / f"seed_{seed}") for seed in range(2)]
    status, out, _ = run("report", *run_dirs, f"--out={tmp_path / 'one'}", capsys=capsys)
    assert status == 0
    assert "decay" in out


def test_compare_checks_every_experiment_first(capsys, tmp_path):
    status, _, err = run(
        "compare",
        f"--config={DIGITS}",
        f"--workdir={tmp_path}",
        "--config.policy.momentum=1.0",
        "--experiments=decay,increase,incraese_lr",
        capsys=capsys,
    )
    assert status == 2
    assert "2 mistakes" in err
    assert "nearest: 'increase_lr'" in err
    assert list(tmp_path.iterdir()) == []
