"""A whole run on all devices of all processes: `python -m tests.same_bits NAME SHARE [flags]`.

Prints a JSON object with the hash of the parameters, and one of everything: the state at the end,
and the sums of every update. The same for any devices and shares where the sums are reproducible.
"""

import argparse
import json

import jax

from bigbatch import distributed
from bigbatch.config import assemble
from bigbatch.config.config import read_config
from bigbatch.config.file import load_config
from bigbatch.training import loop as train
from bigbatch.workdir.packing import sha256 as params_sha256
from tests import trained

# The network of the paper on 8x8 images: 50 updates, 20 of 16 examples, 20 of 32 and 10 of 64.
WRN_16_4 = {
    "model": {"name": "wide_resnet", "depth": 16, "width": 4, "strides": [1, 2, 2]},
    "policy": {
        "name": "step_decay",
        "learning_rate": 0.05,
        "batch_size": 16,
        "momentum": 0.9,
        "boundaries_epochs": [0.22, 0.66],
        "factor": 0.5,
    },
    "transformations": [{"name": "grow_batch", "max_batch_size": 64}],
    "ghost_batch_examples": 8,
    "epochs": 1.1,
}


def tree(name: str) -> dict:
    """The fields of a run."""
    if name == "digits":
        return load_config("configs/digits.py:increase").tree
    return trained.tree(**WRN_16_4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["digits", "wrn_16_4"])
    parser.add_argument("share", type=int, help="microbatch examples per device")
    parser.add_argument("--plain", action="store_true", help="sums that are not reproducible")
    parser.add_argument("--processes", nargs=3, metavar=("COORDINATOR", "COUNT", "PROCESS"))
    parser.add_argument("--updates", type=int, help="only so many")
    options = parser.parse_args()
    if options.processes:
        # Whoever waits long for a processor is not gone.
        distributed.HEARTBEAT_TIMEOUT_S = 3600
        coordinator, count, process = options.processes
        distributed.start(coordinator, int(count), int(process))
    fields = tree(options.name) | {
        "microbatch_examples_per_device": options.share,
        "reproducible": not options.plain,
    }
    config = read_config(fields)
    prepared = assemble.prepared(config)
    last = min(options.updates or config.plan.num_updates, config.plan.num_updates)
    history = []
    updates = train.updates(prepared, prepared.init_state(), 0)
    for row, state, sums in updates:  # noqa: B007 - the last one is the result
        del sums["input_wait_s"]
        history.append(jax.device_get(sums))
        if row.update + 1 == last:
            break
    state = jax.device_get(state)
    report = {
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "batch_sizes": sorted({int(row["count"]) for row in history}),
        "updates": len(history),
        "loss": float(history[-1]["loss"] / history[-1]["count"]),
        "params_sha256": params_sha256(state.params),
        "sha256": params_sha256((state, history)),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
