"""Small data sets from the files of tensorflow-datasets, read without TensorFlow."""

from pathlib import Path
from typing import Any

import numpy as np

from bigbatch.errors import Problem, UserError


def read(name: str, split: str, data_dir: str | Path | None) -> tuple[np.ndarray, np.ndarray]:
    """One split of an image-classification set, in the order of its files.

    Args:
      name: of the data set, as tensorflow-datasets calls it.
      split: "train" or "test".
      data_dir: where its files are; None: the default directory of tensorflow-datasets.

    Returns:
      Images, uint8[n, H, W, C], and labels, int64[n].

    Raises:
      UserError: the files are not there in the random-access format (ArrayRecord).
    """
    # A slow import, which most runs do not need.
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir)
    try:
        if not builder.is_prepared():
            raise FileNotFoundError(builder.data_path)
        source = builder.as_data_source(split=split)
    except (FileNotFoundError, NotImplementedError) as error:
        raise UserError(_missing(name, data_dir, builder)) from error
    images = np.empty((len(source), *builder.info.features["image"].shape), np.uint8)
    labels = np.empty(len(source), np.int64)
    for i, example in enumerate(source):
        images[i], labels[i] = example["image"], example["label"]
    return images, labels


def _missing(name: str, data_dir: str | Path | None, builder: Any) -> Problem:
    """What is missing of a data set, and the command that gets it."""
    if builder.is_prepared():
        what = f"the files in {builder.data_path} are {builder.info.file_format.value} files"
        directory = "another data_dir"
    else:
        what = f"there are no files in {builder.data_path}"
        directory = "that place"
    where = None if data_dir is None else str(data_dir)
    command = (
        f'python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}, '
        f"data_dir={where!r}, file_format='array_record').download_and_prepare()\""
    )
    allowed = (
        f"a data set that is on disk as array_record files ({what}; once, with TensorFlow and a "
        f"network, make them in {directory}: {command})"
    )
    return Problem("name", name, allowed, "digits")
