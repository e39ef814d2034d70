"""The bar on a terminal, seen through a pseudo-terminal; and that there is none elsewhere."""

import os
import re
import subprocess
import sys

import pytest

import bigbatch
from bigbatch.bars import Bar
from bigbatch.training import progress

SCRIPT = """
import sys, time
import bigbatch
from bigbatch.bars import Bar
from bigbatch.training import progress
with Bar(2_000_000, "examples", show=True, done=500_000, words="[b]first[/b]") as bar:
    for n in range(3):
        time.sleep(0.05)
        words = f"update 12,34{n}  batch 65,536  loss 0.00937"
        bar.move(500_000, total=2_000_000, words=words)
        print("a line", n, file=sys.stderr)
print(bar.shown)
"""


def on_a_terminal(*command, **piped):
    """The lines on a terminal of 80 columns, what was piped, and the exit status."""
    ours, theirs = os.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm"}
    with subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        text=True,
        **{"stdout": theirs, "stderr": theirs, **piped},
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
        out = process.stdout.read() if process.stdout else ""
    os.close(ours)
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode()))
    return lines, out, process.returncode


def test_a_plan_is_a_table_on_a_terminal():
    plan = ["-m", "bigbatch", "plan", "--config=imagenet_resnet50"]
    lines, _, status = on_a_terminal(*plan)
    assert status == 0
    assert max(map(len, lines)) <= 80
    assert lines[lines.index("\N{BOX DRAWINGS LIGHT HORIZONTAL}" * 79) - 1].startswith(
        "update  upd"
    )


def test_the_first_line_does_not_wait_for_jax():
    compare = ["compare", "--config=digits:decay", "--workdir=nowhere", "--seeds=0"]
    lines, *_ = on_a_terminal("-X", "importtime", "-m", "bigbatch", *compare)
    jax = next(n for n, line in enumerate(lines) if re.fullmatch(r"import.*\| +jax", line))
    assert "bigbatch compare: nowhere; starting JAX ..." in lines[:jax]


def test_a_bar_fits_a_terminal_of_80_columns():
    lines, out, status = on_a_terminal("-c", SCRIPT, stdout=subprocess.PIPE)
    assert (out, status) == ("True\n", 0)
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


COMPARED = """
import bigbatch
from bigbatch.bars import Bar
from bigbatch.training import progress
from bigbatch.commands.compare import _move
with Bar(200, "examples", show=True, words="[2/2] increase, seed 0") as bar:
    _move(bar, 100, {"update": 3, "examples": 50})
"""


def test_the_bar_of_a_comparison_is_of_all_its_runs():
    """One of 100 examples is done, and a half of the other."""
    lines, *_ = on_a_terminal("-c", COMPARED)
    assert any(re.fullmatch(r"\[2/2\] increase, seed 0 .* 75% .*", line) for line in lines)


def test_a_change_of_the_batch_size_is_told_once():
    """Where sizes change all the time it is not: nobody reads a line an update."""
    stages = bigbatch.step_decay(0.4, 10, 0.9, boundaries_epochs=[4], factor=0.5)
    plan = bigbatch.make_plan(bigbatch.grow_batch(stages), train_examples=100, epochs=8)
    told = {
        row.update: progress.change(plan, row) for row in map(plan.row, range(plan.num_updates))
    }
    words = "epoch 4, update 40: batch size 10 -> 20, learning rate 0.4, momentum 0.9"
    assert {update: line for update, line in told.items() if line} == {40: words}
    smooth = bigbatch.exponential(0.4, 100, 0.9, factor=0.5, every_epochs=1)
    plan = bigbatch.make_plan(bigbatch.grow_batch(smooth), train_examples=100_000, epochs=4)
    told = [progress.change(plan, row) for row in map(plan.row, range(200, plan.num_updates))]
    assert not any(told)
