"""Memory: of a large update and of one microbatch; what "auto" finds; what happens without enough.

The process may use a tenth of the card, so that what does not fit is small and soon found.
"""

import os
import resource
from collections.abc import Iterator
from typing import Any

import jax

from bigbatch.training.updates import updates
from tests import trained
from tests.accelerator import runs

_SHARE = "XLA_PYTHON_CLIENT_MEM_FRACTION"
_MICROBATCH = "microbatch_examples_per_device"


def rows(toy: bool, _: str) -> Iterator[dict[str, Any]]:
    """What was done, and the memory or the examples that it took."""
    # Read where the first device is asked for.
    os.environ.update({} if toy else {_SHARE: "0.1"})
    reference, size, large = ("digits", 32, 512) if toy else ("cifar10", 1024, 65_536)
    reference = f"configs/{reference}.py:decay"
    own: dict[str, Any] = {"ghost_batch_examples": size if toy else 128}
    own |= {} if toy else {"model.dtype": "bfloat16"}
    run = runs.run_of(reference, own | {_MICROBATCH: size}, [size, large])
    for row, state, _ in updates(run, run.first_state(), 0):
        jax.block_until_ready(state)
        what = f"peak so far, after an update of {row.batch_size:,} by {size:,}"
        yield {"what": what, "MiB": _peak_bytes() / 2**20}
    del run, state
    found = own | {_MICROBATCH: "auto"} | ({"device_memory_bytes": 2**25} if toy else {})
    unit = own["ghost_batch_examples"]
    auto = runs.run_of(reference, found, [large]).microbatch_examples_per_device
    yield {"what": "auto", "examples a call": auto, "runs": True}
    for percent in (105, 110, 115, 120, 130, 150, 200):
        more = -(-auto * percent // (100 * unit)) * unit
        ran = _runs(reference, own, more)
        yield {"what": f"{percent} % of it", "examples a call": more, "runs": ran}
        if toy or not ran:
            break
    too_many = min(large, 8 * auto)
    run = runs.run_of(reference, own | {_MICROBATCH: too_many}, [large])
    run = trained.failing(run, lambda examples: examples > auto) if toy else run
    smaller: list[int] = []

    def use(run: Any, _: Any) -> None:
        smaller.append(run.microbatch_examples_per_device)

    done = [row.batch_size for row, *_ in updates(run, run.first_state(), 0, use=use)]
    what = f"out of memory with {too_many:,}, then {', '.join(map(str, smaller)) or 'nothing'}"
    yield {"what": what, "runs": bool(smaller) and done == [large]}


def _runs(reference: str, own: dict[str, Any], size: int) -> bool:
    """Whether an update of one call of so many examples fits."""
    try:
        runs.bare(runs.run_of(reference, own, [size]))(1)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return False
    return True


def _peak_bytes() -> int:
    """The most that was in use on the device; on a CPU the process's resident memory."""
    found = jax.devices()[0].memory_stats() or {}
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(found.get("peak_bytes_in_use", resident))
