"""What is trained: a model, a loss and how they read the examples, as pure functions.

The compiled functions of `bigbatch.engine.functions` know a `Task`, and nothing of networks or data
sets. Whatever is written as one is trained like every other.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from bigbatch.noise.sums import wide

PyTree = Any
Sums = dict[str, jax.Array]
Examples = Mapping[str, jax.Array]

COUNT = "count"
"""The sum by which the loss and the metrics are divided."""


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A model and its loss on plain pytrees.

    Three numbers are kept apart: the *examples* of an update (positions of the stream, the batch
    size, what the noise is counted in), the *count* that a loss is divided by (for instance
    unmasked tokens), and tokens, a unit of time.

    Attributes:
      init: key -> (parameters, running statistics); `{}` where there are none.
      apply: (parameters, running statistics, examples, train) -> (outputs, ghost statistics), and
        a fifth argument, `frozen`, where there is any. In training every leaf [ghost batches, ...]
        of the ghost statistics stands beside a leaf [...] of the running statistics; in evaluation
        the ghost statistics are not looked at. `examples["ghost_mask"]`, in training only, has an
        entry for each ghost batch.
      loss: (outputs, examples) -> sums over the examples, each times its `examples["weight"]`:
        scalars by name, `count` and `minimised` among them.
      running_decay: factor by which the running statistics fade with each ghost batch: one number,
        or a tree of them like the running statistics.
      metrics: what is shown of the sums beside the loss: name -> the sum that is divided by
        `count`, or a function of all the quotients by the sums' names. None: every other sum,
        under its own name.
      minimised: the sum that is minimised, divided by `count`.
      takes_keys: whether `apply` reads `examples["key"]` in training, uint32[examples, 2]: random
        words of each example's position, so of its epoch too, whatever computes it.
      frozen: arrays that `apply` reads and nothing changes: not differentiated, not summed, unknown
        to the optimizer, and in no checkpoint.
      shares_ghost_batches: whether `apply` can form the statistics of a ghost batch of which a
        device sees a part only, along the mesh axis `data`.
      is_tested: whether the task is known to keep all this, as the package's own are; then it is
        not tried before a run.
      for_examples: makes the task from the shapes of one microbatch's examples, where it depends on
        them; then `init` and what comes after it are those of the result.
      computes_with: shapes and dtypes of the parameters as `apply` turns them into first of all,
        where those of `init` are masters of more precision; None: those of `init`.
    """

    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    apply: Callable[..., tuple[PyTree, PyTree]]
    loss: Callable[[PyTree, Examples], Sums]
    running_decay: Any = 0.9
    metrics: Mapping[str, str | Callable[[Mapping[str, float]], float]] | None = None
    minimised: str = "loss"
    takes_keys: bool = False
    frozen: PyTree = ()
    shares_ghost_batches: bool = True
    is_tested: bool = False
    for_examples: Callable[[Mapping[str, jax.ShapeDtypeStruct]], "Task"] | None = None
    computes_with: PyTree = None

    @staticmethod
    def from_nnx(
        make_model: Callable[..., Any], loss: Callable[..., Sums], **options: Any
    ) -> "Task":
        """A task from a Flax NNX module; see `bigbatch.engine.flax_modules.from_nnx`."""
        from bigbatch.engine import flax_modules

        return flax_modules.from_nnx(make_model, loss, **options)

    @staticmethod
    def from_linen(module: Any, loss: Callable[..., Sums], **options: Any) -> "Task":
        """A task from a Flax Linen module; see `bigbatch.engine.flax_modules.from_linen`."""
        from bigbatch.engine import flax_modules

        return flax_modules.from_linen(module, loss, **options)

    def apply_to(
        self, params: PyTree, statistics: PyTree, examples: Examples, train: bool, frozen: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Calls `apply`, with the frozen arrays where there are any."""
        has_frozen = bool(jax.tree.leaves(frozen))
        return self.apply(params, statistics, examples, train, *[frozen] * has_frozen)

    def quotients(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """The loss and the metrics, by the names under which they are shown.

        Args:
          sums: what the loss returned, summed over some examples.

        Returns:
          `loss` first, the mean of what is minimised; then the metrics.
        """
        count = float(sums[COUNT])
        means = {name: float(value) / count for name, value in sums.items() if name != COUNT}
        shown = {"loss": means[self.minimised]}
        for name, metric in self.shown_metrics(means).items():
            shown[name] = means[metric] if isinstance(metric, str) else float(metric(means))
        return shown

    def shown_metrics(self, sum_names: Iterable[str]) -> Mapping[str, Any]:
        """The metrics by the names under which they are shown, the main one first."""
        if self.metrics is not None:
            return self.metrics
        return {name: name for name in sum_names if name not in (self.minimised, "loss", COUNT)}


def with_float32_masters(task: Task, params: PyTree) -> Task:
    """The task with parameters in float32 at least, which computes with them in their own dtype.

    Args:
      task: from whose `init` the parameters come.
      params: their shapes and dtypes.
    """

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
        params, statistics = task.init(key)
        return jax.tree.map(wide, params), statistics

    def apply(masters: PyTree, *rest: Any) -> tuple[PyTree, PyTree]:
        own = jax.tree.map(lambda master, like: master.astype(like.dtype), masters, params)
        return task.apply(own, *rest)

    return dataclasses.replace(task, init=init, apply=apply, computes_with=params)
