"""Puts a data set of tensorflow-datasets on disk, downloaded or from files that are there.

Image sets whose idx files are at hand are written from their arrays: tensorflow-datasets knows the
archives by checksums, and those of the same arrays packed anew differ.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

from bigbatch.data.tfds import idx_files
from bigbatch.data.tokens import BIBLE
from bigbatch.errors import Problem, RunError, UserError, nearest_name

_IDX_SETS = ("mnist", "fashion_mnist")
# Where Debian's packages put the idx files of these sets.
_SYSTEM_FILES = {"fashion_mnist": Path("/usr/share/datasets/fashion-mnist")}


def prepare(
    name: str,
    *,
    data_dir: str | Path | None = None,
    source: str | Path | None = None,
    show_progress: bool = False,
) -> tuple[Path, bool]:
    """Prepares a data set as ArrayRecord files, unless it is prepared.

    Args:
      name: of the data set, as tensorflow-datasets calls it.
      data_dir: where its files are to be; None: the default directory of tensorflow-datasets.
      source: a directory with the files that it is made from: idx files for fashion_mnist and
        mnist, else the archives under the names that tensorflow-datasets expects (imagenet2012:
        its two tars). None: idx files where Debian's package has them, else a download.
      show_progress: whether to show progress bars on standard error.

    Returns:
      The directory of the prepared files, and whether they were made now.

    Raises:
      UserError: there is no such data set, or files it needs are missing or damaged.
      RunError: tensorflow-datasets could not prepare it.
    """
    if source is not None and not Path(source).is_dir():
        raise UserError(Problem("from", str(source), "a directory that is there"))
    if name in ("digits", BIBLE):
        raise UserError(Problem("name", name, "a data set that does not come with bigbatch"))
    builder = _builder(name, data_dir)
    if builder.is_prepared():
        return Path(builder.data_path), False
    if source is None:
        source = _SYSTEM_FILES.get(name)
    if name in _IDX_SETS and source is not None and any(Path(source).glob("*-ubyte.gz")):
        from bigbatch.data.tfds import write as tfds_write

        parts = idx_files.read_parts(Path(source))
        tfds_write.write(builder, parts, show_progress=show_progress)
    else:
        _by_tfds(name, builder, source, show_progress)
    return Path(builder.data_path), True


def _builder(name: str, data_dir: str | Path | None) -> Any:
    """The data set's builder of tensorflow-datasets."""
    _expect("tensorflow_datasets", name, "pip install 'bigbatch[records]'")
    # TensorFlow, if it is there, logs its own start at length.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # A slow import, which most commands do not need.
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError as error:
        nearest = nearest_name(name, tfds.list_builders(with_community_datasets=False))
        allowed = "a data set of tensorflow-datasets"
        raise UserError(Problem("name", name, allowed, nearest)) from error


def _expect(package: str, name: str, command: str) -> None:
    if importlib.util.find_spec(package) is None:
        words = f"preparing {name} needs {package} (training on it does not): {command}"
        raise RunError(words)


def _by_tfds(name: str, builder: Any, source: str | Path | None, show_progress: bool) -> None:
    """Downloads, or takes the archives in `source`, by the builder's own code."""
    _expect("tensorflow", name, "pip install 'bigbatch[prepare]'")
    import tensorflow_datasets as tfds

    if not show_progress:
        tfds.disable_progress_bar()
    download = tfds.download.DownloadConfig(manual_dir=source)
    try:
        builder.download_and_prepare(file_format="array_record", download_config=download)
    except Exception as error:
        # It fails in many ways: no network, files that are not there, checksums.
        words = f"tensorflow-datasets could not prepare {name}: {type(error).__name__}: {error}"
        if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
            words += f"\nWhat it needs in --from=DIR: {builder.MANUAL_DOWNLOAD_INSTRUCTIONS}"
        elif name in _IDX_SETS:
            words += f"\nIt is also made from --from=DIR with {', '.join(idx_files.file_names())}"
            if name in _SYSTEM_FILES:
                words += " (Debian's package dataset-fashion-mnist has them)"
        raise RunError(words) from error
