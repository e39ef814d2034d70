"""Arrays written as a prepared data set of tensorflow-datasets, without TensorFlow."""

import io
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bigbatch.bars import Bar


def write(
    builder: Any, parts: Mapping[str, tuple[np.ndarray, np.ndarray]], *, show_progress: bool
) -> None:
    """Writes what the builder's own preparation would, from arrays: one ArrayRecord file a part.

    The records come in the order of the arrays, where tensorflow-datasets would shuffle them. All
    files appear at once, by a rename, so that a killed preparation leaves nothing half done.

    Args:
      builder: from `tfds.builder(..., file_format="array_record")`, of a data set with the features
        `image` (kept as PNG) and `label`.
      parts: images uint8[n, H, W, C] and labels [n] by the name of their split.
      show_progress: whether to show a progress bar on standard error.
    """
    import tensorflow_datasets as tfds

    final = Path(builder.data_path)
    partial = final.with_name(f"{final.name}.incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    infos = []
    total = sum(len(labels) for _, labels in parts.values())
    with Bar(total, "examples", show=show_progress) as bar:
        for split, (images, labels) in parts.items():
            template = tfds.core.ShardedFileTemplate(
                data_dir=final,
                dataset_name=builder.name,
                split=split,
                filetype_suffix="array_record",
            )
            file = partial / Path(template.sharded_filepaths(1)[0]).name
            num_bytes = _write_split(file, images, labels, bar)
            infos.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[len(labels)],
                    num_bytes=num_bytes,
                    filename_template=template,
                )
            )
    builder.info.set_splits(tfds.core.splits.SplitDict(infos))
    builder.info.write_to_directory(partial)
    # Only what a killed preparation left can be there: a prepared data set is never written anew.
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)


def _write_split(file: Path, images: np.ndarray, labels: np.ndarray, bar: Bar) -> int:
    """Writes one split's records and returns their bytes."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from PIL import Image

    from bigbatch.data import tf_example

    # One record a group, as tensorflow-datasets has it: each can be read alone.
    writer = ArrayRecordWriter(str(file), "group_size:1")
    num_bytes = 0
    for image, label in zip(images, labels.tolist(), strict=True):
        png = io.BytesIO()
        Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(png, "PNG")
        example = tf_example.Example()
        example.features.feature["image"].bytes_list.value.append(png.getvalue())
        example.features.feature["label"].int64_list.value.append(label)
        record = example.SerializeToString()
        writer.write(record)
        num_bytes += len(record)
        bar.move(1)
    writer.close()
    return num_bytes
