"""Everything that an accelerator can tell, in order of worth, within some minutes.

    python -m tests.accelerator --minutes=9 --out=DIR [--list=2] [--only=NAME,...] [--rehearse]

Each measurement runs in a process of its own, for so many seconds at most, and writes its rows to
DIR/rows.jsonl as it finds them. DIR/table.md is written anew after each, so what ran before the end
counts. `--rehearse` runs the same list at toy sizes on whatever there is, two at a time and hardly
optimized: nothing of that is a measurement.
"""

import argparse
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# A module beside this file, and what it measures -> seconds that it may take, what matters most
# first: of the first ten minutes on a card, and of the second.
LISTS = (
    {
        "right": 60,
        "bits": 120,
        "speed.wrn16_4": 130,
        "loop": 60,
        "speed.resnet50": 90,
        "speed.transformer": 70,
        "memory": 60,
        "features": 60,
        "input": 20,
        "growth.30": 280,
    },
    {"growth.30": 280, "growth.200": 550},
)
BOXES_S = LISTS[0] | LISTS[1]
# Two libraries share the card. Programs that several measurements have are compiled once.
_ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
_REHEARSED = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
_ROWS = "rows.jsonl"


def measure(name: str, toy: bool, out: Path) -> None:
    """Writes the rows of one measurement, each as it is found."""
    place, _, what = name.partition(".")
    module = importlib.import_module(f"tests.accelerator.{place}")
    with open(out / _ROWS, "a", encoding="utf-8") as file:
        for row in module.rows(toy, what):
            file.write(json.dumps({"measurement": name, **row}) + "\n")
            file.flush()


def run(name: str, box_s: float, toy: bool, out: Path) -> str:
    """Measures in a process of its own; returns how that ended."""
    command = [sys.executable, "-m", "tests.accelerator", f"--measure={name}", f"--out={out}"]
    environment = {**_ENVIRONMENT, "JAX_COMPILATION_CACHE_DIR": str(out / "programs")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    environment |= _REHEARSED if toy else {}
    log = out / f"{name}.log"
    with (
        open(log, "w", encoding="utf-8") as file,
        subprocess.Popen(
            command + ["--rehearse"] * toy,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            status = process.wait(box_s)
        except subprocess.TimeoutExpired:
            # With the runs that it has started.
            os.killpg(process.pid, signal.SIGKILL)
            return f"ended after its {box_s:.0f} s"
    if status:
        return f"failed: {''.join(log.read_text().strip().splitlines()[-1:])}"
    return "done"


def facts() -> list[str]:
    """The card, its clocks, the versions and the commit."""

    def said(*command: str) -> str:
        try:
            return subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    fields = "name,driver_version,clocks.sm,clocks.max.sm,power.limit,memory.total"
    card = said("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    versions = []
    for name in ("jax", "jaxlib", "flax", "optax", "torch"):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    return [
        f"- card ({fields}): {card}",
        f"- Python {platform.python_version()}, {', '.join(versions)}",
        f"- commit {said('git', 'rev-parse', '--short', 'HEAD')}, {os.cpu_count()} CPU cores",
    ]


def table(out: Path, about: Iterable[str], ends: dict[str, str]) -> str:
    """All rows so far as Markdown, a table a measurement."""
    rows: dict[str, list[dict[str, Any]]] = {}
    path = out / _ROWS
    for line in path.read_text().splitlines() if path.exists() else []:
        row = json.loads(line)
        rows.setdefault(row.pop("measurement"), []).append(row)
    lines = ["# An accelerator's measurements", "", *about]
    for name, end in ends.items():
        own = rows.get(name, [])
        columns = list(dict.fromkeys(key for row in own for key in row))
        lines += ["", f"## {name}", "", f"{len(own)} rows; {end}.", ""]
        if own:
            lines += ["| " + " | ".join(columns) + " |", "| " + "--- | " * len(columns)]
        lines += ["| " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in own]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--list", type=int, default=1, choices=(1, 2))
    parser.add_argument("--only")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--measure")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.measure:
        measure(options.measure, options.rehearse, options.out)
        return
    (options.out / _ROWS).unlink(missing_ok=True)
    end_s = time.monotonic() + 60 * options.minutes
    names = options.only.split(",") if options.only else LISTS[options.list - 1]
    about, ends = facts(), dict.fromkeys(names, "not begun")

    def measured(name: str) -> None:
        start_s = time.monotonic()
        box_s = end_s - start_s
        if not options.rehearse:
            box_s = min(box_s, BOXES_S[name])
        if box_s < 1:
            return
        how = run(name, box_s, options.rehearse, options.out.resolve())
        ends[name] = f"{how}, {time.monotonic() - start_s:.0f} s"
        print(f"{name}: {ends[name]}", flush=True)
        (options.out / "table.md").write_text(table(options.out, about, ends))

    with ThreadPoolExecutor(2 if options.rehearse else 1) as pool:
        list(pool.map(measured, names))
    if any(end.startswith("failed") for end in ends.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
