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
_MIB = 2**20
_HEAD = (
    "program",
    "examples a device",
    "collectives",
    "MiB",
    "GFLOP an example",
    "kernels",
    "products",
    "reductions",
    "copies",
    "transposes",
)


def compiled(config: str, overrides: Any, asked: Target) -> dict[str, Any]:
    """What `compile.child` finds, in a process of its own; says on standard error what it does.

    Args:
      config: the config file, as the command was given it.
      overrides: of its fields.
      asked: the devices.

    Returns:
      Plain values, with the bounds of each program added.

    Raises:
      UserError: the child has found mistakes.
      RunError: it has ended otherwise.
    """
    request = {"config": config, "overrides": overrides, "target": asked.asked}
    command = [sys.executable, "-m", "bigbatch.commands.compile.child"]
    answer: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        with subprocess.Popen(
            command,
            env={**os.environ, **_ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        ) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(json.dumps(request))
            child.stdin.close()
            for line in child.stdout:
                # Compilers write there too.
                answer = json.loads(line) if line.startswith('{"') else answer
                if "line" in answer:
                    print(answer["line"], file=sys.stderr, flush=True)
        said.seek(0)
        words = [line.strip() for line in said if line.strip()]
    if "problems" in answer:
        raise UserError(Problem(*problem) for problem in answer["problems"])
    if "result" not in answer:
        last = words[-1] if words else "it has said nothing"
        raise RunError(f"the process of the compiler ended with status {child.returncode} ({last})")
    return judged(answer["result"], asked)


def judged(result: dict[str, Any], asked: Target) -> dict[str, Any]:
    """What the child has found, with the bounds of each program."""
    result["peaks"] = asked.chip._asdict()
    for program in result["programs"]:
        program |= _bounds(program, asked)
    return result


def _bounds(program: Mapping[str, Any], asked: Target) -> dict[str, Any]:
    """Of one call on one device: no chip takes less; and what XLA's own bytes would take."""
    if program["refused"]:
        return {}
    chip, memory = asked.chip, program["memory"]
    narrow = any(kind not in ("f32", "f64", "unknown") for kind in program["products"])
    flops_s = chip.bf16_flops_s if narrow else chip.float32_flops_s
    compute_s = program["flops"] / flops_s * chip.devices
    passed = memory["argument_size_in_bytes"] + memory["output_size_in_bytes"]
    memory_s = max(0, passed - chip.cache_bytes) / chip.memory_bytes_s * chip.devices
    estimate_s = program["bytes"] / chip.memory_bytes_s * chip.devices
    return {
        "bound_s": max(compute_s, memory_s),
        "bound_by": "operations" if compute_s > memory_s else "memory",
        "estimate_s": max(compute_s, estimate_s),
    }


def bounds(found: Mapping[str, Any], asked: Target) -> dict[str, float]:
    """The bounds as `time_model.Speeds` takes them; empty where something does not fit."""
    accumulates = [p for p in found["programs"] if p["name"] == "accumulate" and not p["refused"]]
    applied = next(p for p in found["programs"] if p["name"] == "apply_update")
    if not accumulates or applied["refused"]:
        return {}
    rate = max(p["examples_per_device"] / p["bound_s"] for p in accumulates)
    sent_bytes_s = asked.chip.sent_bytes_s / asked.chip.devices
    # What an update reads and writes may be hidden behind what it sends.
    reduced = sum(each["bytes"] for each in applied["collectives"])
    sent_s = 2 * (asked.devices - 1) / asked.devices * reduced / sent_bytes_s
    return {
        "examples_per_s": rate,
        "update_s": max(0.0, applied["bound_s"] - sent_s),
        "allreduce_gbps": sent_bytes_s * 8 / 1e9,
    }


def text(found: Mapping[str, Any], asked: Target) -> str:
    """The programs as a table, and the bounds in words."""
    chip = asked.chip
    each = " or ".join(map(str, found["devices_per_host"]))
    rows = [_row(program) for program in found["programs"]]
    lines = [
        f"compiled for {asked.asked}: {found['devices']:,} devices ({found['device_kind']}) on "
        f"{found['hosts']:,} host{'s' * (found['hosts'] > 1)}, {each} on each; nothing was run. "
        f"A device has {found['device_memory_bytes'] / _MIB:,.0f} MiB:",
        "",
        *aligned([_HEAD, *rows]),
        "",
    ]
    for program in found["programs"]:
        if program["name"] != "accumulate" or program["refused"]:
            continue
        if program["collectives"]:
            waits = ", ".join(map(_collective, program["collectives"]))
            lines.append(
                f"warning: every microbatch waits for other devices: {waits}. Ghost batches that "
                "devices share take them; else the task does"
            )
        examples = program["examples_per_device"]
        rate, guess = (examples * chip.devices / program[n] for n in ("bound_s", "estimate_s"))
        peak = f"{chip.bf16_flops_s / 1e12:g} TFLOP/s and {chip.memory_bytes_s / 1e9:g} GB/s"
        lines.append(
            f"bound: with {examples} examples a device no chip of {peak} computes more than "
            f"{rate:,.5g} examples/s ({program['bound_by']}); an estimate by the bytes of XLA's "
            f"operations, {program['bytes'] / _MIB:,.5g} MiB a call: {guess:,.5g}"
        )
    return "\n".join([*lines, f"peaks: {chip.source}"])


def _row(program: Mapping[str, Any]) -> tuple[str, ...]:
    examples = program.get("examples_per_device")
    head = program["name"], f"{examples:,}" if examples else ""
    if program["refused"]:
        return *head, "", "refused", *[""] * (len(_HEAD) - 4)
    products = [f"{count} {kind}" for kind, count in sorted(program["products"].items())]
    moves = (program[name] for name in ("copies", "transposes"))
    return (
        *head,
        ", ".join(map(_collective, program["collectives"])) or "none",
        f"{program['needed_bytes'] / _MIB:,.4g}",
        f"{program['flops'] / examples / 1e9:.4g}" if examples else "",
        f"{program['kernels']:,}",
        ", ".join(products),
        f"{program['reductions']:,}",
        *(f"{move['count']:,} of {move['bytes'] / _MIB:,.3g} MiB" for move in moves),
    )


def _collective(found: Mapping[str, Any]) -> str:
    size = f"{found['bytes'] / _MIB:,.4g} MiB"
    return f"{found['count']} {found['kind']} of {size} in {found['groups']}"


def misfits(found: Mapping[str, Any]) -> list[Problem]:
    """What does not fit into a device's memory."""
    problems = []
    for program in found["programs"]:
        needed, limit = program["needed_bytes"], found["device_memory_bytes"]
        if program["refused"] or needed > limit:
            field, given = f"{program['name']} on {found['target']}", f"{needed / _MIB:,.0f} MiB"
            if program["name"] == "accumulate":
                field = "microbatch_examples_per_device"
                given = program["examples_per_device"]
            why = program["refused"] or f"it needs {needed / _MIB:,.0f} MiB"
            allowed = (
                f"what fits into {limit / _MIB:,.0f} MiB of a {found['target']} device ({why})"
            )
            problems.append(Problem(field, given, allowed))
    return problems
