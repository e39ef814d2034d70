"""Data sets of images: what is known of them without their files, and their arrays in memory."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bigbatch.data import own_arrays
from bigbatch.data.dataset import (
    Arrays,
    DataSet,
    Info,
    arrays,
    check_train_examples,
    data_set,
    pixel_statistics,
)
from bigbatch.data.own_arrays import from_arrays
from bigbatch.data.tfds import metadata as tfds_metadata
from bigbatch.errors import Problem, UserError, nearest_name

__all__ = [
    "NAMES",
    "Arrays",
    "DataSet",
    "Info",
    "from_arrays",
    "info",
    "load",
    "pixel_statistics",
]

# Counts are those of the data sets' authors. Means and standard deviations over the training part
# are rounded; for imagenet2012 they are the ones in general use.
_INFOS = {
    info.name: info
    for info in (
        Info("digits", 10, (8, 8, 1), (4.8834,), (6.0211,), 1_437, 360),
        Info("fashion_mnist", 10, (28, 28, 1), (72.94,), (90.02,), 60_000, 10_000),
        Info(
            "cifar10",
            10,
            (32, 32, 3),
            (125.31, 122.95, 113.87),
            (62.99, 62.09, 66.70),
            50_000,
            10_000,
        ),
        Info(
            "cifar100",
            100,
            (32, 32, 3),
            (129.30, 124.07, 112.43),
            (68.17, 65.39, 70.42),
            50_000,
            10_000,
        ),
        Info(
            "svhn_cropped",
            10,
            (32, 32, 3),
            (111.61, 113.16, 120.57),
            (50.50, 51.26, 50.24),
            73_257,
            26_032,
        ),
        Info(
            "imagenet2012",
            1_000,
            (224, 224, 3),
            (123.675, 116.28, 103.53),
            (58.395, 57.12, 57.375),
            1_281_167,
            50_000,
        ),
    )
}
NAMES = tuple(_INFOS)
_TOO_LARGE_FOR_ARRAYS = ("imagenet2012",)
# What holds the examples to test on, where a data set has several.
_TEST_SPLITS = ("test", "validation")


def info(
    name: str,
    *,
    train_examples: int | None = None,
    data_dir: str | Path | None = None,
    path: str | Path | None = None,
) -> Info:
    """What is known of a data set. Those of `NAMES` need not be on disk.

    Args:
      name: of the data set: one of `NAMES`, any image-classification set that tensorflow-datasets
        has prepared, or `arrays` for an npz file.
      train_examples: count only so many of the training part; None: all.
      data_dir: where tensorflow-datasets keeps its files; None: its default directory.
      path: of the npz file; see `own_arrays.npz_info`.

    Returns:
      The facts, with `train_examples` as asked for.

    Raises:
      UserError: there is no such data set, or it has not so many examples.

    >>> info("cifar10").train_examples
    50000
    """
    own = _own_path(name, path)
    if own is not None:
        return own_arrays.npz_info(own, train_examples=train_examples)
    known = _INFOS.get(name) or _prepared_info(_find(name, data_dir))
    problem = check_train_examples(train_examples, known.train_examples)
    if problem is not None:
        raise UserError(problem)
    return dataclasses.replace(known, train_examples=train_examples or known.train_examples)


def load(
    name: str,
    *,
    train_examples: int | None = None,
    data_dir: str | Path | None = None,
    path: str | Path | None = None,
) -> DataSet:
    """A data set's images and labels, in memory.

    `digits` comes with the package. Its test part is every fifth image (index % 5 == 0): a split by
    image, not by writer. The others are read from the files that tensorflow-datasets prepared, or
    from an npz file.

    Args:
      name: as for `info`.
      train_examples: keep only the first so many of the training part, for a harder task; None:
        all. The test part stays whole.
      data_dir: as for `info`.
      path: as for `info`.

    Returns:
      The data set.

    Raises:
      UserError: there is no such data set, it has not so many examples, it is too large for
        memory, or its files are missing, damaged, or other ones than expected.
    """
    known = info(name, train_examples=train_examples, data_dir=data_dir, path=path)
    if name in _TOO_LARGE_FOR_ARRAYS:
        small = [other for other in _INFOS if other not in _TOO_LARGE_FOR_ARRAYS]
        allowed = "a data set that fits into memory, not one of `data.record_set`: "
        allowed += ", ".join(small)
        raise UserError(Problem("name", name, allowed))
    if path is not None:
        return own_arrays.load_npz(path, train_examples=train_examples)
    if name == "digits":
        train, test = _digits()
    else:
        from bigbatch.data.tfds import files as tfds_files

        prepared = tfds_metadata.find(name, data_dir)
        if prepared is None:
            raise UserError(tfds_files.missing(name, data_dir))
        _check_facts(known if train_examples is None else info(name, data_dir=data_dir), prepared)
        train = arrays(*tfds_files.read(prepared, "train"))
        test = arrays(*tfds_files.read(prepared, _test_split(prepared.shard_examples)))
        _check_labels(known, prepared, {"train": train, "test": test})
    return data_set(known, train, test)


def _own_path(name: str, path: str | Path | None) -> str | Path | None:
    """The path of the user's own arrays, where the data set is that."""
    if (name == own_arrays.NAME) == (path is not None):
        return path
    if path is None:
        allowed = f"the path of an npz file, for a data set named {name!r}"
        raise UserError(Problem("path", path, allowed))
    allowed = f"nothing, for a data set that is not named {own_arrays.NAME!r}"
    raise UserError(Problem("path", str(path), allowed))


def _find(name: str, data_dir: str | Path | None) -> tfds_metadata.Prepared:
    """A prepared data set that this project knows nothing of."""
    prepared = tfds_metadata.find(str(name), data_dir)
    if prepared is not None:
        return prepared
    from bigbatch.data.tfds import files as tfds_files

    known = [*_INFOS, own_arrays.NAME]
    allowed = "one of " + ", ".join(known) + ", or a data set for image classification prepared in "
    allowed += f"{tfds_metadata.data_directory(data_dir)} by: "
    allowed += tfds_files.prepare_command(name, data_dir)
    raise UserError(Problem("name", name, allowed, nearest_name(str(name), known)))


def _prepared_info(prepared: tfds_metadata.Prepared) -> Info:
    """The facts of a prepared data set, but for its mean and std."""
    from bigbatch.data.tfds import files as tfds_files

    tfds_files.check(prepared)
    assert prepared.image_shape is not None
    assert prepared.num_classes is not None
    height, width, channels = (int(side or 0) for side in prepared.image_shape)
    test = _test_split(prepared.shard_examples)
    for split in ("train", test):
        if not prepared.num_examples(split):
            given = f"{prepared.name}, with the splits {', '.join(prepared.shard_examples)}"
            allowed = f"a data set with examples in a split train and one of {_TEST_SPLITS}"
            raise UserError(Problem("name", given, allowed))
    return Info(
        name=prepared.name,
        num_classes=prepared.num_classes,
        image_shape=(height, width, channels),
        mean=(),
        std=(),
        train_examples=prepared.num_examples("train"),
        test_examples=prepared.num_examples(test),
    )


def _test_split(splits: Mapping[str, tuple[int, ...]]) -> str:
    """The name of the split that is tested on."""
    return next((name for name in _TEST_SPLITS if name in splits), _TEST_SPLITS[0])


def _check_facts(known: Info, prepared: tfds_metadata.Prepared) -> None:
    """Raise a UserError where the files are not those of the data set that is known."""
    found = _prepared_info(prepared)
    fields = ("train_examples", "test_examples", "image_shape", "num_classes")
    wrong = [f for f in fields if getattr(found, f) != getattr(known, f)]
    if wrong:
        given = ", ".join(f"{f} {getattr(found, f)}" for f in wrong)
        expected = ", ".join(f"{f} {getattr(known, f)}" for f in wrong)
        given = f"files in {prepared.directory} with {given}"
        raise UserError(Problem("data_dir", given, f"those of {known.name}: {expected}"))


def _check_labels(
    known: Info, prepared: tfds_metadata.Prepared, parts: Mapping[str, Arrays]
) -> None:
    """Raise a UserError where labels are out of range."""
    problems = []
    for part, held in parts.items():
        outside = np.flatnonzero((held.labels < 0) | (held.labels >= known.num_classes))
        if len(outside):
            given = f"label {held.labels[outside[0]]} of example {outside[0]} in the {part} part "
            given += f"in {prepared.directory}"
            allowed = f"labels from 0 to {known.num_classes - 1}"
            problems.append(Problem("data_dir", given, allowed))
    if problems:
        raise UserError(problems)


def _digits() -> tuple[Arrays, Arrays]:
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        images, labels = file["images"], file["labels"]
    test = np.arange(len(images)) % 5 == 0
    return arrays(images[~test], labels[~test]), arrays(images[test], labels[test])
