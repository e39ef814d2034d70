"""Images/s of the record pipeline on the machine's cores: ImageNet's files, of generated JPEGs."""

import json
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bigbatch.data import sets, tf_example
from bigbatch.data.tfrecord import framed
from tests import imagenet_files
from tests.benchmarks.input_records import deliver

_IMAGE = {"image": {"shape": {"dimensions": ["-1", "-1", "3"]}}}


def rows(toy: bool, _: str) -> Iterator[dict[str, Any]]:
    """A row for each way to decode: training images of 224 pixels from 500 x 375."""
    count, taken, side = (4, 8, 32) if toy else (256, 16_384, 224)
    with tempfile.TemporaryDirectory() as directory:
        _write(Path(directory) / "imagenet2012" / "5.1.0", count, (64, 80) if toy else (375, 500))
        for decoding in ("fast", "smooth"):
            data = sets.load(
                "imagenet2012",
                directory=directory,
                train_examples=count,
                test_examples=1,
                image_size=side,
                flip=True,
                decoding=decoding,
            )
            size = min(64, taken // 2)
            # The first time threads are started and files are opened.
            for number in (size, taken):
                found = deliver(
                    lambda first, number, data=data: data.training(0, first, number),
                    num_examples=number,
                    microbatch_examples=size,
                )
            yield {
                "decoding": decoding,
                "cores": os.cpu_count(),
                "images/s": found.examples_per_s,
                "processor ms an image": found.processor_ms_per_example,
            }


def _write(directory: Path, count: int, size: tuple[int, int]) -> None:
    """What tensorflow-datasets would have prepared, as far as it is read."""
    directory.mkdir(parents=True)

    def record(number: int) -> bytes:
        image = imagenet_files.photo(np.random.default_rng(number), *size)
        example = tf_example.Example()
        feature = example.features.feature
        feature["image"].bytes_list.value.append(imagenet_files.encode(image, quality=75))
        feature["label"].int64_list.value.append(number % 1000)
        return framed(example.SerializeToString())

    with ThreadPoolExecutor() as pool:
        records = list(pool.map(record, range(count)))
    splits = {"train": records, "validation": records[:1]}
    for name, held in splits.items():
        file = directory / f"imagenet2012-{name}.tfrecord-00000-of-00001"
        file.write_bytes(b"".join(held))
    lengths = [{"name": name, "shardLengths": [str(len(held))]} for name, held in splits.items()]
    info = {"name": "imagenet2012", "fileFormat": "tfrecord", "splits": lengths}
    (directory / "dataset_info.json").write_text(json.dumps(info))
    features = {"image": _IMAGE, "label": {"classLabel": {"numClasses": "1000"}}}
    told = {"featuresDict": {"features": features}}
    (directory / "features.json").write_text(json.dumps(told))
