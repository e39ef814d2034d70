"""Small data sets from the files of tensorflow-datasets, read without TensorFlow."""

from pathlib import Path

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

    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    try:
        if not builder.is_prepared():
            raise FileNotFoundError(builder.data_path)
        source = builder.as_data_source(split=split)
    except (FileNotFoundError, NotImplementedError) as error:
        where = "" if data_dir is None else f", data_dir={str(data_dir)!r}"
        command = (
            f'python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}{where}, '
            "file_format='array_record').download_and_prepare()\""
        )
        allowed = (
            f"a data set that is on disk: no ArrayRecord files in {builder.data_path}. Get them, "
            f"once and with TensorFlow installed, by: {command}"
        )
        raise UserError(Problem("name", name, allowed, "digits")) from error
    images = np.empty((len(source), *builder.info.features["image"].shape), np.uint8)
    labels = np.empty(len(source), np.int64)
    for i, example in enumerate(source):
        images[i], labels[i] = example["image"], example["label"]
    return images, labels
