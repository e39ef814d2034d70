"""From prepared ImageNet files to a trained network, by the command; mistakes in its config."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from bigbatch import cli
from bigbatch.data.sets import Options
from bigbatch.data.tfds import metadata as tfds_metadata
from bigbatch.errors import UserError
from tests.imagenet_files import FORMATS, IMAGES_PER_CLASS, TEST_IMAGES, TRAIN_CLASSES

N = TRAIN_CLASSES * IMAGES_PER_CLASS
SMALL = (
    f"--config.data.train_examples={N}",
    f"--config.data.test_examples={TEST_IMAGES}",
    "--config.data.image_size=16",
    "--config.model.name=wide_resnet",
    "--config.model.depth=10",
    "--config.model.width=1",
    "--config.epochs=2",
    "--config.ghost_batch_examples=4",
    "--config.policy.batch_size=32",
    "--config.policy.learning_rate=0.1",
    "--config.policy.boundaries_epochs=[1.5]",
    "--config.transformations.warmup.warmup_epochs=0.5",
    "--config.transformations.warmup.initial_learning_rate=0.05",
    "--config.transformations.grow_batch.max_batch_size=64",
    "--config.microbatch_examples_per_device=4",
    "--config.evaluation_batch_examples=32",
)


pytestmark = pytest.mark.usefixtures("quick_networks")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])


def train(workdir, data_dir, *overrides):
    arguments = (f"--workdir={workdir}", f"--config.data.directory={data_dir}", *SMALL, *overrides)
    status = cli.main(["train", "--config=configs/imagenet_resnet50.py:increase", *arguments])
    result = workdir / "result.json"
    return status, json.loads(result.read_text()) if result.exists() else None


def test_training_on_imagenet_files(imagenet, tmp_path, capsys):
    """Both file formats and any number of workers: the same parameters and the same evaluation."""
    runs = [
        train(tmp_path / name, imagenet.directories[name], f"--config.data.workers={workers}")
        for name, workers in zip(FORMATS, (1, 3), strict=True)
    ]
    assert [status for status, _ in runs] == [0, 0], capsys.readouterr().err
    one, other = (result for _, result in runs)
    # 32 examples from 0 and 32 on, 64 from 64 on; two epochs are 72.
    assert (one["updates"], one["examples"]) == (3, 128)
    for name in ("params_sha256", "test_loss", "test_accuracy", "train_loss"):
        assert one[name] == other[name]
    assert "bad_records" not in one


def test_bad_records_end_a_run_or_are_counted(imagenet, tmp_path, capsys):
    data_dir = tmp_path / "data"
    shutil.copytree(imagenet.directories["tfrecord"], data_dir)
    prepared = tfds_metadata.find("imagenet2012", data_dir)
    file = prepared.files("train")[1]
    content = bytearray(file.read_bytes())
    content[200] ^= 1
    file.write_bytes(content)
    status, result = train(tmp_path / "error", data_dir)
    assert (status, result) == (1, None)
    assert f"record 0 of {file} cannot be used" in capsys.readouterr().err
    status, result = train(tmp_path / "replace", data_dir, "--config.data.on_bad_record=replace")
    assert status == 0
    assert result["bad_records"] == 1


def test_another_data_set_than_the_plans(imagenet, tmp_path, capsys):
    status, _ = train(
        tmp_path / "run", imagenet.directories["tfrecord"], "--config.data.train_examples=None"
    )
    assert status == 2
    error = capsys.readouterr().err
    assert 'data.train_examples: given "1,281,167 examples of imagenet2012\'s split train"' in error
    assert f"nearest: {N}" in error


def fields(**changes):
    with pytest.raises(UserError) as error:
        Options(**({"name": "imagenet2012"} | changes))
    return [(problem.field, problem.nearest) for problem in error.value.problems]


def test_mistakes_in_a_config():
    assert fields(pad_pixels=4, workers=0) == [("pad_pixels", 0), ("workers", 1)]
    assert fields(image_size=0, train_examples=0, test_examples=50_001) == [
        ("image_size", 1),
        ("train_examples", 1),
        ("test_examples", 50_000),
    ]
    for name, given in (("image_size", 32), ("workers", 2)):
        assert fields(**{"name": "cifar10", name: given}) == [(name, None)]
    assert fields(name="cifar10", decoding="smooth") == [("decoding", "fast")]


def test_image_size_is_the_configs():
    assert Options("imagenet2012").info.image_shape == (224, 224, 3)
    assert Options("imagenet2012", image_size=299).info.image_shape == (299, 299, 3)


def test_a_data_set_with_images_of_many_sizes(imagenet, tmp_path):
    """One that this project knows nothing of: its facts come from its files."""
    source = tfds_metadata.find("imagenet2012", imagenet.directories["array_record"]).directory
    there = tmp_path / "birds" / "1.0.0"
    shutil.copytree(source, there)
    for file in there.glob("imagenet2012-*"):
        file.rename(there / file.name.replace("imagenet2012", "birds"))
    data = Options("birds", directory=str(tmp_path), image_size=20)
    assert data.is_record_set
    assert (data.info.train_examples, data.info.test_examples) == (N, TEST_IMAGES)
    assert (data.info.num_classes, data.info.image_shape) == (1000, (20, 20, 3))
    opened = data.load()
    shown = opened.evaluation(3, 5)
    assert shown["image"].shape == (5, 20, 20, 3)
    whole = opened.evaluation(0, TEST_IMAGES)
    for name, array in shown.items():
        np.testing.assert_array_equal(array, whole[name][3:8])
