"""The list of tests/accelerator, rehearsed at toy sizes: each of its rows is there and right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.accelerator import __main__ as accelerator

ROOT = Path(__file__).parents[1]


def rehearsed(directory, *names):
    """The rows of some measurements, by their names, as the command gives them."""
    command = [sys.executable, "-m", "tests.accelerator", "--rehearse", f"--out={directory}"]
    command += ["--minutes=60", f"--only={','.join(names)}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    table = (directory / "table.md").read_text()
    found = {name: [] for name in names}
    for line in (directory / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        found[row.pop("measurement")].append(row)
    for name, rows in found.items():
        assert f"{len(rows)} rows; done" in table.partition(f"## {name}\n")[2], name
    return found


def test_measurements_in_processes_of_their_own(tmp_path):
    """Of those, the two that take least."""
    rows = rehearsed(tmp_path, "input", "speed.transformer")
    assert [row["decoding"] for row in rows["input"]] == ["fast", "smooth"]
    assert all(row["images/s"] > 0 for row in rows["input"])
    ours = rows["speed.transformer"][0]
    # One layer of 32 on sequences of 16, by hand: its matrices, and the embeddings of 256 bytes.
    parameters = 4 * 32 * 32 + 3 * 32 * 88 + 256 * 32
    flops = 16 * (6 * parameters + 12 * 1 * 32 * 16)
    assert (ours["trainer"], ours["dtype"]) == ("bigbatch", "bfloat16")
    assert ours["GFLOP an example"] == pytest.approx(flops / 1e9)


def test_what_takes_too_long_is_ended(tmp_path):
    assert accelerator.run("bits", 3, True, tmp_path) == "ended after its 3 s"
    assert not (tmp_path / "rows.jsonl").read_text()


def test_what_fails_says_why(tmp_path):
    assert "No module named" in accelerator.run("nowhere", 60, True, tmp_path)
    rows = json.dumps({"measurement": "right", "what": "sums", "difference": 0.5})
    (tmp_path / "rows.jsonl").write_text(f"{rows}\n")
    table = accelerator.table(tmp_path, ["- a card"], {"right": "done, 3 s", "bits": "not begun"})
    assert "| sums | 0.5 |" in table
    assert "0 rows; not begun." in table


@pytest.mark.long
def test_the_whole_list(tmp_path):
    """Minutes: as much as an accelerator's first ten minutes have, and growth over 200 epochs."""
    found = rehearsed(tmp_path, *accelerator.BOXES_S)
    assert all(row["ok"] for row in found["right"])
    assert all(row["same bits"] for row in found["bits"])
    assert all(row.get("runs", True) for row in found["memory"])
    for name in ("wrn16_4", "resnet50", "transformer"):
        assert found[f"speed.{name}"][0]["trainer"] == "bigbatch"
    assert [row["ended"] for row in found["growth.30"]] == ["at its end"]
    assert len(found["features"]) == 3
