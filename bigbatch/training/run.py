"""A prepared run: everything that stays the same from its first update to its last."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from bigbatch import distributed
from bigbatch.data.source import TrainingData
from bigbatch.engine import functions
from bigbatch.engine.task import Examples, PyTree, Sums, Task
from bigbatch.engine.update_rule import Rule
from bigbatch.layout.layout import Layout
from bigbatch.schedule.adaptive import gradient_noise
from bigbatch.schedule.adaptive.controller import Controller
from bigbatch.schedule.plan import Plan, Row
from bigbatch.training.microbatches import Request
from bigbatch.training.programs import Programs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What `training.prepare.prepare` makes, for training, evaluation and whatever else is asked.

    Attributes:
      task: what is trained.
      data: its examples.
      plan: every update's batch size and hyperparameters.
      optimizer: as the compiled functions use it.
      layout: how each update is cut into microbatches.
      mesh: the devices.
      programs: the compiled functions.
      seed: of the state before the first update, and of the order of the examples.
      initial: parameters and running statistics to begin with; None for random ones.
      microbatch: makes one microbatch on the devices, with the number of examples that it computes,
        which names its program.
      evaluation_examples_per_device: each device's share of an evaluation microbatch.
      unit_examples: what a device's share of a microbatch holds whole numbers of, where it holds
        one.
      controller: decides an adaptive run's updates; None for a planned one.
      identity: plain values by dotted name that decide the result, beside the plan.
      again: prepares the same with other options of `prepare`.
      smaller: the same with microbatches of half the size, which it compiles.
    """

    task: Task
    data: TrainingData
    plan: Plan
    optimizer: Rule
    layout: Layout
    mesh: Mesh
    programs: Programs
    seed: int
    initial: Callable[[], tuple[PyTree, PyTree]] | None
    microbatch: Callable[[Request], tuple[int, Examples]]
    evaluation_examples_per_device: int
    unit_examples: int
    identity: Mapping[str, Any]
    again: Callable[..., "Run"]
    smaller: Callable[[], "Run"]
    controller: Controller | None = None

    @functools.cached_property
    def frozen(self) -> PyTree:
        """The task's frozen arrays, on all devices."""
        sharding = NamedSharding(self.mesh, functions.REPLICATED)
        return distributed.put(self.task.frozen, sharding)

    @property
    def microbatch_examples_per_device(self) -> int:
        """A device's share of the largest microbatch."""
        return self.layout.devices * self.layout.shapes[0] // self.mesh.size

    @property
    def tokens_per_example(self) -> int | None:
        """Tokens of an example, where the data or the plan says it."""
        return getattr(self.data, "tokens_per_example", None) or self.plan.tokens_per_example

    def tokens(self, examples: int) -> dict[str, int]:
        """What a record says of so many examples: their `tokens`, if they have any."""
        return {"tokens": examples * self.tokens_per_example} if self.tokens_per_example else {}

    @property
    def noise_population(self) -> str:
        """Of what the measured noise speaks: of the training set if its examples come unchanged."""
        changing = self.data.is_augmented or self.task.takes_keys
        return gradient_noise.DATA_DISTRIBUTION if changing else gradient_noise.TRAINING_SET

    def measurement(self, row: Row, sums: Sums) -> gradient_noise.Measurement | None:
        """What an update has measured of the noise, from its sums; None where nothing was."""
        measured = gradient_noise.measurement_of(sums)
        if measured is None or self.noise_population == gradient_noise.DATA_DISTRIBUTION:
            return measured
        share, small_shares = (
            gradient_noise.shares(row.first_example, row.batch_size, size, self.plan.train_examples)
            for size in (row.batch_size, self.unit_examples)
        )
        return measured._replace(share=share, small_shares=small_shares)

    def init_state(self) -> functions.State:
        """The state before the first update, on all devices."""
        replicated = NamedSharding(self.mesh, functions.REPLICATED)
        data = distributed.put(jax.random.key_data(jax.random.key(self.seed)), replicated)
        return jax.block_until_ready(self.programs.init_state(data))

    def first_state(self) -> functions.State:
        """The same, of the initial parameters where there are any."""
        if self.initial is None:
            return self.init_state()
        initial, shapes = self.initial, tuple(self.programs.state_shapes[:2])
        begun = distributed.together(lambda: _placed(tuple(initial()), shapes))
        return self.programs.state_from(*begun)

    @property
    def saved_shapes(self) -> functions.State:
        """Shapes, dtypes and shardings of what a checkpoint holds."""
        return self.programs.state_shapes._replace(copy=None)

    def on_devices(self, state: functions.State) -> functions.State:
        """The state that the updates take, from one as in a checkpoint that all processes hold."""
        placed = _placed(state, self.saved_shapes)
        if self.programs.state_shapes.copy is None:
            return placed
        # Collectives of one program at a time: see `updates`.
        return jax.block_until_ready(self.programs.with_copy(placed))


def _placed(tree: PyTree, like: PyTree) -> PyTree:
    """Values where those that are like them lie; what is of one host is of every one.

    One is placed before the next is read.
    """

    def placed(leaf: Any, to: jax.ShapeDtypeStruct) -> jax.Array:
        if not isinstance(leaf, jax.Array):
            leaf = np.asarray(leaf)
        in_parts = not getattr(leaf, "is_fully_addressable", True)
        put = jax.device_put if in_parts else distributed.put
        return jax.block_until_ready(put(leaf, to.sharding))

    return jax.tree.map(placed, tree, like)
