"""The process that compiles for described devices: `python -m bigbatch.commands.compile.child`.

A compiler of TPUs keeps others of this machine away, and takes what it is to do from the
environment: so it has a process of its own. Its argument is a request as JSON; JSON lines go out,
first those that say what is being done, at last the result or the mistakes.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies

from bigbatch.commands.bench import stand_ins
from bigbatch.commands.compile import read
from bigbatch.commands.compile.chips import Target, target
from bigbatch.config.assemble import prepared
from bigbatch.config.file import load_config
from bigbatch.engine.functions import data_mesh
from bigbatch.engine.parts import named
from bigbatch.errors import Problem, UserError
from bigbatch.layout.memory import program_bytes
from bigbatch.places.caches import cache_directory
from bigbatch.places.replacing import replacing
from bigbatch.training.programs import held_bytes

# Of what is kept: another number where what is read of a program changes.
_VERSION = 4
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZES = [f"{name}_size_in_bytes" for name in ("argument", "output", "alias", "temp")]
_ESTIMATES = {"xla_flops": "flops", "bytes": "bytes accessed"}
_REFUSED_BYTES = re.compile(r"(?:\(|[Uu]sed )([\d.]+)([KMGT])")
# What of a program nobody waits for.
_ASIDE = ("init_state",)


class Program(NamedTuple):
    """What is known of a program, in its place."""

    facts: Mapping[str, Any]

    def memory_analysis(self) -> SimpleNamespace:
        """As of a compiled program, for `memory.program_bytes`."""
        return SimpleNamespace(**self.facts["memory"])


@dataclasses.dataclass(frozen=True, eq=False)
class Compiling:
    """The compiler of `training.programs` for described devices: gives a `Program` for each.

    Attributes:
      asked: the devices.
      version: of the compiler.
      say: is told what is being done.
      made: all programs so far, by name.
    """

    asked: Target
    version: str
    say: Callable[[str], None]
    made: dict[str, Program]

    def __call__(
        self, name: str, traced: Any, lowered: Any, options: Mapping[str, Any]
    ) -> Program | None:
        """Compiles a program, or reads what is kept of it."""
        if name in _ASIDE:
            return None
        self.made[name] = Program(self._facts(name, traced, lowered, options))
        return self.made[name]

    def _facts(
        self, name: str, traced: Any, lowered: Any, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        place = [self.asked.topology, self.asked.slices, self.asked.card]
        flags = [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
        told = json.dumps([_VERSION, self.version, place, flags, options, lowered.as_text()])
        fingerprint = hashlib.sha256(told.encode()).hexdigest()[:32]
        cache = cache_directory("described")
        kept = cache and cache / f"{fingerprint}.json"
        if kept:
            with contextlib.suppress(OSError, ValueError):
                return dict(json.loads(kept.read_text("utf-8")))
        self.say(f"compiling {name} for {self.asked.asked} ...")
        start_s = time.perf_counter()
        facts = {"name": name.split()[0], "fingerprint": fingerprint, **_compiled(lowered, options)}
        facts |= {"flops": read.model_flops(traced.jaxpr)}
        facts |= {"compilation_s": round(time.perf_counter() - start_s, 1)}
        self.say(f"compiled {name} in {facts['compilation_s']:.0f} s")
        if kept:
            with contextlib.suppress(OSError):
                kept.parent.mkdir(parents=True, exist_ok=True)
                with replacing(kept) as file:
                    file.write(json.dumps(facts).encode())
        return facts


def _compiled(lowered: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the compiler makes of a lowered program, or why it refuses."""
    try:
        program = lowered.compile(dict(options))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refused = str(error).splitlines()[0].partition(": ")[2]
        found = _REFUSED_BYTES.search(refused)
        needed = int(float(found[1]) * _UNITS[found[2]]) if found else sys.maxsize
        return {"refused": refused, "memory": {**dict.fromkeys(_SIZES, 0), _SIZES[-1]: needed}}
    text, analysis = program.as_text(), program.memory_analysis()
    memory = {name: getattr(analysis, name) for name in _SIZES}
    facts = {"refused": None, "memory": memory, "collectives": read.collectives(text)}
    facts |= read.operations(text)
    # Compilers of cards that are not there do not estimate.
    with contextlib.suppress(jax.errors.JaxRuntimeError, NotImplementedError):
        cost = program.cost_analysis() or {}
        facts |= {name: cost[key] for name, key in _ESTIMATES.items() if key in cost}
    return facts


def described(asked: Target) -> tuple[list[Any], str]:
    """The devices that a target describes, and their compiler's version.

    Raises:
      UserError: there are no such.
    """
    options: dict[str, Any] = {"topology_name": asked.topology}
    if asked.card is not None:
        options = {"topology_name": "card", "topology": asked.topology}
        options["target_config"] = asked.card
    if asked.chip.cores:
        options["chip_config_name"] = asked.chip.cores
    if asked.slices > 1:
        options["num_slices"] = asked.slices
    if asked.devices == asked.chip.devices and asked.card is None:
        # Of one chip: the default host of TPUs has more.
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        found = topologies.get_topology_desc(platform=asked.chip.platform, **options)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        allowed = f"a topology that its compiler knows ({str(error).splitlines()[0]})"
        raise UserError(Problem("compile-for", asked.asked, allowed)) from error
    devices: list[Any] = found.devices
    return devices, f"{jax.__version__} {devices[0].client.platform_version}"


def compiled(request: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """The programs of a config's run on described devices, as plain values.

    Args:
      request: `config`, `overrides`, `target`, as the command was given them.
      say: is told what is being done.
    """
    asked = target(request["target"])
    config = load_config(request["config"], request["overrides"])
    devices, version = described(asked)
    given = config.device_memory_bytes or int(asked.chip.memory_bytes / asked.chip.devices)
    compiler = Compiling(asked, version, say, {})
    run = prepared(
        config,
        **stand_ins(config, 2),
        mesh=data_mesh(devices),
        device_memory_bytes=given,
        compiler=compiler,
    )
    made: Any = run.programs
    programs = [
        {**program.facts, "examples_per_device": size // len(devices)}
        for size, program in made.accumulate.items()
    ]
    programs += [made.apply_update.facts, made.evaluate.facts]
    largest = None
    if config.microbatch_examples_per_device == "auto":
        largest = _largest(run, compiler.made, given)
    state = made.state_shapes.params, made.state_shapes.running_statistics
    held = held_bytes(run.task, run.optimizer, state, run.mesh, made.reproducible, made.shard)
    hosts: dict[tuple[int, int], list[Any]] = {}
    for place, each in enumerate(run.mesh.devices.flat):
        host = getattr(each, "slice_index", None) or 0, each.process_index
        hosts.setdefault(host, []).append((place, getattr(each, "coords", None)))
    return {
        "target": asked.asked,
        "compiler": version,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "hosts": [
            {"slice": host[0], "places": [n for n, _ in held], "chips": [at for _, at in held]}
            for host, held in hosts.items()
        ],
        "microbatch_examples_per_device": run.microbatch_examples_per_device,
        "largest_examples_per_device": largest,
        "device_memory_bytes": given,
        "held_bytes": {name: size for name, size in held.items() if size},
        "shard": named(made.shard),
        "programs": [{**each, "needed_bytes": program_bytes(Program(each))} for each in programs],
    }


def _largest(run: Any, made: Mapping[str, Program], limit_bytes: int) -> int | None:
    """The largest microbatch of a device that fits, where several were compiled to find one.

    It is compiled, and so is one, at most a tenth larger, that does not fit. None where a device's
    share of the plan's largest update fits, as nothing larger is ever computed. The line through
    the largest so far and one of half of it or less says where to begin: memory is no line. What a
    compiler refuses takes it seconds.
    """
    devices, unit = run.mesh.size, run.unit_examples
    sizes = run.controller.likely_batch_sizes if run.controller else run.plan.batch_sizes
    most = int(np.max(sizes))

    def program(examples: int) -> Program:
        name, call = f"accumulate {devices * examples}", devices * examples
        if name not in made:
            # As many calls an update as the run has, or its sums may be others.
            same = np.array([-(-most // call) * call])
            run.again(microbatch_examples_per_device=examples, batch_sizes=same)
        return made[name]

    def fits(examples: int) -> bool:
        found = program(examples)
        return not found.facts["refused"] and program_bytes(found) <= limit_bytes

    def tenth(examples: int) -> int:
        return int(max(unit, examples // 10 // unit * unit))

    known = [int(name.split()[1]) // devices for name in made if name.startswith("accumulate")]
    known, share = sorted(filter(fits, known)), -(-most // (devices * unit)) * unit
    if len(known) < 2 or known[-1] >= share:
        return None
    low, high, step = known[-1], None, tenth(known[-1])
    few = max((size for size in known if 2 * size <= low), default=known[0])
    needed = [program_bytes(program(size)) for size in (few, low)]
    room = (limit_bytes - needed[1]) * (low - few) / max(needed[1] - needed[0], 1)
    asked = low + min(max(unit, int(room) // unit * unit), low)
    while high is None or high - low > tenth(low):
        asked = min(asked, share)
        if not fits(asked):
            high = asked
        elif asked == share:
            return None
        else:
            low = asked
        if high is None:
            asked, step = low + step, 2 * step
        else:
            asked = low + max(unit, (high - low) // 2 // unit * unit)
    return low


def _tell(**values: Any) -> None:
    # In one piece: several threads compile.
    sys.stdout.write(json.dumps(values, default=str) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Reads one request and answers."""
    try:
        _tell(result=compiled(json.loads(sys.argv[1]), lambda text: _tell(line=text)))
    except UserError as error:
        _tell(problems=[dataclasses.astuple(problem) for problem in error.problems])


if __name__ == "__main__":
    main()
