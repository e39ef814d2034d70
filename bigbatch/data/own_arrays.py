"""A data set of the user's own arrays, in memory or in an npz file."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from bigbatch.data.dataset import Arrays, DataSet, Info, arrays, check_count, data_set
from bigbatch.data.tfds.metadata import MOST_CLASSES
from bigbatch.errors import Problem, UserError
from bigbatch.places.paths import expect_bucket, place

NAME = "arrays"
_IMAGES, _LABELS = ("train_images", "test_images"), ("train_labels", "test_labels")


def from_arrays(
    train_images: np.ndarray,
    train_labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    *,
    name: str = NAME,
    num_classes: int | None = None,
    train_examples: int | None = None,
) -> DataSet:
    """A data set of the user's own arrays.

    Args:
      train_images: uint8[n, H, W, C], or uint8[n, H, W] for one channel.
      train_labels: integers [n].
      test_images: as the training images, in any number.
      test_labels: integers, one for each test image.
      name: for the records of the run.
      num_classes: None: the largest label of both parts plus 1.
      train_examples: keep only the first so many of the training part; None: all.

    Returns:
      The data set; its mean and std are those of the training images that are kept.

    Raises:
      UserError: shapes, types or labels that do not fit together, all of them at once.
    """
    train, test = (train_images, train_labels), (test_images, test_labels)
    facts = _facts(train, test, name, num_classes, train_examples)
    return data_set(facts, arrays(*train), arrays(*test))


def npz_info(path: str | Path) -> Info:
    """What is known of a file's arrays without reading its images.

    Args:
      path: of an npz file with the arrays that `from_arrays` takes, under their names there.

    Raises:
      UserError: as `from_arrays`, or there is no such file, or it is damaged.
    """
    held = _read(path, _IMAGES, shapes=True) | _read(path, _LABELS)
    train, test = ((held[f"{p}_images"], held[f"{p}_labels"]) for p in ("train", "test"))
    try:
        return _facts(train, test, NAME)
    except UserError as error:
        # What is wrong with the arrays names the file.
        raise UserError(
            dataclasses.replace(p, field="path", given=f"{p.field} {p.given} in {path}")
            for p in error.problems
        ) from error


def load_npz(path: str | Path) -> tuple[Arrays, Arrays]:
    """The training and the test part of a file that `npz_info` has passed, in memory."""
    held = _read(path, _IMAGES + _LABELS)
    train, test = (arrays(held[f"{p}_images"], held[f"{p}_labels"]) for p in ("train", "test"))
    return train, test


def _read(path: str | Path, names: tuple[str, ...], shapes: bool = False) -> dict[str, np.ndarray]:
    """Some arrays of a file, or stand-ins of their shapes and types that take no memory."""
    found = expect_bucket(place(path), "path")
    if not found.is_file():
        raise UserError(Problem("path", str(path), "a file that is there"))
    try:
        # NumPy leaves a damaged file open that it opened itself.
        with found.open("rb") as opened, np.load(opened) as file:
            missing = [name for name in _IMAGES + _LABELS if name not in file.files]
            if not missing:
                return {name: _shape_only(file, name) if shapes else file[name] for name in names}
    except Exception as error:
        # zip, zlib and npy each have errors of their own for a damaged file.
        allowed = f"an npz file that can be read ({type(error).__name__}: {error})"
        raise UserError(Problem("path", str(path), allowed)) from error
    given = f"{path}, with {', '.join(file.files) or 'nothing'}"
    allowed = f"an npz file with {', '.join(_IMAGES + _LABELS)}"
    raise UserError(Problem("path", given, allowed))


def _shape_only(file: Any, name: str) -> np.ndarray:
    """A stand-in for an array of an npz file."""
    member = name if name in file.zip.namelist() else f"{name}.npy"
    with file.zip.open(member) as opened:
        version = np.lib.format.read_magic(opened)
        reader = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            reader = np.lib.format.read_array_header_2_0
        shape, _, dtype = reader(opened)
        return np.broadcast_to(np.zeros((), dtype), shape)


def _facts(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    name: str,
    num_classes: int | None = None,
    train_examples: int | None = None,
) -> Info:
    """What is known of images and labels of both parts.

    Raises:
      UserError: with all that is wrong with them.
    """
    problems = [
        *_check_part("train", *train, num_classes),
        *_check_part("test", *test, num_classes),
    ]
    shape, test_shape = np.shape(train[0])[1:], np.shape(test[0])[1:]
    if not problems and shape != test_shape:
        allowed = f"images of the training part's shape {shape}"
        problems.append(Problem("test_images", test_shape, allowed))
    if np.ndim(train[0]):
        problems += check_count("train_examples", train_examples, len(train[0]))
    if problems:
        raise UserError(problems)
    height, width, channels = shape if len(shape) == 3 else (*shape, 1)
    return Info(
        name=name,
        num_classes=num_classes or int(max(np.max(train[1]), np.max(test[1]))) + 1,
        image_shape=(height, width, channels),
        mean=(),
        std=(),
        train_examples=train_examples or len(train[0]),
        test_examples=len(test[0]),
    )


def _check_part(
    part: str, images: np.ndarray, labels: np.ndarray, num_classes: int | None
) -> list[Problem]:
    """What is wrong with one part of the user's arrays."""
    images, labels = np.asarray(images), np.asarray(labels)
    problems = []
    if images.dtype != np.uint8:
        problems.append(Problem(f"{part}_images", str(images.dtype), "uint8 images", "uint8"))
    if images.ndim not in (3, 4) or 0 in images.shape:
        allowed = "at least one image: (n, height, width, channels) or (n, height, width)"
        problems.append(Problem(f"{part}_images", images.shape, allowed))
    if not np.issubdtype(labels.dtype, np.integer):
        problems.append(Problem(f"{part}_labels", str(labels.dtype), "integer labels", "int32"))
    if labels.shape != images.shape[:1]:
        allowed = f"one label for each image: {images.shape[:1]}"
        problems.append(Problem(f"{part}_labels", labels.shape, allowed, images.shape[:1]))
    if not problems:
        most = min(num_classes or MOST_CLASSES, MOST_CLASSES) - 1
        outside = (labels < 0) | (labels > most)
        if outside.any():
            first = int(np.flatnonzero(outside)[0])
            given = f"{int(labels[first])} at index {first}"
            problems.append(Problem(f"{part}_labels", given, f"labels from 0 to {most}"))
    return problems
