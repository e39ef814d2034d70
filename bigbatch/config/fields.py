"""The plain fields at the top of a config."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from bigbatch.checks import HARDWARE, Checks
from bigbatch.errors import UserError
from bigbatch.layout.layout import check_small_batch
from bigbatch.schedule.intervals import Intervals


def _hardware(default: Any = dataclasses.MISSING) -> Any:
    """A field that may differ at every start, without influence on the result."""
    return dataclasses.field(default=default, metadata=HARDWARE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields:
    """The plain fields at the top of a config; the groups are beside them in `Config`.

    Attributes:
      epochs: length of the run.
      ghost_batch_examples: examples that share batch-norm statistics.
      seed: of the initial parameters, the order of the examples and their augmentation.
      microbatch_examples_per_device: the largest share of a microbatch that a device is given; less
        than a ghost batch lets neighbouring devices share one. "auto": the largest that fits.
      evaluation_batch_examples: examples evaluated at a time.
      initial_params: an npz file, as `bigbatch export` writes it, with whose parameters and running
        statistics the run begins, the optimizer's state being fresh; None for random ones. Once the
        run has a checkpoint the file is not needed any more.
      initial_params_sha256: of what that file holds; None until `assemble.identified` has read it.
        Where it is given, another file is refused.
      shard: "update" for parameters and an optimizer's state in parts over the devices, "none" for
        all of them on each, {"layer": F} for parts over F devices while the network computes too,
        {"layer": F, "model": M} where M of them compute each layer together. "auto": the
        first without "model" that leaves half of a device's memory to compute.
      device_memory_bytes: of each device, for "auto"; None for what the devices report.
      label_smoothing: share of each label that is spread over all classes.
      noise_small_batch_examples: examples of the small batches from which the gradient noise is
        measured; None to measure nothing. More than four in a device's share of a microbatch are a
        loop within a program, in which XLA's CPU client computes much slower: there let
        `microbatch_examples_per_device` be one to eight small batches (noise_cpu.md).
      reproducible: sums exactly, so that devices and processes change no bit of the result. Each
        then computes one ghost batch (or small batch) in a call, however many would fit.
      trackers: who is told of the records of the log.
      keep_checkpoints: how many of the newest are kept.
      log_every_epochs: interval of the training records, in one of four units; so are the others.
      evaluate_every_epochs: of the evaluations.
      checkpoint_every_epochs: of the checkpoints.
      checkpoint_every_minutes: by the clock; "auto": the interval that loses least time, from how
        long updates wait for a checkpoint and `failure_every_hours`.
      failure_every_hours: in which the whole run is expected to be lost once.
      keep_every_epochs: of the checkpoints that are kept for good; None for none.
    """

    epochs: float
    ghost_batch_examples: int
    seed: int = 0
    initial_params_sha256: str | None = None
    label_smoothing: float = 0.0
    noise_small_batch_examples: int | None = None
    reproducible: bool = False
    microbatch_examples_per_device: int | Literal["auto"] = _hardware()
    evaluation_batch_examples: int = _hardware()
    # Where it lies; what it holds is compared.
    initial_params: str | None = _hardware(None)
    shard: Literal["auto", "none", "update"] | Mapping[str, int] = _hardware("auto")
    device_memory_bytes: int | None = _hardware(None)
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = _hardware(("tensorboard",))
    keep_checkpoints: int = _hardware(2)
    log_every_epochs: float | None = _hardware(None)
    log_every_examples: int | None = _hardware(None)
    log_every_updates: int | None = _hardware(None)
    log_every_tokens: float | None = _hardware(None)
    evaluate_every_epochs: float | None = _hardware(None)
    evaluate_every_examples: int | None = _hardware(None)
    evaluate_every_updates: int | None = _hardware(None)
    evaluate_every_tokens: float | None = _hardware(None)
    checkpoint_every_epochs: float | None = _hardware(None)
    checkpoint_every_examples: int | None = _hardware(None)
    checkpoint_every_updates: int | None = _hardware(None)
    checkpoint_every_tokens: float | None = _hardware(None)
    checkpoint_every_minutes: float | Literal["auto"] | None = _hardware(None)
    failure_every_hours: float | None = _hardware(None)
    keep_every_epochs: float | None = _hardware(None)
    keep_every_examples: int | None = _hardware(None)
    keep_every_updates: int | None = _hardware(None)
    keep_every_tokens: float | None = _hardware(None)

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
        self._check_microbatch(checks)
        if self.device_memory_bytes is not None:
            allowed = "a whole number of bytes, at least 1, or None"
            checks.whole("device_memory_bytes", self.device_memory_bytes, allowed)
        smoothing = self.label_smoothing
        allowed = "a number from 0 to below 1"
        checks.number("label_smoothing", smoothing, allowed, at_least=0, below=1)
        # One to go back to where the newest is damaged.
        allowed = "a whole number of checkpoints, at least 2"
        checks.whole("keep_checkpoints", self.keep_checkpoints, allowed, at_least=2)
        try:
            # How many tokens an example has only the data tells: see `config.read_config`.
            Intervals.of(vars(self), tokens_per_example=1)
        except UserError as error:
            checks.problems += error.problems
        checks.done()

    def _check_microbatch(self, checks: Checks) -> None:
        """It holds whole ghost batches, or an equal part of one; and whole small batches."""
        ghost, microbatch = max(self.ghost_batch_examples, 1), self.microbatch_examples_per_device
        small, name = self.noise_small_batch_examples, "microbatch_examples_per_device"
        if small is not None and not check_small_batch(checks, small, ghost):
            return
        if microbatch == "auto":
            return
        unit = ghost if small is None else small
        nearest = max(1, round(microbatch / unit)) * unit
        if small is not None:
            allowed = f"a multiple of noise_small_batch_examples = {small}"
            checks.require(microbatch == nearest, name, microbatch, allowed, nearest)
            return
        # Which parts of a ghost batch will do depends on the devices: see `Config.layout`.
        allowed = f"a multiple of ghost_batch_examples = {ghost}, or an equal part of it"
        fits = microbatch > 0 and (microbatch % ghost == 0 or ghost % microbatch == 0)
        if self.reproducible:
            fits = microbatch > 0 and microbatch % ghost == 0
            allowed = f"a multiple of ghost_batch_examples = {ghost} with reproducible"
        checks.require(fits, name, microbatch, allowed, nearest)
