"""Device memory: what programs need, the largest microbatch that fits, and one that did not."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from bigbatch import distributed
from bigbatch.errors import Problem, RunError, UserError

# Of a device's memory, for what the analysis of a program does not see: fragments, the runtime.
USED_SHARE = 0.9
MIB = 2**20


class OutOfMemoryError(RunError):
    """A device's memory has run out; what it was asked to compute was not begun."""


def exhausted(error: jax.errors.JaxRuntimeError, what: str, advice: str) -> OutOfMemoryError:
    """What to raise from the runtime's report that memory has run out.

    Args:
      error: of the runtime.
      what: does not fit, in words.
      advice: what to try.

    Raises:
      JaxRuntimeError: the same error, where it reports something else.
    """
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    first_line = str(error).strip().splitlines()[0]
    return OutOfMemoryError(
        f"{what} does not fit into a device's memory ({first_line}): {advice}. The same "
        "command continues from the newest checkpoint"
    )


def agreed(failure: OutOfMemoryError | None) -> bool:
    """Whether any process has run out of memory; all must call."""
    return any(distributed.gather(b"" if failure is None else b"1"))


def program_bytes(compiled: Any) -> int:
    """What a compiled program needs on each of its devices: arguments, results, temporaries.

    What it shares between arguments and results, by donation, counts once.
    """
    found = compiled.memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return int(held + found.temp_size_in_bytes)


def limit_bytes(mesh: Mesh, given: int | None) -> int:
    """The memory of each device that a run may use, the least over all devices and processes.

    Args:
      mesh: the devices.
      given: `device_memory_bytes` of the config; None: what the devices report.

    Raises:
      UserError: it is not given, and the devices (those of a CPU) report nothing.
    """
    own = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    if given is None:
        reported = [(device.memory_stats() or {}).get("bytes_limit") for device in own]
    found = given if given is not None else min((r or 0 for r in reported), default=0)
    if jax.process_count() > 1:
        # In MiB, as 32 bits do not hold it in bytes.
        everyone = multihost_utils.process_allgather(np.int32(found // MIB))
        found = int(np.min(everyone)) * MIB
    if found == 0:
        allowed = (
            'a number of bytes, as microbatch_examples_per_device = "auto" needs one and this '
            "kind of device reports none"
        )
        raise UserError(Problem("device_memory_bytes", given, allowed))
    return found


def largest_that_fits(
    needed_bytes: Callable[[int], int], *, unit: int, most: int, limit_bytes: int
) -> int:
    """The largest microbatch that fits, to within a sixteenth of it, by a few compilations.

    Memory grows nearly in proportion to the microbatch, so the next one to try lies on the line
    through the largest that fits and the smallest that does not.

    Args:
      needed_bytes: examples per device -> what a device then needs; compiles.
      unit: examples of which it must be a multiple.
      most: the most examples that are of use.
      limit_bytes: of a device.

    Raises:
      UserError: not even one unit fits.

    >>> largest_that_fits(lambda m: 100 + 3 * m, unit=32, most=10_000, limit_bytes=5_000)
    1440
    """
    allowed = int(limit_bytes * USED_SHARE)
    units = max(1, most // unit)
    needs = {n: needed_bytes(n * unit) for n in sorted({1, min(2, units)})}
    if needs[1] > allowed:
        problem = (
            f"at least {int(needs[1] / USED_SHARE) + 1:,} bytes: a microbatch of {unit} examples a "
            f"device needs {needs[1]:,}, and {1 - USED_SHARE:.0%} is kept free"
        )
        raise UserError(Problem("device_memory_bytes", limit_bytes, problem))
    fits = max(n for n, need in needs.items() if need <= allowed)
    too_much = min((n for n, need in needs.items() if need > allowed), default=units + 1)
    while too_much - fits > max(1, fits // 16):
        a, b = (fits, too_much) if too_much in needs else sorted(needs)[-2:]
        slope = (needs[b] - needs[a]) / (b - a)
        reach = units if slope <= 0 else a + int((allowed - needs[a]) / slope)
        if len(needs) > 2 and fits == b and reach < fits + max(1, fits // 16):
            break
        tried = min(max(reach, fits + 1), too_much - 1)
        needs[tried] = needed_bytes(tried * unit)
        if needs[tried] <= allowed:
            fits = tried
        else:
            too_much = tried
    return fits * unit


def smaller(examples_per_device: int, *, unit: int) -> int:
    """Half a microbatch, in whole units.

    Raises:
      RunError: one unit is all that it holds.
    """
    if examples_per_device <= unit:
        raise RunError(
            f"a microbatch of {examples_per_device} examples a device does not fit into its "
            f"memory, and it is one ghost or small batch, which is not cut. On several devices "
            "microbatch_examples_per_device may be a part of ghost_batch_examples (not with "
            "reproducible or where the noise is measured); or use a "
            'smaller network, bfloat16 or shard = "update"'
        )
    return examples_per_device // (2 * unit) * unit
