"""A user's own arrays in an npz file: as data set of a config, and what can be wrong with them."""

import json

import numpy as np
import pytest

from bigbatch import cli
from bigbatch.config.config import read_config
from bigbatch.data import own_arrays, sets
from bigbatch.errors import UserError
from tests import trained


def arrays(**changes):
    rng = np.random.default_rng(0)
    held = {
        "train_images": rng.integers(0, 256, (90, 9, 7, 3), dtype=np.uint8),
        "train_labels": rng.integers(0, 5, 90),
        "test_images": rng.integers(0, 256, (20, 9, 7, 3), dtype=np.uint8),
        "test_labels": np.arange(20) % 5,
    }
    return held | changes


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "own.npz"
    np.savez_compressed(path, **arrays())
    return path


def test_the_file_is_the_data_set(path):
    held = arrays()
    data = sets.load("arrays", path=path, train_examples=80)
    facts = sets.info("arrays", path=path, train_examples=80)
    for name in ("num_classes", "image_shape", "train_examples", "test_examples"):
        assert getattr(data, name) == getattr(facts, name)
    assert (facts.num_classes, facts.image_shape, facts.train_examples) == (5, (9, 7, 3), 80)
    np.testing.assert_array_equal(data.train.images, held["train_images"][:80])
    np.testing.assert_array_equal(data.test.labels, held["test_labels"])
    assert data.mean == pytest.approx(held["train_images"][:80].mean(axis=(0, 1, 2)))
    assert data.std == pytest.approx(held["train_images"][:80].std(axis=(0, 1, 2)))


@pytest.mark.parametrize(("train", "test"), [(4, 2), (2, 4)])
def test_there_are_as_many_classes_as_the_largest_label_says(train, test):
    images = np.zeros((3, 2, 2, 1), np.uint8)
    labels = np.array([0, train, 1]), np.array([test, 0, 1])
    data = sets.from_arrays(images, labels[0], images, labels[1])
    assert data.num_classes == 5


def test_the_facts_are_known_without_the_images(path, monkeypatch):
    read = []
    original = np.lib.npyio.NpzFile.__getitem__

    def spy(file, name):
        read.append(name)
        return original(file, name)

    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", spy)
    sets.info("arrays", path=path)
    assert read == ["train_labels", "test_labels"]


def test_a_plan_and_the_input_of_a_config_with_it(path, tmp_path, capsys):
    """The batch grows beyond the data set."""
    config = tmp_path / "config.py"
    policy = trained.DECAY | {"boundaries_epochs": [2, 4], "batch_size": 32}
    tree = trained.tree(
        data={"name": "arrays", "path": str(path), "flip": True, "pad_pixels": 2},
        epochs=6,
        policy=policy,
        transformations=[{"name": "grow_batch", "max_batch_size": 320}],
    )
    config.write_text(
        "from ml_collections import ConfigDict\nEXPERIMENTS = ('own',)\n"
        f"def get_config(experiment):\n    return ConfigDict({tree!r})\n"
    )
    assert cli.main(["plan", f"--config={config}:own", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train_examples"] == 90
    assert cli.main(["data", "bench", f"--config={config}:own", "--seconds=0.05"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["32", "160", "320"]
    assert cli.main(["data", "info", "arrays", f"--path={path}"]) == 0
    assert "90 training examples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train_images": np.zeros((90, 9, 7, 3))}, ["train_images float64"]),
        ({"train_labels": np.zeros(90)}, ["train_labels float64"]),
        ({"test_labels": np.zeros(19, int)}, ["test_labels (19,)"]),
        ({"test_images": np.zeros((20, 9, 9, 3), np.uint8)}, ["test_images (9, 9, 3)"]),
        ({"train_labels": np.arange(90) - 3}, ["train_labels -3 at index 0"]),
        (
            {"train_images": np.zeros((90, 9), np.uint8), "test_labels": np.full(20, -1)},
            ["train_images (90, 9)", "test_labels -1 at index 0"],
        ),
    ],
)
@pytest.mark.parametrize("call", [sets.info, sets.load])
def test_mistakes_in_its_arrays_name_the_file(tmp_path, changes, expected, call):
    path = tmp_path / "own.npz"
    np.savez(path, **arrays(**changes))
    with pytest.raises(UserError) as error:
        call("arrays", path=path)
    assert [(p.field, p.given) for p in error.value.problems] == [
        ("path", f"{text} in {path}") for text in expected
    ]


@pytest.mark.parametrize("call", [own_arrays.npz_info, own_arrays.load_npz])
def test_a_file_that_is_missing_or_damaged(path, tmp_path, call):
    def words(file):
        with pytest.raises(UserError) as error:
            call(file)
        (problem,) = error.value.problems
        assert problem.field == "path"
        return str(problem)

    assert "a file that is there" in words(tmp_path / "none.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "an npz file that can be read" in words(path)
    np.savez(path, train_images=np.zeros(3))
    assert "an npz file with train_images, test_images, train_labels" in words(path)
    np.savez(path, **arrays(train_labels=np.array([{}] * 90)))
    assert "can be read" in words(path)


def test_a_path_belongs_to_arrays_alone(path):
    for data in ({"name": "arrays"}, {"name": "digits", "path": str(path)}):
        with pytest.raises(UserError) as error:
            read_config(trained.tree(data=data))
        assert [problem.field for problem in error.value.problems] == ["data.path"]
