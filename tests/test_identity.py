"""What a run is: statistical fields are compared as they are used, hardware fields change nothing.

The lists of fields are those of the dataclasses: a new field without a value here fails.
"""

import dataclasses
import functools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bigbatch import models
from bigbatch.checks import HARDWARE
from bigbatch.config import assemble
from bigbatch.config.config import read_config
from bigbatch.config.fields import Fields
from bigbatch.data import dataset
from bigbatch.data.sets import Options
from bigbatch.data.tfds import write
from bigbatch.data.tokens import TokenOptions
from bigbatch.engine.functions import DATA_AXIS
from bigbatch.engine.optimizer import OPTIMIZERS
from bigbatch.errors import UserError
from bigbatch.models.classification import image_classification
from bigbatch.models.ghost_norm import GhostNorm
from bigbatch.schedule.adaptive.controller import Controller
from bigbatch.schedule.durations import TIME_UNITS
from bigbatch.schedule.intervals import MINUTES
from bigbatch.training import loop
from bigbatch.training.restore import newest
from bigbatch.workdir import network_file, resume
from bigbatch.workdir.files import Workdir
from tests import trained


def fields_of(kind, *, hardware):
    """The names of a dataclass's fields, with their defaults."""
    fields = [f for f in dataclasses.fields(kind) if (f.metadata == HARDWARE) == hardware]
    return {field.name: field.default for field in fields}


# A run that a field may be a part of: the config's groups and fields beside those of `trained`.
CONSTANT = {"name": "constant", "learning_rate": 0.1, "batch_size": 64, "momentum": 0.9}
PLAIN = {"policy": CONSTANT, "transformations": []}
WITHOUT_MOMENTUM = {**PLAIN, "policy": {**CONSTANT, "momentum": 0.0}}
IMAGENET = {"data": {"name": "imagenet2012", "image_size": 32}, **PLAIN}
ADAPTIVE = {
    "policy": {**CONSTANT, "name": "adaptive", "max_batch_size": 256},
    "transformations": [],
}
# The square-root rule moves Adam's moments.
ADAMS = {
    **ADAPTIVE,
    "policy": {**ADAPTIVE["policy"], "momentum": 0.0, "rule": "square_root"},
    "optimizer": {"name": "adamw"},
}
FROM_FILE = {"initial_params": "begun.npz"}
TRANSFORMER = {"name": "transformer", "layers": 2, "width": 16, "heads": 2, "vocabulary": 256}
BIBLE = {"name": "bible_kjv", "sequence_tokens": 16, "train_examples": 1000}
LANGUAGE = {**PLAIN, "data": BIBLE, "model": TRANSFORMER}

# Group of the config ("" is its top), what it is, what stands beside it, and other values.
TOP = {
    "ghost_batch_examples": 16,
    "seed": 1,
    "initial_params_sha256": "a" * 64,
    "label_smoothing": 0.1,
    "noise_small_batch_examples": 32,
    "reproducible": True,
}
OPTIMIZER = {
    "weight_decay": 1e-3,
    "decayed": None,
    "clip_norm": 1.0,
    "average_examples": 1000.0,
}
ADAM = {"b1": 0.8, "b2": 0.99, "eps": 1e-7}
DATA = {
    "name": "fashion_mnist",
    "train_examples": 1000,
    "flip": True,
    "pad_pixels": 1,
    "test_examples": 100,
}
CASES = [
    ("", Fields, FROM_FILE, TOP),
    ("data", Options, PLAIN, DATA),
    (
        "data",
        Options,
        IMAGENET,
        {"image_size": 64, "decoding": "smooth", "on_bad_record": "replace"},
    ),
    (
        "data",
        TokenOptions,
        LANGUAGE,
        {
            "name": "tokens",
            "sequence_tokens": 32,
            "documents": "masked",
            "train_examples": 500,
            "test_examples": 100,
        },
    ),
    (
        "model",
        models.WideResNetConfig,
        {},
        {
            "depth": 16,
            "width": 2,
            "strides": [1, 2, 1],
            "dtype": "float64",
            "dropout_rate": 0.1,
        },
    ),
    ("model", models.ResNetConfig, {}, {"depth": 18, "dtype": "bfloat16"}),
    ("model", models.InceptionResNetV2Config, {}, {"dropout_rate": 0.5, "dtype": "bfloat16"}),
    (
        "model",
        models.TransformerConfig,
        LANGUAGE,
        {
            "layers": 1,
            "width": 32,
            "heads": 4,
            "vocabulary": 300,
            "activation": "gelu",
            "tied": False,
            "qk_norm": False,
            "dtype": "bfloat16",
        },
    ),
    *[("optimizer", OPTIMIZERS[name], PLAIN, OPTIMIZER) for name in ("momentum", "nesterov")],
    ("optimizer", OPTIMIZERS["sgd"], WITHOUT_MOMENTUM, OPTIMIZER),
    ("optimizer", OPTIMIZERS["lars"], PLAIN, {**OPTIMIZER, "trust_coefficient": 0.01}),
    *[
        ("optimizer", OPTIMIZERS[name], WITHOUT_MOMENTUM, {**OPTIMIZER, **ADAM})
        for name in ("adam", "adamw", "lamb")
    ],
    (
        "policy",
        Controller,
        ADAPTIVE,
        {
            "learning_rate": 0.2,
            "batch_size": 96,
            "momentum": 0.8,
            "max_batch_size": 128,
            "multiple": 2.0,
            "growth_factor": 4.0,
            "cooldown_epochs": 0.5,
            "smoothing": 0.1,
        },
    ),
    ("policy", Controller, ADAMS, {"rule": "seesaw"} | ADAM),
]
# The names of kinds in a config, and the fields that they must have.
NAMES = {
    models.WideResNetConfig: {"name": "wide_resnet", "depth": 10, "width": 1},
    models.ResNetConfig: {"name": "resnet", "depth": 50},
    models.InceptionResNetV2Config: {"name": "inception_resnet_v2"},
    models.TransformerConfig: TRANSFORMER,
    **{kind: {"name": name} for name, kind in OPTIMIZERS.items()},
}
# Of the run's other parts; compared as its plan; told by another field.
ELSEWHERE = {
    Fields: {"epochs"},
    Controller: {"train_examples", "epochs", "batch_multiple_examples", "small_batch_examples"},
}


def each(case):
    """A case as an argument of a test, by its name."""
    group, kind, beside, _ = case
    suffix = {id(IMAGENET): "-records", id(ADAMS): "-adam"}.get(id(beside), "")
    return pytest.param(*case, id=f"{group}-{kind.__name__}{suffix}")


def changed(tree, group, name, value):
    """The config's values with another one."""
    if not group:
        return {**tree, name: value}
    return {**tree, group: {**tree[group], name: value}}


def begun(tmp_path, tree):
    """A directory that a run with such a config has claimed."""
    files = Workdir(tmp_path / "run")
    trained.claimed(files, read_config(tree))
    return files


def base_of(group, kind, beside):
    """The nested values that a case's fields are changed in."""
    tree = trained.tree(**beside)
    return {**tree, group: NAMES[kind]} if kind in NAMES else tree


def other(kind, name, value):
    """Another value than the default: `decayed` has two."""
    if name != "decayed":
        return value
    return "kernels" if fields_of(kind, hardware=False)[name] == "all" else "all"


KINDS = list(dict.fromkeys(case[1] for case in CASES))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_statistical_field_has_another_value_here(kind):
    named = {name for case in CASES if case[1] is kind for name in case[3]}
    assert named == fields_of(kind, hardware=False).keys() - ELSEWHERE.get(kind, set())


def test_every_kind_of_model_and_optimizer_is_here():
    kinds = {*models.MODELS.values(), *OPTIMIZERS.values()}
    assert set(KINDS) == kinds | {Fields, Options, TokenOptions, Controller}


@pytest.mark.parametrize(("group", "kind", "beside", "values"), [each(case) for case in CASES])
def test_a_default_written_out_is_no_difference(tmp_path, group, kind, beside, values):
    tree = base_of(group, kind, beside)
    files = begun(tmp_path, tree)
    written = files.run.read_bytes()
    defaults = fields_of(kind, hardware=False)
    for name in values:
        held = tree.get(group, {}) if group else tree
        if defaults[name] is not dataclasses.MISSING and name not in held:
            trained.claimed(files, read_config(changed(tree, group, name, defaults[name])))
            assert files.run.read_bytes() == written


@pytest.mark.parametrize(("group", "kind", "beside", "values"), [each(case) for case in CASES])
def test_another_value_is_refused_by_name(tmp_path, group, kind, beside, values):
    tree = base_of(group, kind, beside)
    files = begun(tmp_path, tree)
    written = {path: path.read_bytes() for path in files.path.iterdir()}
    for name, value in values.items():
        value = other(kind, name, value)
        config = read_config(changed(tree, group, name, value))
        with pytest.raises(UserError) as caught:
            trained.claimed(files, config)
        dotted = f"{group}.{name}" if group else name
        assert dotted in [problem.field for problem in caught.value.problems]
        assert {path: path.read_bytes() for path in files.path.iterdir()} == written


def test_the_length_of_a_run_is_compared_in_its_plan(tmp_path):
    files = begun(tmp_path, trained.tree())
    with pytest.raises(UserError) as caught:
        trained.claimed(files, trained.config(epochs=2))
    assert [problem.field for problem in caught.value.problems] == ["plan"]


def test_what_an_adaptive_run_measures_with_is_what_it_uses(tmp_path):
    tree = trained.tree(ghost_batch_examples=16, **ADAPTIVE)
    files = begun(tmp_path, tree)
    trained.claimed(files, read_config({**tree, "noise_small_batch_examples": 16}))
    other = read_config({**tree, "noise_small_batch_examples": 32})
    with pytest.raises(UserError) as caught:
        trained.claimed(files, other)
    names = {problem.field for problem in caught.value.problems}
    assert names == {"noise_small_batch_examples", "policy.small_batch_examples"}


class Network(nn.Module):
    """Small, and of every kind: statistics of ghost batches and nonlinear."""

    classes: int
    ghost_batch_examples: int = 16

    @nn.compact
    def __call__(self, x, *, train):
        dense = functools.partial(nn.Dense, param_dtype=jnp.dtype("float64"))
        norm = GhostNorm(self.ghost_batch_examples, axis_name=DATA_AXIS)
        x = norm(dense(6)(x.reshape(len(x), -1)), train=train)
        return dense(self.classes)(nn.tanh(x))


def make_task(side: int = 8, channels: int = 1, classes: int = 10):
    """On images of so many pixels' side."""
    facts = (side, side, channels), (5.0,) * channels, (6.0,) * channels
    return image_classification(Network(classes), *facts)


def own(name):
    """The task of a config whose `task` names it."""
    assert name == "own:task"
    return make_task


SMALL = {
    "epochs": 4,
    "ghost_batch_examples": 16,
    "microbatch_examples_per_device": 16,
    "evaluation_batch_examples": 50,
    "task": {"name": "own:task"},
    "data": {"name": "digits", "train_examples": 200, "test_examples": 77},
    "optimizer": {"name": "momentum", "weight_decay": 5e-4},
    "policy": {**CONSTANT, "name": "step_decay", "batch_size": 32, "boundaries_epochs": [1]},
    "transformations": [{"name": "grow_batch", "max_batch_size": 96}],
    "log_every_updates": 1,
    "evaluate_every_epochs": 0.5,
    "checkpoint_every_updates": 5,
}
SMALL["policy"]["factor"] = 0.3


def with_field(tree, name, value):
    """The config's values with another one; an interval takes the place of one in another unit."""
    group, _, last = name.rpartition(".")
    if group:
        return changed(tree, group, last, value)
    stem, _, unit = name.rpartition("_")
    units = (*TIME_UNITS, MINUTES)
    others = [f"{stem}_{one}" for one in units] if unit in units else []
    return {n: v for n, v in tree.items() if n not in others} | {name: value}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Two directories with the same files: of arrays, of a prepared data set, and of parameters."""
    import tensorflow_datasets as tfds

    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    rng = np.random.default_rng(0)
    parts = {
        part: (rng.integers(0, 256, (count, 8, 8, 1), np.uint8), np.arange(count) % 10)
        for part, count in (("train", 200), ("test", 77))
    }
    arrays = {}
    for part, (images, labels) in parts.items():
        arrays |= {f"{part}_images": images, f"{part}_labels": labels}
    np.savez(one / "arrays.npz", **arrays)
    features = {
        "image": tfds.features.Image(shape=(8, 8, 1)),
        "label": tfds.features.ClassLabel(num_classes=10),
    }

    class Marks(tfds.core.GeneratorBasedBuilder):
        """Images and labels."""

        name = "marks"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            raise NotImplementedError

        def _generate_examples(self):
            raise NotImplementedError

    builder = Marks(data_dir=one, file_format="array_record")
    write.write(builder, parts, show_progress=False)
    with jax.enable_x64(True):
        task = make_task()
        params, statistics = task.init(jax.random.key(7))
    network = network_file.Network(params, statistics)
    network_file.write(one / "network.npz", network)
    shutil.copytree(one, two, dirs_exist_ok=True)
    return one, two


# What a run is begun with beside `SMALL`, and continued with; {} stands for a directory.
ON_FOUR = {"devices": 4}
AUTO = {"microbatch_examples_per_device": "auto"}
HARDWARE_VALUES = {
    "microbatch_examples_per_device": ({}, 32),
    "evaluation_batch_examples": ({}, 32),
    "initial_params": ({"initial_params": "{}/network.npz"}, "{}/network.npz"),
    "shard": (ON_FOUR, "update"),
    "device_memory_bytes": ({**AUTO, "device_memory_bytes": 60_000}, 2**30),
    "trackers": ({}, []),
    "keep_checkpoints": ({}, 3),
    "log_every_epochs": ({}, 0.2),
    "log_every_examples": ({}, 50),
    "log_every_updates": ({}, 3),
    "evaluate_every_epochs": ({}, 0.2),
    "evaluate_every_examples": ({}, 50),
    "evaluate_every_updates": ({}, 3),
    "checkpoint_every_epochs": ({}, 0.2),
    "checkpoint_every_examples": ({}, 50),
    "checkpoint_every_updates": ({}, 3),
    "checkpoint_every_minutes": ({}, 1e-4),
    "failure_every_hours": (
        {
            "checkpoint_every_updates": None,
            "checkpoint_every_minutes": "auto",
            "failure_every_hours": 100.0,
        },
        1e-6,
    ),
    "keep_every_epochs": ({}, 0.2),
    "keep_every_examples": ({}, 50),
    "keep_every_updates": ({}, 3),
    "data.directory": ({"data": {"name": "marks", "directory": "{}"}}, "{}"),
    "data.path": ({"data": {"name": "arrays", "path": "{}/arrays.npz"}}, "{}/arrays.npz"),
    "data.on_device": ({}, True),
    "data.workers": (
        {
            "data": {
                "name": "imagenet2012",
                "train_examples": 36,
                "test_examples": 11,
                "image_size": 8,
            },
            "task": {"name": "own:task", "side": 8, "channels": 3, "classes": 1000},
            "epochs": 12,
            "transformations": [],
        },
        1,
    ),
}
# Where nothing is reproducible, these cut the updates in another way.
CUTS = {"microbatch_examples_per_device", "device_memory_bytes"}
# They compile programs of their own, or write a data set.
SLOW = {"device_memory_bytes", "initial_params", "data.workers"}


def test_every_hardware_field_has_another_value_here():
    data = {f"data.{name}" for name in fields_of(Options, hardware=True)}
    # An interval in tokens is one in examples; images have none.
    top = {n for n in fields_of(Fields, hardware=True) if not n.endswith("_tokens")}
    assert HARDWARE_VALUES.keys() == top | data
    others = [*models.MODELS.values(), *OPTIMIZERS.values(), Controller, TokenOptions]
    found = {name for kind in others for name in fields_of(kind, hardware=True)}
    # The directory as of images; remat in test_language; tokens decide nothing.
    assert found == {"directory", "remat", "tokens_per_example"}


def placed(value, place):
    """The value in a directory."""
    if isinstance(value, dict):
        return {name: placed(each, place) for name, each in value.items()}
    return value.format(place) if isinstance(value, str) else value


def prepared(tree, devices):
    files = Workdir(Path("nowhere"))
    config = assemble.identified(read_config(tree, "own", own), files)
    return trained.prepared(config, devices)


@pytest.fixture(scope="module")
def kept():
    """Runs that stay: equal programs are compiled once while one has them."""
    return []


@pytest.mark.parametrize(
    ("name", "reproducible"),
    [
        pytest.param(
            name,
            reproducible,
            id=name + "-reproducible" * reproducible,
            marks=[pytest.mark.long] * (name in SLOW),
        )
        for reproducible in (False, True)
        for name in HARDWARE_VALUES
    ],
)
def test_another_value_changes_nothing(
    request, tmp_path, monkeypatch, places, kept, name, reproducible
):
    """A run is stopped in the middle and goes on with the other value."""
    beside, value = HARDWARE_VALUES[name]
    devices = beside.get("devices", 1)
    tree = {**SMALL, **beside, "reproducible": reproducible}
    tree.pop("devices", None)
    if name == "device_memory_bytes" and reproducible:
        # So little would not hold the bins.
        tree[name] = 2**20
    if name == "data.workers":
        directory = request.getfixturevalue("imagenet").directories["array_record"]
        tree = with_field(tree, "data.directory", str(directory))
    if name == "shard":
        # Threads of Orbax's make the arrays in parts, in the precision of the process.
        jax.config.update("jax_enable_x64", True)
        request.addfinalizer(lambda: jax.config.update("jax_enable_x64", False))
    tree, after = placed(tree, places[0]), placed(with_field(tree, name, value), places[1])
    with jax.enable_x64(True):
        first = prepared(tree, devices)
        kept.append(first)
        whole = trained.train(first, tmp_path / "whole")
        with monkeypatch.context() as patch:
            patch.setattr(loop, "updates", trained.stopping(loop.updates, 8))
            with pytest.raises(trained.StopError):
                trained.train(first, tmp_path / "run")
        second = prepared(after, devices)
        kept.append(second)
        assert (first.layout != second.layout) == (name in CUTS and not reproducible)
        result = trained.train(second, tmp_path / "run")
        states = [
            jax.device_get(newest(run, tmp_path / place)[0])
            for run, place in ((first, "whole"), (second, "run"))
        ]
    assert result["updates"] == whole["updates"] > 10
    if reproducible:
        assert result["params_sha256"] == whole["params_sha256"]
    params, others = (state[:2] for state in states)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-10), params, others)
    assert result["test_loss"] == pytest.approx(whole["test_loss"], abs=1e-10)


@pytest.mark.parametrize("place", ["path", "directory"])
def test_other_examples_in_the_place_are_refused(tmp_path, places, place):
    """Where they lie may differ, and not what they are."""
    group = placed(HARDWARE_VALUES[f"data.{place}"][0]["data"], places[0])
    config = read_config({**SMALL, "data": group}, "own", own)
    files = Workdir(tmp_path / "run")

    def claim(data):
        identity = assemble.identity_of(config, data)
        with files.released():
            resume.open_run(files, identity, config.plan, record={})

    data = assemble.load_data(config)
    with jax.enable_x64(True):
        claim(data)
        claim(data)
    images = data.train.images.copy()
    images[3, 2, 2] ^= 1
    other = dataset.data_set(config.data.info, dataset.arrays(images, data.train.labels), data.test)
    with jax.enable_x64(True), pytest.raises(UserError) as caught:
        claim(other)
    names = {problem.field for problem in caught.value.problems}
    assert names == {"data.fingerprint.train"}
