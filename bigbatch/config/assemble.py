"""From a config's data set to functions that give its examples.

A source is a pure function `(first_example, num_examples) -> {name: array[num_examples, ...]}`.
"""

from collections.abc import Callable, Mapping

import numpy as np

from bigbatch.config.config import Config
from bigbatch.config.fields import in_config_names
from bigbatch.data import on_device, sets, stream
from bigbatch.data.keys import example_keys
from bigbatch.data.records import record_set
from bigbatch.data.records.record_set import RecordSet
from bigbatch.data.sets import DataSet
from bigbatch.errors import UserError

Source = Callable[[int, int], Mapping[str, np.ndarray]]


def load_data(config: Config, *, show_progress: bool = False) -> DataSet | RecordSet:
    """A config's data set: arrays in memory, or open files of records.

    Args:
      config: names it.
      show_progress: whether to show a progress bar where something is made once.

    Raises:
      UserError: it is missing or does not fit, in the config's names.
    """
    data = config.data
    try:
        if not data.is_record_set:
            return sets.load(
                data.name,
                train_examples=data.train_examples,
                data_dir=data.directory,
                path=data.path,
            )
        return record_set.load(
            data.name,
            train_examples=data.train_examples,
            test_examples=data.test_examples,
            image_size=data.image_size,
            data_dir=data.directory,
            decoding=data.decoding,
            replace_bad_records=data.on_bad_record == "replace",
            workers=data.workers,
            show_progress=show_progress,
        )
    except UserError as error:
        raise UserError(p.under("data") for p in in_config_names(error).problems) from error


def training_source(data: DataSet | RecordSet, config: Config, *, keys: bool = False) -> Source:
    """The training examples of a run's positions: `image`, uint8, `label`, int32.

    Args:
      data: from `load_data`.
      config: its seed and what it changes in the images.
      keys: whether to give the model's random keys too, as `key`, uint32[num_examples, 2].

    Returns:
      The source; where the images are on the device, it gives what `on_device.maker` needs.
    """
    indices = on_device.index_source(data.train_examples, config.seed, config.data.augment)

    def source(first_example: int, num_examples: int) -> Mapping[str, np.ndarray]:
        span = config.seed, first_example, num_examples
        if isinstance(data, RecordSet):
            made = data.train.training(*span, flip=config.data.flip)
        elif config.data.on_device:
            made = indices(first_example, num_examples)
        else:
            made = stream.examples(data.train, *span, config.data.augment)
        if keys:
            made["key"] = example_keys(len(data.train), *span)
        return made

    return source


def evaluation_source(data: DataSet | RecordSet) -> Source:
    """The test examples by their numbers, unchanged: `image`, uint8, `label`, int32.

    Args:
      data: from `load_data`.
    """
    if isinstance(data, RecordSet):
        return data.test.evaluation
    test = data.test

    def source(first_example: int, num_examples: int) -> Mapping[str, np.ndarray]:
        part = slice(first_example, first_example + num_examples)
        return {"image": test.images[part], "label": test.labels[part]}

    return source
