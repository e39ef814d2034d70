"""The bar on a terminal, seen through a pseudo-terminal; and that there is none elsewhere."""

import os
import re
import subprocess
import sys

import pytest

from bigbatch.bars import Bar

SCRIPT = """
import sys, time
from bigbatch.bars import Bar
with Bar(2_000_000, "examples", show=True, done=500_000, words="[b]first[/b]") as bar:
    for n in range(3):
        time.sleep(0.05)
        words = f"update 12,34{n}  batch 65,536  loss 0.00937"
        bar.move(500_000, total=2_000_000, words=words)
        print("a line", n, file=sys.stderr)
print(bar.shown)
"""


def test_a_bar_fits_a_terminal_of_80_columns():
    ours, theirs = os.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm"}
    command = [sys.executable, "-c", SCRIPT]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=theirs, env=environment, text=True
    ) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # Linux says so where the other end is closed.
                break
            if not piece:
                break
            seen += piece
        assert process.stdout.read() == "True\n"
    os.close(ours)
    assert process.returncode == 0
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode()))
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if line.startswith("a line")] == [
        f"a line {n}" for n in range(3)
    ]
    last = [line for line in lines if "12,342" in line][-1]
    assert re.search(r"update 12,342  batch 65,536  loss 0.00937 .*100% \S+ examples/s", last)
    assert any(line.startswith("[b]first[/b]") and " 25% " in line for line in lines)


@pytest.mark.parametrize("show", [True, False])
def test_no_terminal_no_bar(capsys, show):
    with Bar(10, "bytes", show=show) as bar:
        bar.move(3, words="x")
    assert not bar.shown
    assert capsys.readouterr() == ("", "")
