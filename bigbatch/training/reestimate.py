"""Running statistics estimated anew from training data, for the parameters as they are now.

The running statistics of training trail behind the parameters, and know nothing of an average of
them. A few thousand examples give statistics of the present ones.
"""

import jax
from jax.sharding import NamedSharding

from bigbatch.engine.functions import REPLICATED, State
from bigbatch.engine.transformations import evaluation_params
from bigbatch.training import microbatches
from bigbatch.training.run import Run


def reestimate(run: Run, state: State) -> State:
    """The state with the mean statistics of the ghost batches of the run's first examples.

    The examples come in batches of the plan's last size: as many as `reestimate_examples` holds, or
    one. They go through the program `accumulate` of training, whose gradients are left aside, so
    that nothing more is compiled.

    Args:
      run: from `run.prepare`, with `reestimate_examples`.
      state: the state after some update; it is not changed.

    Returns:
      The state with the new running statistics; only for evaluation.
    """
    assert run.config.reestimate_examples is not None
    assert run.programs.mean_ghost_statistics is not None
    batch_size = int(run.plan.batch_sizes[-1])
    replicated = NamedSharding(run.mesh, REPLICATED)
    params = jax.device_put(evaluation_params(state.params, state.optimizer), replicated)
    accumulator = run.programs.empty_accumulator()
    batches = max(1, run.config.reestimate_examples // batch_size)
    addends = run.programs.addends(batches * batch_size)
    for batch in range(batches):
        for part in run.layout.microbatches(batch_size):
            first = batch * batch_size + part.offset_examples
            size, examples = run.microbatch(microbatches.Request(first, part))
            accumulator = run.programs.accumulate[size](
                state._replace(params=params), accumulator, examples, *addends
            )
            # Bounds what is in flight, here and where ghost batches span devices.
            jax.block_until_ready(accumulator)
    statistics = jax.block_until_ready(run.programs.mean_ghost_statistics(accumulator))
    return state._replace(running_statistics=statistics)
