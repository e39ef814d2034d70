"""The process that compiles for described devices: `python -m bigbatch.commands.compile.child`.

A compiler of TPUs keeps others of this machine away, and takes what it is to do from the
environment: so it has a process of its own. A request comes in as JSON; JSON lines go out, first
those that say what is being done, at last the result or the mistakes.
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
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
from jax.experimental import topologies

from bigbatch.commands.bench import stand_ins
from bigbatch.commands.compile import read
from bigbatch.commands.compile.chips import Target, target
from bigbatch.config.assemble import prepared
from bigbatch.config.file import load_config
from bigbatch.engine.functions import data_mesh
from bigbatch.errors import Problem, UserError
from bigbatch.layout.memory import program_bytes

# Of what is kept: another number where what is read of a program changes.
_VERSION = 1
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_REFUSED_BYTES = re.compile(r"(?:\(|[Uu]sed )([\d.]+)([KMGT])")
# What of a program nobody waits for.
_ASIDE = ("init_state", "divide", "unite")


class Program:
    """What is known of a program, in its place.

    Attributes:
      facts: plain values, of `Compiling`.
    """

    def __init__(self, facts: Mapping[str, Any]):
        self.facts = facts

    def memory_analysis(self) -> SimpleNamespace:
        """As of a compiled program, for `memory.program_bytes`."""
        return SimpleNamespace(**self.facts["memory"])


class Compiling:
    """The compiler of `training.programs` for described devices: gives a `Program` for each.

    Args:
      asked: the devices.
      version: of the compiler.
      say: is told what is being done.
    """

    def __init__(self, asked: Target, version: str, say: Callable[[str], None]):
        self._asked, self._version, self._say = asked, version, say
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        self._kept = Path(home) / "bigbatch" / "described"

    def __call__(self, name: str, traced: Any, lowered: Any) -> Program | None:
        """Compiles a program, or reads what is kept of it."""
        if name in _ASIDE:
            return None
        flags = os.environ.get("XLA_FLAGS", ""), os.environ.get("LIBTPU_INIT_ARGS", "")
        place = self._asked._replace(asked="", chip=None)
        told = json.dumps([_VERSION, self._version, place, flags, lowered.as_text()])
        fingerprint = hashlib.sha256(told.encode()).hexdigest()[:32]
        kept = self._kept / f"{fingerprint}.json"
        with contextlib.suppress(OSError, ValueError):
            return Program(json.loads(kept.read_text("utf-8")))
        self._say(f"compiling {name} for {self._asked.asked} ...")
        start_s = time.perf_counter()
        facts = {
            "name": name.split()[0],
            "fingerprint": fingerprint,
            "flops": read.model_flops(traced.jaxpr),
            **_compiled(lowered),
            "compilation_s": round(time.perf_counter() - start_s, 1),
        }
        self._say(f"compiled {name} in {facts['compilation_s']:.0f} s")
        with contextlib.suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            whole = kept.with_suffix(f".{os.getpid()}")
            whole.write_text(json.dumps(facts), "utf-8")
            whole.replace(kept)
        return Program(facts)


def _compiled(lowered: Any) -> dict[str, Any]:
    """What the compiler makes of a lowered program, or why it refuses."""
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refused = str(error).splitlines()[0].partition(": ")[2]
        found = _REFUSED_BYTES.search(refused)
        needed = int(float(found[1]) * _UNITS[found[2]]) if found else sys.maxsize
        names = ("argument", "output", "alias", "temp")
        memory = {f"{name}_size_in_bytes": needed * (name == "temp") for name in names}
        return {"refused": refused, "memory": memory}
    text = program.as_text()
    analysis = program.memory_analysis()
    names = [name for name in dir(analysis) if re.fullmatch(r"(?!host)\w+_size_in_bytes", name)]
    cost = None
    # Compilers of cards that are not there do not estimate.
    with contextlib.suppress(jax.errors.JaxRuntimeError, NotImplementedError):
        cost = program.cost_analysis()
    facts = {
        "refused": None,
        "memory": {name: getattr(analysis, name) for name in names},
        "collectives": read.collectives(text),
        **read.operations(text),
    }
    if cost:
        facts |= {"xla_flops": cost.get("flops"), "bytes": cost.get("bytes accessed")}
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
    elif asked.slices > 1:
        options["num_slices"] = asked.slices
    try:
        found = topologies.get_topology_desc(platform=asked.chip.platform, **options)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        allowed = f"a topology that its compiler knows ({str(error).splitlines()[0]})"
        raise UserError(Problem("compile-for", asked.asked, allowed)) from error
    return found.devices, f"{jax.__version__} {found.devices[0].client.platform_version}"


def compiled(request: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """The programs of a config's run on described devices, as plain values.

    Args:
      request: `config`, `overrides`, `target`, as the command was given them.
      say: is told what is being done.
    """
    asked = target(request["target"])
    config = load_config(request["config"], request["overrides"])
    devices, version = described(asked)
    given = config.device_memory_bytes or asked.chip.memory_bytes // asked.chip.devices
    run = prepared(
        config,
        **stand_ins(config, 2),
        mesh=data_mesh(devices),
        device_memory_bytes=given,
        compiler=Compiling(asked, version, say),
    )
    accumulates = [
        {**program.facts, "examples_per_device": size // len(devices)}
        for size, program in run.programs.accumulate.items()
    ]
    others = [run.programs.apply_update, run.programs.evaluate]
    programs = [*accumulates, *[program.facts for program in others]]
    hosts: dict[tuple[int, int], int] = {}
    for device in devices:
        host = getattr(device, "slice_index", None) or 0, device.process_index
        hosts[host] = hosts.get(host, 0) + 1
    return {
        "target": asked.asked,
        "compiler": version,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "hosts": len(hosts),
        "devices_per_host": sorted(set(hosts.values())),
        "microbatch_examples_per_device": run.microbatch_examples_per_device,
        "device_memory_bytes": given,
        "programs": [
            {**facts, "needed_bytes": program_bytes(Program(facts))} for facts in programs
        ],
    }


def _tell(**values: Any) -> None:
    print(json.dumps(values, default=str), flush=True)


def main() -> None:
    """Reads one request and answers."""
    try:
        _tell(result=compiled(json.load(sys.stdin), lambda text: _tell(line=text)))
    except UserError as error:
        _tell(problems=[dataclasses.astuple(problem) for problem in error.problems])


if __name__ == "__main__":
    main()
