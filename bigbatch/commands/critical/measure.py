"""`bigbatch critical`: the critical batch size of a run, measured by branching from checkpoints.

From a checkpoint short runs at several batch sizes go on from the same state, until the training
loss has fallen by a given share, or a metric of the task is at a given value. The updates and
examples that it takes give the critical batch size (see `critical_batch`), to be compared with the
noise scale measured in the same place.

*The learning rate* of a branch is lr(B) = lr_max / (1 + B_noise / B), the best one for an update
of B examples on a quadratic (McCandlish et al. 2018, equation 2.7), with the measured B_noise, and
lr_max such that the run's own batch size has the run's own learning rate. Not the linear rule: it
has no largest rate, so large batches would diverge, and a cap chosen by hand would decide what is
found. But this rule knows the noise scale: where training goes as fast as the learning rate lets
it, the critical batch size is B_noise because that was put in. `lr_factors` multiplies the rule by
several numbers and takes the best at each batch size, which is free of that, and the only way for
other optimizers than SGD.

*The loss* is that of training, at the parameters before each update, on examples in an order of
the branch's own. It falls for as long as training goes on, which a test loss need not.

Each branch is a file in WORKDIR/critical, written when it is done. A branch whose file is there,
made for the same question, is not run again.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bigbatch.checks import Checks
from bigbatch.commands.critical import fit as critical_batch
from bigbatch.commands.critical.branches import (
    Branch,
    Target,
    branch,
    constant_plan,
    noise_at,
    noise_batch_size,
)
from bigbatch.commands.critical.table import Noise, Point, SizeResult, write
from bigbatch.engine.functions import State
from bigbatch.errors import Problem, UserError, among, listed
from bigbatch.schedule.adaptive.gradient_noise import best_learning_rate
from bigbatch.schedule.plan import Plan
from bigbatch.training.run import Run
from bigbatch.workdir.checkpoint import Checkpoints
from bigbatch.workdir.files import Workdir, read_json, write_json
from bigbatch.workdir.resume import read_plan, whose

# The rule for the learning rate is plain SGD's.
_OPTIMIZERS = ("sgd", "momentum", "nesterov")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What the branches are to find out.

    Attributes:
      sizes: batch sizes in examples; None: six about the noise scale of each checkpoint.
      branches: runs at each batch size, which differ in the order of their examples.
      loss_share: by how much of itself the training loss is to fall.
      target: in its place, "loss" or a metric of the task and what it is to be in training, as
        ("perplexity", 20.0); above what it is at the checkpoint, or below.
      most_epochs: of a branch; one that needs more has not reached the loss.
      lr_factors: of the rule's learning rate; of several, the best at each batch size counts.
    """

    sizes: tuple[int, ...] | None = None
    branches: int = 4
    loss_share: float = 0.8
    target: tuple[str, float] | None = None
    most_epochs: float = 40.0
    lr_factors: tuple[float, ...] = (1.0,)

    def check(self, identity: Mapping[str, Any]) -> None:
        """Makes sure that a run with that identity can be asked that.

        Raises:
          UserError: with every mistake.
        """
        checks, ghost = Checks(), identity["ghost_batch_examples"]
        for size in self.sizes or ():
            allowed = f"a multiple of the {ghost} examples of a ghost batch"
            nearest = max(1, round(size / ghost)) * ghost
            checks.require(size == nearest, "sizes", size, allowed, nearest)
        if self.sizes is not None:
            enough = len(set(self.sizes)) >= 3
            allowed = "at least three different batch sizes"
            checks.require(enough, "sizes", list(self.sizes), allowed)
        allowed = "a whole number, at least 2: their spread is the uncertainty"
        checks.whole("branches", self.branches, allowed, at_least=2)
        allowed = "a share above 0 and below 1"
        checks.number("loss_share", self.loss_share, allowed, above=0, below=1)
        if self.target is not None:
            checks.number("target", self.target[1], "a finite number")
        checks.number("most_epochs", self.most_epochs, "a number of epochs above 0", above=0)
        for factor in self.lr_factors:
            checks.number("lr_factors", factor, "numbers above 0", above=0)
        optimizer = identity["optimizer"]
        name = optimizer if isinstance(optimizer, str) else optimizer["name"]
        allowed = (
            "one of " + ", ".join(_OPTIMIZERS) + ": the branches' learning rate is SGD's rule; "
        )
        allowed += "or another with several lr_factors, of which the best counts"
        fits = name in _OPTIMIZERS or len(self.lr_factors) > 1
        checks.require(fits, "optimizer.name", name, allowed)
        allowed = "False, or True in a run with noise_small_batch_examples"
        fits = identity["noise_small_batch_examples"] or not identity["reproducible"]
        checks.require(bool(fits), "reproducible", True, allowed, False)
        checks.done()


def measure(
    prepared: Callable[..., Run],
    files: Workdir,
    asked: Asked,
    at_updates: Sequence[int] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Point]:
    """Branches from the checkpoints of a run.

    Args:
      prepared: prepares the run in the working directory with other options of `prepare`. The
        noise is measured between its small batches, or its ghost batches where it has none.
      files: the directory; the branches are kept in its `critical`.
      asked: what to find out.
      at_updates: the checkpoints to branch from, by the updates done; None for all but one at the
        end of the run.
      say: is told of each branch that is done.

    Yields:
      What each checkpoint gave, in order, as soon as it is known.

    Raises:
      UserError: there is no such checkpoint, or the run cannot be asked that.
    """
    identity = read_json(files.run)["identity"]
    asked.check(identity)
    plan = read_plan(files)
    with Checkpoints(files.checkpoints) as checkpoints:
        at_updates = _there(files, checkpoints, plan, at_updates)
        bench = _Bench(prepared, identity, files, plan, checkpoints, asked, say)
        noises = [bench.noise(update) for update in at_updates]
        sizes = [bench.sizes(noise) for noise in noises]
        # One layout for all: nothing is compiled for each.
        bench.all_sizes = tuple(sorted({size for group in sizes for size in group}))
        for update, noise, group in zip(at_updates, noises, sizes, strict=True):
            yield bench.point(update, noise, group)


def critical(
    run: Run, directory: str | Path, at_updates: Sequence[int] | None = None, **asked: Any
) -> list[Point]:
    """Measures the critical batch size along a run, and writes what was found in its directory.

    Args:
      run: from `prepare`.
      directory: the run's, with checkpoints.
      at_updates: as of `measure`.
      **asked: fields of `Asked`.

    Returns:
      What each checkpoint gave.

    Raises:
      UserError: as `measure`.
    """
    files = Workdir.at(directory)
    points = list(measure(run.again, files, Asked(**asked), at_updates))
    write(points, files.critical)
    return points


def _there(
    files: Workdir, checkpoints: Checkpoints, plan: Plan, at_updates: Sequence[int] | None
) -> list[int]:
    """The checkpoints to branch from, rising."""
    found = sorted(update for update in checkpoints.saved() if update < plan.num_updates)
    if not found:
        allowed = (
            "the directory of a run that has saved a checkpoint before its end; this one has not "
            "(checkpoint_every_epochs says when one is made, keep_every_epochs which stay)"
        )
        raise UserError(Problem("workdir", str(files.path), allowed))
    allowed = f"updates with a checkpoint: {listed(map(str, found))} (keep_every_* keeps more)"
    problems = [
        Problem("at_updates", given, allowed, min(found, key=lambda there: abs(there - given)))
        for given in at_updates or ()
        if given not in found
    ]
    if problems:
        raise UserError(problems)
    return sorted({int(update) for update in at_updates or found})


class _Bench:
    """The checkpoints of a run, and what was measured from each."""

    def __init__(
        self,
        prepared: Callable[..., Run],
        identity: Mapping[str, Any],
        files: Workdir,
        plan: Plan,
        checkpoints: Checkpoints,
        asked: Asked,
        say: Callable[[str], None],
    ):
        self._prepare, self._identity, self._files, self._plan = prepared, identity, files, plan
        self._checkpoints, self._asked, self._say = checkpoints, asked, say
        self.all_sizes: tuple[int, ...] = ()
        self._ghost_batch_examples = identity["ghost_batch_examples"]
        unit = identity["noise_small_batch_examples"]
        self._small_batch_examples = unit or self._ghost_batch_examples
        # Where everything is done already, nothing is loaded or compiled.
        self._run = functools.lru_cache(maxsize=2)(self._prepared)
        self._state = functools.lru_cache(maxsize=1)(self._restored)

    def noise(self, update: int) -> Noise:
        """The loss and noise scale at a checkpoint."""

        def measured() -> dict[str, Any]:
            run = self._run(())
            return noise_at(run, self._state(update), self._plan.row(update))._asdict()

        return Noise(**self._kept(update, "noise", {"geometries": True}, measured))

    def sizes(self, noise: Noise) -> tuple[int, ...]:
        """The batch sizes of a checkpoint's branches."""
        if noise.scale is None:
            return ()
        if self._asked.sizes is not None:
            return tuple(sorted({int(size) for size in self._asked.sizes}))
        unit, total = self._ghost_batch_examples, self._plan.train_examples
        return tuple(critical_batch.spread_sizes(noise.scale, unit, total))

    def point(self, update: int, noise: Noise, sizes: Sequence[int]) -> Point:
        """Branches from a checkpoint at all batch sizes, and what they show."""
        row, target = self._plan.row(update), self._target(noise)
        results = [self._size(update, noise, size, target) for size in sizes]
        reached = {result.batch_size: result.reached for result in results if result.reached}
        enough = len(reached) >= 3
        means = [float(np.mean(counts)) for counts in reached.values()]
        return Point(
            update=update,
            epoch=row.epoch,
            batch_size=row.batch_size,
            learning_rate=row.hyper["learning_rate"],
            noise=noise,
            target_loss=target.value,
            sizes=tuple(results),
            fit=critical_batch.fit(list(reached), means) if enough else None,
            intervals=critical_batch.intervals(reached) if enough else None,
            lr_factors=self._asked.lr_factors,
            metric=target.metric,
        )

    def _target(self, noise: Noise) -> Target:
        """What the branches of a checkpoint are to reach."""
        if self._asked.target is None:
            return Target("loss", noise.loss * (1 - self._asked.loss_share))
        metric, value = self._asked.target
        if metric not in noise.metrics:
            raise UserError(Problem("target", metric, *among(metric, noise.metrics)))
        return Target(metric, value, value > noise.metrics[metric])

    def _size(self, update: int, noise: Noise, size: int, target: Target) -> SizeResult:
        """The branches of one batch size, at the best of the learning rates."""
        assert noise.scale is not None
        row = self._plan.row(update)
        own = row.hyper["learning_rate"]
        largest = own * (1 + noise.scale / row.batch_size)
        rule = best_learning_rate(size, noise.scale, largest)
        results = [
            self._rate(update, size, rule * factor, target) for factor in self._asked.lr_factors
        ]

        def order(result: SizeResult) -> tuple[int, float]:
            missed = sum(updates is None for updates in result.updates)
            return missed, float(np.mean(result.reached)) if result.reached else 0.0

        return min(results, key=order)

    def _rate(self, update: int, size: int, rate: float, target: Target) -> SizeResult:
        """The branches of one batch size and learning rate."""
        row = self._plan.row(update)
        counts, done = [], []
        for number in range(self._asked.branches):
            question = {
                "batch_size": size,
                "learning_rate": rate,
                "seed": self._identity["seed"] + 1 + number,
                "target_loss": target.value,
                "most_epochs": self._asked.most_epochs,
                **({} if target.metric == "loss" else {"metric": target.metric}),
            }

            def trained(question: dict[str, Any] = question) -> dict[str, Any]:
                run = self._run(self.all_sizes)
                plan = constant_plan(self._plan, row, size, rate, self._asked.most_epochs)
                made = branch(run, self._state(update), plan, question["seed"], target)
                return made._asdict()

            name = f"batch_{size}_lr_{rate:.4g}_branch_{number}"
            done.append(Branch(**self._kept(update, name, question, trained)))
            counts.append(target.after(done[-1].losses, size))
            after = "not reached" if counts[-1] is None else f"after {counts[-1]:,.1f} updates"
            self._say(
                f"update {update:,}: batch size {size:,}, lr {rate:.3g}, branch {number}: "
                f"{target.metric} {target.value:.4g} {after}"
            )
        on_the_way = [
            (made.gradient_squares, made.variances, count)
            for made, count in zip(done, counts, strict=True)
            if count is not None
        ]
        noise = critical_batch.noise_on_the_way(on_the_way)
        return SizeResult(size, rate, tuple(counts), noise)

    def _kept(
        self, update: int, name: str, question: dict[str, Any], make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """What a file says if it was made for the same question; else it is made."""
        question = {**question, "run": whose(self._identity), "plan": self._plan.fingerprint}
        path: Path = self._files.critical / f"update_{update}" / f"{name}.json"
        if path.exists():
            kept = read_json(path)
            if kept["question"] == question:
                return kept["answer"]
        answer = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"question": question, "answer": answer})
        return answer

    def _prepared(self, sizes: tuple[int, ...]) -> Run:
        """The run, measuring noise, with a layout for these batch sizes."""
        small, total = self._small_batch_examples, self._plan.train_examples
        noise_size = noise_batch_size(small, jax.device_count(), total)
        return self._prepare(
            plan=self._plan,
            noise_small_batch_examples=small,
            batch_sizes=np.array([noise_size, *sizes], np.int64),
        )

    def _restored(self, update: int) -> State:
        """The state at a checkpoint, on the devices."""
        run = self._run(())
        like = run.programs.checkpoint_shapes
        found = self._checkpoints.restore(like, whose(self._identity), at=update)
        assert found is not None, "it was listed"
        return run.on_devices(found.state)
