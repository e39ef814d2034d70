"""One of the processes of a run in parts: `python -m tests.layer_process OUT SHARD ADDRESS N I`.

Trains the network of `test_parts` in float64, then with exact sums, and writes the state, a hash
and what was measured.
"""

import json
import sys

import jax
import numpy as np

from bigbatch import distributed
from bigbatch.workdir.packing import sha256
from tests.test_layers import on_host_after


def main(out: str, shard: str, *processes: str) -> None:
    distributed.start(processes[0], *map(int, processes[1:]))
    with jax.enable_x64(True):
        state, loss = on_host_after(json.loads(shard))
        exact, exact_loss = on_host_after(json.loads(shard), reproducible=True)
    np.savez(f"{out}.npz", loss, exact_loss, *jax.tree.leaves(state))
    with open(f"{out}.txt", "w") as file:
        file.write(sha256(exact))


if __name__ == "__main__":
    main(*sys.argv[1:])
