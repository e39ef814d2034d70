"""A run's programs on devices that are not there, for `bigbatch plan --compile-for`.

What compilers say of them stands beside a bound: no device of that kind is faster than its peaks.
The bound of a program is the longer of two times: of its model's floating-point operations at the
chip's peak, and of its arguments and results, which must be read and written once, at the bandwidth
of the chip's memory (save what a cache may hold).
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from bigbatch.commands.compile.chips import Target
from bigbatch.commands.plan import aligned
from bigbatch.errors import Problem, RunError, UserError

# The child asks no cloud what it runs on, and lets others hold the compiler of TPUs.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "0",
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
}
_CHILD = [sys.executable, "-m", "bigbatch.commands.compile.child"]
_MIB = 2**20
_HEAD = ["program", "examples a device", "collectives", "MiB", "GFLOP an example", "kernels"]
_HEAD += ["products", "reductions", "copies", "transposes"]


def compiled(config: str, overrides: Any, asked: Target) -> dict[str, Any]:
    """What `compile.child` finds, in a process of its own; says on standard error what it does.

    Args:
      config: the config file, as the command was given it.
      overrides: of its fields.
      asked: the devices.

    Returns:
      Plain values, with the bounds of each program.

    Raises:
      UserError: the child has found mistakes.
      RunError: it has ended otherwise.
    """
    request = json.dumps({"config": config, "overrides": overrides, "target": asked.asked})
    answer: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": said, "text": True}
        environment = os.environ | _ENVIRONMENT
        with subprocess.Popen([*_CHILD, request], env=environment, **pipes) as child:
            for line in child.stdout or ():
                # Compilers write there too.
                answer = json.loads(line) if line.startswith('{"') else answer
                if "line" in answer:
                    print(answer["line"], file=sys.stderr, flush=True)
        said.seek(0)
        words = [line.strip() for line in said if line.strip()] or ["it has said nothing"]
    if "problems" in answer:
        raise UserError(Problem(*problem) for problem in answer["problems"])
    if "result" not in answer:
        ended = f"the process of the compiler ended with status {child.returncode}"
        raise RunError(f"{ended} ({words[-1]})")
    return judged(answer["result"], asked)


def judged(result: dict[str, Any], asked: Target) -> dict[str, Any]:
    """What the child has found, with the bounds of each program that fits."""
    result["peaks"] = asked.chip._asdict()
    for program in result["programs"]:
        if not program["refused"]:
            program |= _bounds(program, asked)
    return result


def _bounds(program: Mapping[str, Any], asked: Target) -> dict[str, Any]:
    """Of one call on one device: no chip takes less; and what XLA's own bytes would take."""
    chip, memory = asked.chip, program["memory"]
    narrow = any(kind not in ("f32", "f64", "unknown") for kind in program["products"])
    flops_s = chip.bf16_flops_s if narrow else chip.float32_flops_s
    compute_s = program["flops"] / flops_s * chip.devices
    passed = memory["argument_size_in_bytes"] + memory["output_size_in_bytes"]
    memory_s = max(0, passed - chip.cache_bytes) / chip.memory_bytes_s * chip.devices
    return {
        "bound_s": max(compute_s, memory_s),
        "bound_by": "operations" if compute_s > memory_s else "memory",
        "estimate_s": max(compute_s, program["bytes"] / chip.memory_bytes_s * chip.devices),
    }


def bounds(found: Mapping[str, Any], asked: Target) -> dict[str, float]:
    """The bounds as `time_model.Speeds` takes them; empty where something does not fit."""
    *accumulates, applied, _ = found["programs"]
    fit = [p["examples_per_device"] / p["bound_s"] for p in accumulates if not p["refused"]]
    if not fit or applied["refused"]:
        return {}
    sent_bytes_s = asked.chip.sent_bytes_s / asked.chip.devices
    # What an update reads and writes may be hidden behind what it sends.
    reduced_bytes = sum(each["bytes"] for each in applied["collectives"])
    sent_s = 2 * (asked.devices - 1) / asked.devices * reduced_bytes / sent_bytes_s
    return {
        "examples_per_s": max(fit),
        "update_s": max(0.0, applied["bound_s"] - sent_s),
        "allreduce_gbps": sent_bytes_s * 8 / 1e9,
    }


def text(found: Mapping[str, Any], asked: Target) -> str:
    """The programs as a table, and the bounds in words."""
    chip, limit, hosts = asked.chip, found["device_memory_bytes"] / _MIB, found["hosts"]
    each = " or ".join(map(str, sorted({len(host["places"]) for host in hosts})))
    slices = f"{asked.slices} slices with " if asked.slices > 1 else ""
    at = [f"{','.join(map(str, place))}" for place in hosts[0]["chips"] if place]
    lines = [
        f"compiled for {asked.asked}: {found['devices']:,} devices ({found['device_kind']}) of "
        f"{limit:,.0f} MiB on {slices}{len(hosts):,} host{'s' * (len(hosts) > 1)}, {each} on each"
        f"{' (on the first ' * bool(at)}{' '.join(at)}{')' * bool(at)}; nothing was run:",
        "",
        *aligned([_HEAD, *map(_row, found["programs"])]),
        "",
        f"shard {found['shard']}; held on a device all the time, MiB: "
        + ", ".join(f"{name} {size / _MIB:,.4g}" for name, size in found["held_bytes"].items()),
    ]
    if largest := found["largest_examples_per_device"]:
        lines.append(
            f"microbatches of {largest:,} examples a device just fit: some of at most a tenth more "
            'were compiled and do not; "auto" keeps a tenth of the memory free, and room for a '
            "checkpoint and the input"
        )
    peak = f"{chip.bf16_flops_s / 1e12:g} TFLOP/s and {chip.memory_bytes_s / 1e9:g} GB/s"
    for program in found["programs"]:
        if program["name"] != "accumulate" or program["refused"]:
            continue
        if found["shard"] not in ("none", "update"):
            lines.append(f"every microbatch moves parameters: {_collectives(program)}")
        elif program["collectives"]:
            lines.append(
                f"warning: every microbatch waits for other devices: {_collectives(program)}. "
                "Ghost batches that devices share take them; else the task does"
            )
        examples = program["examples_per_device"]
        rate, guess = (examples * chip.devices / program[n] for n in ("bound_s", "estimate_s"))
        lines.append(
            f"bound: with {examples} examples a device no chip of {peak} computes more than "
            f"{rate:,.5g} examples/s ({program['bound_by']}); an estimate by the bytes of XLA's "
            f"operations, {program['bytes'] / _MIB:,.5g} MiB a call: {guess:,.5g}"
        )
    return "\n".join([*lines, f"peaks: {chip.source}"])


def _row(program: Mapping[str, Any]) -> list[str]:
    examples = program.get("examples_per_device")
    head = [program["name"], f"{examples:,}" if examples else ""]
    if program["refused"]:
        return [*head, "", "refused", *[""] * (len(_HEAD) - 4)]
    return [
        *head,
        _collectives(program),
        f"{program['needed_bytes'] / _MIB:,.4g}",
        f"{program['flops'] / examples / 1e9:.4g}" if examples else "",
        f"{program['kernels']:,}",
        ", ".join(f"{count} {kind}" for kind, count in sorted(program["products"].items())),
        f"{program['reductions']:,}",
        *(
            f"{move['count']:,} of {move['bytes'] / _MIB:,.3g} MiB"
            for move in (program["copies"], program["transposes"])
        ),
    ]


def _collectives(program: Mapping[str, Any]) -> str:
    found = (
        f"{each['count']} {each['kind']} of {each['bytes'] / _MIB:,.4g} MiB in {each['groups']}"
        + ("" if each["trips"] == 1 else f" ({each['trips'] or 'some'} times)")
        for each in program["collectives"]
    )
    return ", ".join(found) or "none"


def misfits(found: Mapping[str, Any]) -> list[Problem]:
    """What does not fit into a device's memory."""
    problems, limit = [], found["device_memory_bytes"]
    for program in found["programs"]:
        if not program["refused"] and program["needed_bytes"] <= limit:
            continue
        why = program["refused"] or f"it needs {program['needed_bytes'] / _MIB:,.0f}"
        allowed = (
            f"what fits into the {limit / _MIB:,.0f} MiB of a {found['target']} device ({why})"
        )
        field, given = program["name"], program.get("examples_per_device", "as it is")
        if program["name"] == "accumulate":
            field = "microbatch_examples_per_device"
        problems.append(Problem(field, given, allowed))
    return problems
