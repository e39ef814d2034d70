"""The plain fields of a config: intervals, the data set, and what stands at the top."""

import dataclasses
import functools
from typing import Literal

from bigbatch.checks import Checks
from bigbatch.data import sets
from bigbatch.data.augment import Augment
from bigbatch.data.records import record_set
from bigbatch.errors import UserError
from bigbatch.layout.layout import check_small_batch
from bigbatch.schedule.durations import UNITS, Every

_ONLY_FOR_RECORDS = ("test_examples", "image_size", "decoding", "on_bad_record", "workers")


def in_config_names(error: UserError) -> UserError:
    """What is wrong with a data set, in the names that the fields of `DataConfig` have."""
    names = {"data_dir": "directory"}
    return UserError(
        dataclasses.replace(p, field=names.get(p.field, p.field)) for p in error.problems
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data set and what is changed at random in its training images.

    Attributes:
      name: see `bigbatch.data.sets`.
      train_examples: use only the first so many; None for all.
      directory: where tensorflow-datasets keeps its files; None for its default.
      path: of the npz file, for the data set `arrays`; see `bigbatch.data.own_arrays`.
      flip: mirror half of the images.
      pad_pixels: pad and crop by so many; not for record sets, which have a crop of their own
        (`data.crops`).
      on_device: keep the training images on every device, and make microbatches there; a hardware
        matter, without influence on the result.
      test_examples: of a record set, evaluate on the first so many; None for all.
      image_size: of a record set, side of the images that are made of its own, in pixels; None
        for 224.
      decoding: of a record set: `smooth` decodes and resizes as TensorFlow's usual pipelines do,
        `fast` is cheaper; see `data.jpeg`.
      on_bad_record: of a record set: whether a record that cannot be used ends the run, or another
        example is shown in its place (`data.record_examples`).
      workers: of a record set, threads that decode, without influence on the result; None for as
        many as there are cores.
    """

    name: str
    train_examples: int | None = None
    directory: str | None = None
    path: str | None = None
    flip: bool = False
    pad_pixels: int = 0
    on_device: bool = False
    test_examples: int | None = None
    image_size: int | None = None
    decoding: Literal["fast", "smooth"] = "fast"
    on_bad_record: Literal["error", "replace"] = "error"
    workers: int | None = None

    def __post_init__(self) -> None:
        checks = Checks()
        if self.is_record_set:
            given, allowed = self.pad_pixels, "0: the images of record sets are cropped at random"
            checks.require(given == 0, "pad_pixels", given, allowed, 0)
            allowed = "False: the images of record sets stay in their files"
            checks.require(not self.on_device, "on_device", self.on_device, allowed, False)
            if self.workers is not None:
                checks.whole("workers", self.workers, "a number of threads, at least 1, or None")
        else:
            for field in dataclasses.fields(self):
                given, allowed = getattr(self, field.name), f"{field.default!r} for {self.name}: "
                allowed += "only the images of record sets, as imagenet2012, are decoded in a run"
                only = field.name in _ONLY_FOR_RECORDS and given != field.default
                checks.require(not only, field.name, given, allowed, field.default)
        try:
            self.augment.check(self.info.image_shape)
        except UserError as error:
            checks.problems += error.problems
        checks.done()

    @functools.cached_property
    def is_record_set(self) -> bool:
        """Whether the images stay encoded in files."""
        return record_set.is_record_set(self.name, self.directory)

    @functools.cached_property
    def info(self) -> sets.Info:
        """What is known of the data set without its images."""
        try:
            if self.is_record_set:
                return record_set.info(
                    self.name,
                    train_examples=self.train_examples,
                    test_examples=self.test_examples,
                    image_size=self.image_size,
                    data_dir=self.directory,
                )
            return sets.info(
                self.name,
                train_examples=self.train_examples,
                data_dir=self.directory,
                path=self.path,
            )
        except UserError as error:
            raise in_config_names(error) from error

    @property
    def augment(self) -> Augment:
        """What is changed at random."""
        return Augment(flip=self.flip, pad_pixels=self.pad_pixels)


@dataclasses.dataclass(frozen=True)
class Fields:
    """The plain fields at the top of a config."""

    epochs: float
    ghost_batch_examples: int
    microbatch_examples_per_device: int | Literal["auto"]
    evaluation_batch_examples: int
    seed: int = 0
    initial_params: str | None = None
    initial_params_sha256: str | None = None
    full_batch_norm: bool = False
    shard_optimizer: bool = False
    device_memory_bytes: int | None = None
    label_smoothing: float = 0.0
    reestimate_examples: int | None = None
    noise_small_batch_examples: int | None = None
    reproducible: bool = False
    log_every_epochs: float | None = None
    log_every_examples: int | None = None
    log_every_updates: int | None = None
    evaluate_every_epochs: float | None = None
    evaluate_every_examples: int | None = None
    evaluate_every_updates: int | None = None
    checkpoint_every_epochs: float | None = None
    checkpoint_every_examples: int | None = None
    checkpoint_every_updates: int | None = None
    keep_checkpoints: int = 2
    keep_every_epochs: float | None = None
    keep_every_examples: int | None = None
    keep_every_updates: int | None = None

    def __post_init__(self) -> None:
        checks = Checks()
        checks.number("epochs", self.epochs, "a number of epochs above 0", above=0)
        for name in ("ghost_batch_examples", "evaluation_batch_examples"):
            checks.whole(name, getattr(self, name), "a whole number of examples, at least 1")
        nearest = min(max(self.seed, 0), 2**32 - 1)
        allowed = "a whole number from 0 to 2^32 - 1"
        checks.require(self.seed == nearest, "seed", self.seed, allowed, nearest)
        sha256, allowed = self.initial_params_sha256, "None without initial_params"
        fits = sha256 is None or self.initial_params is not None
        checks.require(fits, "initial_params_sha256", sha256, allowed)
        if self.noise_small_batch_examples is not None:
            self._check_small_batch(checks)
        self._check_microbatch(checks)
        if self.device_memory_bytes is not None:
            allowed = "a whole number of bytes, at least 1, or None"
            checks.whole("device_memory_bytes", self.device_memory_bytes, allowed)
        if self.reproducible:
            allowed = "False with full_batch_norm, whose ghost batch spans the devices"
            checks.require(not self.full_batch_norm, "reproducible", True, allowed, False)
            allowed = "False with shard_optimizer, whose sums lie elsewhere on other devices"
            checks.require(not self.shard_optimizer, "reproducible", True, allowed, False)
        smoothing = self.label_smoothing
        allowed = "a number from 0 to below 1"
        checks.number("label_smoothing", smoothing, allowed, at_least=0, below=1)
        if self.reestimate_examples is not None:
            allowed = "a whole number of examples, at least 1, or None"
            checks.whole("reestimate_examples", self.reestimate_examples, allowed)
        # One to go back to where the newest is damaged.
        allowed = "a whole number of checkpoints, at least 2"
        checks.whole("keep_checkpoints", self.keep_checkpoints, allowed, at_least=2)
        for stem in ("log_every", "evaluate_every", "checkpoint_every", "keep_every"):
            given = {n: v for n, v in self._intervals(stem).items() if v is not None}
            allowed = "exactly one of " + ", ".join(self._intervals(stem))
            fits = len(given) == 1 or (stem == "keep_every" and not given)
            checks.require(fits, stem, given or "nothing", allowed)
            for name, value in given.items():
                checks.number(name, value, "a number above 0", above=0)
        checks.done()

    def _check_microbatch(self, checks: Checks) -> None:
        """It holds whole ghost batches, or an equal part of one."""
        ghost, microbatch = max(self.ghost_batch_examples, 1), self.microbatch_examples_per_device
        name = "microbatch_examples_per_device"
        if microbatch == "auto":
            allowed = "a number with full_batch_norm, where a microbatch is a whole batch"
            checks.require(not self.full_batch_norm, name, microbatch, allowed)
        elif self.full_batch_norm:
            checks.whole(name, microbatch, "a whole number of examples, at least 1")
        elif self.noise_small_batch_examples is None:
            # Which parts of a ghost batch will do depends on the devices: see `Config.layout`.
            nearest = max(1, round(microbatch / ghost)) * ghost
            allowed = f"a multiple of ghost_batch_examples = {ghost}, or an equal part of it"
            fits = microbatch > 0 and (microbatch % ghost == 0 or ghost % microbatch == 0)
            if self.reproducible:
                fits = microbatch > 0 and microbatch % ghost == 0
                allowed = f"a multiple of ghost_batch_examples = {ghost} with reproducible"
            checks.require(fits, name, microbatch, allowed, nearest)

    def _check_small_batch(self, checks: Checks) -> None:
        """A small batch of the noise measurement lies on one device, in every microbatch."""
        small, ghost = self.noise_small_batch_examples, max(self.ghost_batch_examples, 1)
        allowed = "None with full_batch_norm, where a batch is one ghost batch"
        name = "noise_small_batch_examples"
        checks.require(not self.full_batch_norm, name, small, allowed)
        if not check_small_batch(checks, small, ghost):
            return
        assert small is not None
        microbatch = self.microbatch_examples_per_device
        if microbatch == "auto":
            return
        nearest = max(1, round(microbatch / small)) * small
        allowed = f"a multiple of noise_small_batch_examples = {small}"
        name = "microbatch_examples_per_device"
        checks.require(microbatch == nearest, name, microbatch, allowed, nearest)

    def _intervals(self, stem: str) -> dict[str, float | None]:
        return {f"{stem}_{unit}": getattr(self, f"{stem}_{unit}") for unit in UNITS}

    def every(self, stem: str) -> Every:
        """The interval that is given in one of three units."""
        every = self.every_or_none(stem)
        assert every is not None
        return every

    def every_or_none(self, stem: str) -> Every | None:
        """Likewise; None where no unit is given."""
        for name, value in self._intervals(stem).items():
            if value is not None:
                return Every(value, name.rpartition("_")[2])
        return None
