"""What tensorflow-datasets wrote down of a data set that it prepared, read without importing it.

A prepared data set is a directory `DATA_DIR/NAME/VERSION` with `dataset_info.json` (splits and file
format), `features.json` (shapes and classes) and the files of the records.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigbatch.checks import parsed
from bigbatch.errors import Problem, UserError
from bigbatch.places.paths import expect_bucket, place

# More outputs than a network can have; a larger label is a mark for something else.
MOST_CLASSES = 2**20
ARRAY_RECORD = "array_record"
TFRECORD = "tfrecord"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared data set.

    Attributes:
      name: as tensorflow-datasets calls it.
      directory: of the version, with the files.
      file_format: "array_record", "tfrecord" or another.
      shard_examples: how many records each file of a split holds, by the split's name.
      templates: how the files of a split are called, by the split's name.
      image_shape: (height, width, channels) of the feature `image`; None in it where images differ;
        None: there is no such feature.
      num_classes: of the feature `label`; None: there is no such feature.
    """

    name: str
    directory: Path
    file_format: str
    shard_examples: Mapping[str, tuple[int, ...]]
    templates: Mapping[str, str]
    image_shape: tuple[int | None, ...] | None
    num_classes: int | None

    def num_examples(self, split: str) -> int:
        """How many examples a split holds; 0 if there is none of that name."""
        return sum(self.shard_examples.get(split, ()))

    def files(self, split: str) -> list[Path]:
        """The files of a split, in the order of its examples, whether or not they are there."""
        count = len(self.shard_examples[split])
        replacements = {
            "{DATASET}": self.name.partition("/")[0],
            "{SPLIT}": split,
            "{FILEFORMAT}": self.file_format,
        }
        files = []
        for shard in range(count):
            text = self.templates[split]
            place = {
                "{SHARD_X_OF_Y}": f"{shard:05d}-of-{count:05d}",
                "{SHARD_INDEX}": f"{shard:05d}",
                "{NUM_SHARDS}": f"{count:05d}",
            }
            for key, value in (replacements | place).items():
                text = text.replace(key, value)
            files.append(self.directory / text)
        return files


def data_directory(data_dir: str | Path | None) -> Path:
    """Where prepared data sets are kept: as given, or the default of tensorflow-datasets."""
    default = os.environ.get("TFDS_DATA_DIR") or Path("~") / "tensorflow_datasets"
    return place(os.path.expanduser(default if data_dir is None else data_dir), "directory")


def find(name: str, data_dir: str | Path | None) -> Prepared | None:
    """The newest version of a data set that was prepared on this machine.

    Args:
      name: as tensorflow-datasets calls it; `name/config` for one of several configs that are
        there.
      data_dir: where prepared data sets are kept; None: the default of tensorflow-datasets.

    Returns:
      What is known of it, or None: there is none.

    Raises:
      UserError: its description is damaged.
    """
    directory = expect_bucket(data_directory(data_dir), "directory") / name
    try:
        versions = _versions(directory)
        if not versions:
            configs = [config for config in directory.glob("*") if _versions(config)]
            versions = _versions(configs[0]) if len(configs) == 1 else []
        return _read(name, max(versions)[1]) if versions else None
    except (ArithmeticError, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        allowed = "dataset_info.json and features.json as tensorflow-datasets writes them "
        allowed += f"({type(error).__name__}: {error}); prepare the data set again"
        raise UserError(Problem("directory", str(directory), allowed)) from error


def _versions(directory: Path) -> list[tuple[tuple[int, ...], Path]]:
    """The versions that are prepared in a directory, each with its own."""
    return [
        (tuple(map(int, file.parent.name.split("."))), file.parent)
        for file in directory.glob("*/dataset_info.json")
        if re.fullmatch(r"\d+\.\d+\.\d+", file.parent.name)
    ]


def _read(name: str, directory: Path) -> Prepared:
    info = _json(directory / "dataset_info.json")
    features = _json(directory / "features.json").get("featuresDict", {}).get("features", {})
    image, label = features.get("image", {}).get("image"), features.get("label", {})
    splits = {str(split["name"]): split for split in info.get("splits", [])}
    file_format = info.get("fileFormat", TFRECORD)
    usual = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    classes = label.get("classLabel", {}).get("numClasses")
    classes = None if classes is None else int(classes)
    if classes is not None and not 1 <= classes <= MOST_CLASSES:
        raise ValueError(f"numClasses {classes}; allowed: 1 to {MOST_CLASSES:,}")
    return Prepared(
        name=name,
        directory=directory,
        file_format=file_format,
        shard_examples={
            n: tuple(map(_count, s.get("shardLengths", ()))) for n, s in splits.items()
        },
        templates={n: str(s.get("filepathTemplate", usual)) for n, s in splits.items()},
        image_shape=None if image is None else _shape(image),
        num_classes=classes,
    )


def _count(text: Any) -> int:
    """A number of examples, which JSON holds as a text."""
    count = int(text)
    if not 0 <= count < 2**32:
        raise ValueError(f"{count} examples")
    return count


def _shape(image: Mapping[str, Any]) -> tuple[int | None, ...]:
    dimensions = image.get("shape", {}).get("dimensions", ())
    # -1 stands for a side that differs from image to image.
    return tuple(None if int(side) < 0 else int(side) for side in dimensions)


def _json(file: Path) -> Any:
    return parsed(file.read_bytes(), dict) if file.is_file() else {}
