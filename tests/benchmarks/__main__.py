"""The benchmarks of speed, one after the other, and the docs' table of what they found.

    python -m tests.benchmarks ROUNDS [--torch=PYTHON]    all of them, some minutes a round
    python -m tests.benchmarks table                      the table, from the results that are kept

Each writes its page to tests/benchmarks/results, where the hardware, the versions and the spread
are. Nothing else may be at work on the machine.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks import growing

RESULTS = Path(__file__).parent / "results"
# Page -> the command that makes it. The growing schedules are run first and tabled then.
PAGES = {
    "startup": ("startup",),
    "trainer": ("trainer",),
    "features": ("features",),
    "collectives": ("collectives",),
}
GROWING = {"growing": 1, "growing_8_devices": 8}
# On 8 virtual devices a run of optax.microbatching, which computes all it pads, takes minutes.
ON_MANY = (*growing.NAMES[:4], *growing.NAMES[5:])
HEADER = "| | ours | peer | the peer's | ratio |\n| --- | ---: | --- | ---: | ---: |"


def run(rounds: str, options: list[str]) -> None:
    """Runs everything; PyTorch only knows one device."""
    for page, devices in GROWING.items():
        with tempfile.TemporaryDirectory() as directory:
            runs = str(Path(directory) / "runs.jsonl")
            own = options if devices == 1 else ON_MANY
            _module("growing", "run", runs, rounds, f"--devices={devices}", *own)
            (RESULTS / f"{page}.md").write_text(_module("growing", "table", runs))
    for page, command in PAGES.items():
        (RESULTS / f"{page}.md").write_text(_module(*command))


def _module(name: str, *arguments: str) -> str:
    command = [sys.executable, "-m", f"tests.benchmarks.{name}", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def rows(page: str) -> list[dict[str, str]]:
    """The first table of a page, a dictionary a row."""
    lines = (RESULTS / f"{page}.md").read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    names, _, *body = (line for line in lines[first:] if line.startswith("|") or line == "")
    body = body[: body.index("")] if "" in body else body
    return [dict(zip(_cells(names), _cells(line), strict=True)) for line in body]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split(" | ")]


def table() -> str:
    """The docs' table."""
    lines = [HEADER]

    def add(what: str, ours: str, peer: str, theirs: str, ratio: str) -> None:
        lines.append(f"| {what} | {ours} | {peer} | {theirs} | {ratio} |")

    for row in rows("trainer"):
        add(
            f"whole loop, examples/s: {row['work']}",
            row["loop, examples/s"],
            "its bare compiled functions",
            row["bare, examples/s"],
            f"{row['loop / bare']} ({row['quartiles']})",
        )
    for page, devices in GROWING.items():
        found = rows(page)
        ours = found[0]
        for row in found[2:]:
            add(
                f"growing schedule, {devices} device{'s' * (devices > 1)}, s (peak MiB)",
                f"{ours['seconds']} ({ours['peak MiB']})",
                row["trained by"],
                f"{row['seconds']} ({row['peak MiB']})",
                row["over `bigbatch train`"],
            )
    ours, *others = rows("collectives")
    for row in others:
        ratio = int(re.findall(r"\d+", row["collectives"])[0])
        collectives = f"{row['collectives']}, {row['KiB']} KiB"
        add(
            "collectives of an update in 4 microbatches, 8 devices",
            f"{ours['collectives']}, {ours['KiB']} KiB",
            row["update"],
            collectives,
            f"{ratio}",
        )
    for row in rows("startup"):
        add(f"{row['start']}, s", row["seconds"], "(our limit)", row["limit"], "")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:] != ["table"]:
        run(sys.argv[1], sys.argv[2:])
    print(table())


if __name__ == "__main__":
    main()
