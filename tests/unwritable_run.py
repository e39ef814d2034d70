"""Runs in directories that cannot be written: `python -m tests.unwritable_run DIR`.

To be started without the right to write everywhere. Prints the exit status of each command, what it
said on standard error, and whether it left all files as they were.
"""

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

from tests import perceptron_run

LOCKED = {
    "new": ".",
    "begun": ".",
    "checkpoints": "checkpoints",
}


def train(directory: Path) -> tuple[int, str]:
    sys.argv[1:] = ["train", "--config=tests/perceptron_run.py", f"--workdir={directory}"]
    sys.argv += ["--config.epochs=0.3"]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        return perceptron_run.main(), said.getvalue()


def files(directory: Path) -> dict[str, bytes]:
    """All files but those that hold the time of a start, and what the log was cut down to."""
    # What says that there was a start may change.
    found = [p for p in directory.rglob("*") if p.is_file() and p.name != "starts.json"]
    kept = [path for path in found if path.name != "metrics.jsonl" and "events" not in path.name]
    return {str(path.relative_to(directory)): path.read_bytes() for path in kept}


def main(parent: str) -> None:
    begun = Path(parent) / "first"
    assert train(begun)[0] == 0
    (begun / "result.json").unlink()
    shutil.rmtree(max((begun / "checkpoints").iterdir(), key=lambda path: int(path.name)))
    reports = {}
    for name, locked in LOCKED.items():
        directory = Path(parent) / name
        if name == "new":
            directory.mkdir()
        else:
            shutil.copytree(begun, directory)
        before = files(directory)
        (directory / locked).chmod(0o555)
        status, text = train(directory)
        (directory / locked).chmod(0o755)
        reports[name] = {"status": status, "text": text, "same": files(directory) == before}
    print(json.dumps(reports))


if __name__ == "__main__":
    main(sys.argv[1])
