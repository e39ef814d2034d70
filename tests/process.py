"""One of the processes of a float64 run, for the tests: `python -m tests.process OUT [flags]`.

Trains 20 updates over a change of the batch size on all devices of all processes and writes the
parameters, the evaluation's sums and the collectives of the compiled programs. Before that, a
float32 run with `reproducible`, of which a hash is written.
"""

import json
import sys

import jax
import numpy as np

from bigbatch import distributed
from bigbatch.config import assemble
from bigbatch.engine import functions as step
from bigbatch.training import evaluate
from bigbatch.training import loop as train
from bigbatch.workdir import packing
from bigbatch.workdir.packing import sha256 as params_sha256
from tests import trained
from tests.hlo import collectives
from tests.test_reproducible import small_run


def main(out: str, coordinator: str = "", num_processes: str = "1", process: str = "0") -> None:
    if coordinator:
        distributed.start(coordinator, int(num_processes), int(process))
    # Several processes hold the state in parts.
    shard = "update" if coordinator else "none"
    exact = small_run(step.data_mesh(), 24, shard=shard)
    *_, (_, exact_state, _) = train.updates(exact, exact.init_state(), 0)
    jax.config.update("jax_enable_x64", True)
    config = trained.quick("float64", evaluation_batch_examples=112, shard=shard)
    prepared = assemble.prepared(config)
    *_, (_, state, _) = train.updates(prepared, prepared.init_state(), 0)
    # 360 examples, in microbatches of 112: the last leaves whole processes without examples.
    test = {"image": prepared.data.test.images, "label": prepared.data.test.labels}
    sums = evaluate.sums(prepared, state, test)
    programs = prepared.programs
    found = {
        "sums": sums,
        "devices": prepared.mesh.size,
        "processes": jax.process_count(),
        "sha256": params_sha256(state.params),
        "reproducible_sha256": params_sha256(exact_state.params),
        "reproducible_apply_update": collectives(exact.programs.apply_update),
        "accumulate": [collectives(program) for program in programs.accumulate.values()],
        "apply_update": collectives(programs.apply_update),
        "evaluate": collectives(programs.evaluate),
    }
    with open(f"{out}.{jax.process_index()}.json", "w") as file:
        json.dump(found, file)
    np.savez(f"{out}.{jax.process_index()}.npz", *map(packing.on_host, jax.tree.leaves(state[:2])))


if __name__ == "__main__":
    main(*sys.argv[1:])
