"""Every experiment of every file in configs/: what it plans, in numbers written down here.

Each recipe is stated once more, by hand, and laid out by a loop over updates that shares nothing
with the package.
"""

import importlib.util
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from bigbatch import cli
from bigbatch.config.file import compared_names, experiment_names, load_config

ROOT = Path(__file__).parents[1]
# Those of language models are in test_language_configs.py.
FILES = sorted(set((ROOT / "configs").glob("*.py")) - {ROOT / "configs" / "language.py"})


class File(NamedTuple):
    """What is common to the experiments of a file; the epochs at which something changes."""

    train_examples: int
    epochs: int
    starts: tuple[int, ...]


class Golden(NamedTuple):
    """An experiment's totals, and its settings from each of the file's starts on.

    A learning rate is a function of the epoch where it changes between two starts.
    """

    updates: int
    examples: int
    batch_sizes: tuple[int, ...]
    learning_rates: tuple[float | Callable[[float], float], ...]
    momentum: float


def goyal(epoch):
    return 0.1 + 3.1 * epoch / 5


def lars(epoch):
    return 23.08 * (epoch / 33 if epoch < 33 else ((90 - epoch) / 57) ** 2)


RECIPES = {
    "digits": File(1_437, 30, (0, 9, 18, 24)),
    "cifar10": File(50_000, 200, (0, 60, 120, 160)),
    "fashion_mnist": File(6_000, 20, (0, 6, 12, 16)),
    "fashion_mnist_wrn16_4": File(60_000, 200, (0, 60, 120, 160)),
    "imagenet_inception_resnet_v2": File(1_281_167, 90, (0, 30, 60, 80)),
    "imagenet_resnet50": File(1_281_167, 90, (0, 5, 30, 60, 80)),
}
DECAY = (1, 0.2, 0.04, 0.008)
# fmt: off
CIFAR10 = {
    # Learning rates in units of the optimizer's own.
    "decay": (78_125, 10_000_000, (128, 128, 128, 128), DECAY),
    "hybrid": (34_376, 10_000_384, (128, 640, 640, 640), (1, 1, 0.2, 0.04)),
    "increase": (29_142, 10_002_304, (128, 640, 3200, 5120), (1, 1, 1, 0.32)),
    "increase_uncapped": (28_876, 10_000_384, (128, 640, 3200, 16_000), (1, 1, 1, 1)),
    "increase_lr": (6_407, 10_000_640, (640, 3200, 5120, 5120), (5, 5, 1.6, 0.32)),
    "increase_momentum": (2_305, 10_000_640, (3200, 5120, 5120, 5120), (5, 1.6, 0.32, 0.064)),
}
FASHION_MNIST = {
    "decay": (3_750, 120_000, (32, 32, 32, 32), DECAY),
    "hybrid": (1_650, 120_000, (32, 160, 160, 160), (1, 1, 0.2, 0.04)),
    "increase": (1_425, 120_000, (32, 160, 640, 640), (1, 1, 0.8, 0.16)),
    "increase_lr": (357, 120_480, (160, 640, 640, 640), (5, 4, 0.8, 0.16)),
    "increase_momentum": (320, 120_576, (192, 640, 640, 640), (3, 2, 0.4, 0.08)),
    "large": (188, 120_320, (640, 640, 640, 640), DECAY),
    "unscaled": (357, 120_480, (160, 640, 640, 640), DECAY),
    "uncapped": (1_386, 120_000, (32, 160, 800, 4000), (1, 1, 1, 1)),
    "excessive": (244, 120_000, (320, 640, 640, 640), (5, 2, 0.4, 0.08)),
}
FASHION_MNIST_WRN16_4 = {
    "decay": (93_750, 12_000_000, (128, 128, 128, 128), DECAY),
    "hybrid": (41_250, 12_000_000, (128, 640, 640, 640), (1, 1, 0.2, 0.04)),
    "increase": (34_969, 12_001_280, (128, 640, 3200, 5120), (1, 1, 1, 0.32)),
    "increase_lr": (7_688, 12_002_560, (640, 3200, 5120, 5120), (5, 5, 1.6, 0.32)),
    "increase_momentum": (2_766, 12_001_920, (3200, 5120, 5120, 5120), (5, 1.6, 0.32, 0.064)),
    "large": (2_344, 12_001_280, (5120, 5120, 5120, 5120), DECAY),
}


def every_optimizer(recipes, *, raised_momentum, momentum_only=(), learning_rate=0.1):
    """A file's recipes for the paper's four optimizers."""
    optimizers = (
        ("", learning_rate, 0.9),
        ("-nesterov", learning_rate, 0.9),
        ("-sgd", 10 * learning_rate, 0.0),
        ("-adam", 1e-3, 0.0),
    )
    return {
        schedule + suffix: Golden(
            updates,
            examples,
            sizes,
            tuple(own_rate * unit for unit in units),
            raised_momentum if schedule in ("increase_momentum", "excessive") else momentum,
        )
        for suffix, own_rate, momentum in optimizers
        for schedule, (updates, examples, sizes, units) in recipes.items()
        if (momentum or schedule != "increase_momentum")
        and not (suffix and schedule in momentum_only)
    }


GOLDEN = {
    "digits": {
        "decay": Golden(1_348, 43_136, (32,) * 4, (0.1, 0.02, 0.004, 0.0008), 0.9),
        "hybrid": Golden(594, 43_200, (32, 160, 160, 160), (0.1, 0.1, 0.02, 0.004), 0.9),
        "increase": Golden(540, 43_200, (32, 160, 320, 320), (0.1, 0.1, 0.04, 0.008), 0.9),
        "increase_lr": Golden(176, 43_360, (160, 320, 320, 320), (0.5, 0.2, 0.04, 0.008), 0.9),
        "increase_momentum": Golden(
            196, 43_136, (128, 320, 320, 320), (0.2, 0.1, 0.02, 0.004), 0.95
        ),
        "large": Golden(135, 43_200, (320,) * 4, (0.1, 0.02, 0.004, 0.0008), 0.9),
        "unscaled": Golden(176, 43_360, (160, 320, 320, 320), (0.1, 0.02, 0.004, 0.0008), 0.9),
    },
    "cifar10": every_optimizer(CIFAR10, raised_momentum=0.98),
    "fashion_mnist": every_optimizer(
        FASHION_MNIST,
        learning_rate=0.05,
        raised_momentum=0.95,
        momentum_only=("increase_lr", "increase_momentum", "unscaled", "uncapped", "excessive"),
    ),
    "fashion_mnist_wrn16_4": every_optimizer(
        FASHION_MNIST_WRN16_4,
        raised_momentum=0.98,
        momentum_only=("increase_lr", "increase_momentum", "large"),
    ),
    "imagenet_inception_resnet_v2": {
        "decay": Golden(14_076, 115_310_592, (8192,) * 4, (3, 0.3, 0.03, 0.003), 0.9),
        "increase": Golden(5_631, 115_359_744, (8192, *[81_920] * 3), (3, 3, 0.3, 0.03), 0.9),
        "momentum_0.9": Golden(
            5_865, 115_310_592, (8192, *[65_536] * 3), (3, 2.4, 0.24, 0.024), 0.9
        ),
        "momentum_0.95": Golden(
            3_519, 115_310_592, (16_384, *[65_536] * 3), (3, 1.2, 0.12, 0.012), 0.95
        ),
        "momentum_0.975": Golden(
            2_346, 115_310_592, (32_768, *[65_536] * 3), (3, 0.6, 0.06, 0.006), 0.975
        ),
    },
    "imagenet_resnet50": {
        "decay": Golden(
            14_076, 115_310_592, (8192,) * 5, (goyal, 3.2, 0.32, 0.032, 0.0032), 0.9
        ),
        "increase": Golden(
            9_384,
            115_310_592,
            (8192, 8192, 16_384, 16_384, 16_384),
            (goyal, 3.2, 0.64, 0.064, 0.0064),
            0.9,
        ),
        "mlperf_lars": Golden(1_760, 115_343_360, (65_536,) * 5, (lars,) * 5, 0.954),
    },
}
# fmt: on
CASES = [(file, experiment) for file, golden in GOLDEN.items() for experiment in golden]
CONTROLS = [
    (file, experiment)
    for file, experiment in CASES
    if experiment.partition("-")[0] in ("large", "unscaled")
]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def lay_out(recipe: File, golden: Golden) -> tuple[list[int], list[float]]:
    """Each update's batch size and learning rate, one update after the other."""
    sizes, rates, position = [], [], 0
    while position < recipe.epochs * recipe.train_examples:
        at = sum(start * recipe.train_examples <= position for start in recipe.starts) - 1
        rate = golden.learning_rates[at]
        rates.append(rate(position / recipe.train_examples) if callable(rate) else rate)
        sizes.append(golden.batch_sizes[at])
        position += sizes[-1]
    return sizes, rates


def test_every_experiment_has_its_numbers_here():
    # An adaptive run has its numbers only afterwards.
    assert {f.stem: set(experiment_names(str(f))) - {"adaptive"} for f in FILES} == {
        file: set(golden) for file, golden in GOLDEN.items()
    }


@pytest.mark.parametrize("file", ["digits", "fashion_mnist"])
def test_adaptive_begins_with_what_decay_begins_with(capsys, file):
    path = f"configs/{file}.py"
    decay, adaptive = (load_config(f"{path}:{name}") for name in ("decay", "adaptive"))
    assert adaptive.plan.hyper(0) == decay.plan.hyper(0)
    assert adaptive.controller.max_batch_size == load_config(f"{path}:large").plan.batch_sizes[0]
    assert "adaptive" not in compared_names(path)
    assert cli.main(["plan", f"--config={path}:adaptive", "--json"]) == 0
    limits = json.loads(capsys.readouterr().out)["adaptive"]
    assert limits["fewest_updates"] < limits["most_updates"] < decay.plan.num_updates
    assert cli.main(["plan", f"--config={path}:adaptive"]) == 0
    out = capsys.readouterr().out
    assert f"at most {limits['most_updates']:,} (no measurement asks" in out
    for level in limits["ladder"]:
        assert f"  {level['batch_size']}  " in out


@pytest.mark.parametrize(("file", "experiment"), CASES)
def test_plan(capsys, file, experiment):
    recipe, golden = RECIPES[file], GOLDEN[file][experiment]
    sizes, rates = lay_out(recipe, golden)
    assert (len(sizes), sum(sizes)) == (golden.updates, golden.examples)

    assert cli.main(["plan", f"--config=configs/{file}.py:{experiment}", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["train_examples"], plan["epochs"]) == (recipe.train_examples, recipe.epochs)
    assert (plan["num_updates"], plan["num_examples"]) == (golden.updates, golden.examples)
    # A stage starts where the batch size changes.
    sizes_before = (None, *golden.batch_sizes)
    assert [(round(s["epoch"]), s["batch_size"]) for s in plan["stages"]] == [
        (start, size)
        for start, size, before in zip(
            recipe.starts, golden.batch_sizes, sizes_before, strict=False
        )
        if size != before
    ]
    for stage in plan["stages"]:
        first, last = stage["first_update"], stage["first_update"] + stage["num_updates"] - 1
        assert stage["learning_rate"] == pytest.approx(rates[first], rel=1e-12)
        assert stage["last_learning_rate"] == pytest.approx(rates[last], rel=1e-12)
        assert stage["momentum"] == golden.momentum

    columns = load_config(f"configs/{file}.py:{experiment}").plan
    np.testing.assert_array_equal(columns.batch_sizes, sizes)
    np.testing.assert_allclose(columns.hypers["learning_rate"], rates, rtol=1e-12)
    np.testing.assert_array_equal(columns.hypers["momentum"], golden.momentum)


@pytest.mark.parametrize(("file", "experiment"), CASES)
def test_plan_table(capsys, file, experiment):
    assert cli.main(["plan", f"--config=configs/{file}.py:{experiment}", "--devices=8"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"\n{GOLDEN[file][experiment].updates:,} updates, " in out


@pytest.mark.parametrize(("file", "experiment"), [case for case in CASES if case not in CONTROLS])
@pytest.mark.parametrize("share", [0.45, 0.7, 0.95])
def test_noise_scale_is_that_of_the_source(file, experiment, share):
    config = load_config(f"configs/{file}.py:{experiment}")
    noise_scales = [
        plan.noise_scales[plan.at_epoch(share * config.epochs)]
        for plan in (config.plan, config.source_plan)
    ]
    assert noise_scales[0] == pytest.approx(noise_scales[1], rel=1e-12)


@pytest.mark.parametrize(("file", "experiment"), CONTROLS)
def test_controls_have_another_noise_scale(file, experiment):
    config = load_config(f"configs/{file}.py:{experiment}")
    assert config.plan.noise_scales[0] <= config.source_plan.noise_scales[0] / 5


@pytest.mark.parametrize("experiment", GOLDEN["cifar10"])
def test_the_name_of_a_cifar10_experiment_names_its_optimizer(experiment):
    config = load_config(f"configs/cifar10.py:{experiment}")
    name = experiment.partition("-")[2] or "momentum"
    assert type(config.optimizer).__name__.lower() == name
    assert config.optimizer.weight_decay == 5e-4


PAPER = [
    ("cifar10", "decay", 80_000, 0.03),
    ("cifar10", "increase", 29_000, 0.01),
    ("cifar10", "increase_lr", 6_500, 0.02),
    ("cifar10", "increase_momentum", 2_500, 0.08),
    ("imagenet_inception_resnet_v2", "decay", 14_000, 0.01),
    ("imagenet_inception_resnet_v2", "increase", 6_000, 0.07),
    ("imagenet_inception_resnet_v2", "momentum_0.9", 6_000, 0.03),
    ("imagenet_inception_resnet_v2", "momentum_0.95", 3_500, 0.01),
    ("imagenet_inception_resnet_v2", "momentum_0.975", 2_500, 0.07),
]


@pytest.mark.parametrize(("file", "experiment", "claimed", "tolerance"), PAPER)
def test_updates_are_about_those_that_the_paper_claims(file, experiment, claimed, tolerance):
    updates = load_config(f"configs/{file}.py:{experiment}").plan.num_updates
    assert updates == pytest.approx(claimed, rel=tolerance)


def docstring(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.__doc__


COMMANDS = [
    (file.stem, line.strip())
    for file in FILES
    for line in docstring(file).splitlines()
    if line.startswith("    bigbatch ") and "--config=" in line
]


def test_every_file_shows_a_command_of_its_own():
    assert {file for file, _ in COMMANDS} == set(GOLDEN)
    for file, command in COMMANDS:
        assert f"--config=configs/{file}.py" in command


@pytest.mark.parametrize(("file", "command"), COMMANDS)
def test_a_docstrings_command_can_be_typed(capsys, file, command):
    _, *words = shlex.split(command)
    overrides = [word for word in words if word.startswith("--config.")]
    # The parser ends the process where it refuses a word.
    options = cli._parser().parse_args([word for word in words if word not in overrides])
    path, _, named = options.config.partition(":")
    experiments = [named] if named else (getattr(options, "experiments", None) or "").split(",")
    for experiment in experiments if experiments != [""] else GOLDEN[file]:
        assert cli.main(["plan", f"--config={path}:{experiment}", *overrides]) == 0
        out = capsys.readouterr().out
        assert f"{GOLDEN[file][experiment].updates:,} updates" in out


@pytest.mark.parametrize("file", [f for f in FILES if f.stem != "digits"], ids=lambda f: f.stem)
def test_a_docstrings_table_agrees(file):
    rows = re.findall(r"^\| (\S+) \| ([\d,]+) \|", docstring(file), re.MULTILINE)
    updates = {name: int(number.replace(",", "")) for name, number in rows}
    plain = {name: golden.updates for name, golden in GOLDEN[file.stem].items() if "-" not in name}
    assert updates == plain
    for name, golden in GOLDEN[file.stem].items():
        assert golden.updates == plain[name.partition("-")[0]]
