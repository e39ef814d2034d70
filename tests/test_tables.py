"""What a command shows on a terminal, and that nothing of it is to be seen elsewhere."""

import io
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.commands.plan import aligned
from bigbatch.commands.report.table import _markdown_table
from bigbatch.commands.tables import show

# Names as a user may choose them, or someone whose runs are reported.
EVIL = ["[bold red]x[/]", "\x1b[31mred", "a|b", "in*crease_lr", "**loud**", "ü\N{CJK RADICAL FOOT}"]
WORDS = st.one_of(st.sampled_from(EVIL), st.from_regex(r"[a-z0-9.,_*|\[\]]{1,11}", fullmatch=True))
CELLS = st.lists(WORDS, max_size=3).map(" ".join)
TABLES = st.integers(2, 14).flatmap(
    lambda columns: st.lists(
        st.lists(CELLS, min_size=columns, max_size=columns), min_size=1, max_size=5
    )
)


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def shown(text, width=80, **environment):
    """What a terminal of so many columns gets to see, with the marks for colours."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ({"COLUMNS": str(width), "TERM": "xterm"} | environment).items():
            patch.setenv(name, value)
        patch.delenv("NO_COLOR", raising=False) if "NO_COLOR" not in environment else None
        patch.setattr(sys, "stdout", Terminal())
        show(text)
        return sys.stdout.getvalue()


def plain(seen):
    return re.sub(r"\x1b\[[\d;]*m", "", seen)


@settings(max_examples=30)
@given(TABLES, st.integers(40, 120), st.booleans())
def test_a_table_fits_and_lacks_no_word(rows, width, is_markdown):
    head = [f"head {n}" for n in range(len(rows[0]))]
    if is_markdown:
        lines = ["# Runs", "", *_markdown_table(head, rows)]
    else:
        # Lines of columns hold no names.
        rows = [[cell.replace("\x1b", "") for cell in row] for row in rows]
        lines = aligned([head, *rows])
    seen = plain(shown("\n".join([*lines, "", "[b]end[/b]"]), width))
    assert max(map(len, seen.splitlines())) <= width
    assert "\x1b" not in seen
    words = {
        word.replace("\x1b", "\\x1b") for row in [head, *rows] for c in row for word in c.split()
    }
    assert words <= set(seen.split())
    assert seen.splitlines()[-1] == "[b]end[/b]"


def test_columns_that_do_not_fit_stand_below_beside_the_first():
    head = ["experiment", *(f"quantity {n}" for n in range(12))]
    rows = [
        ["decay", *(f"{n}.25" for n in range(12))],
        ["increase", *(f"{n}.5" for n in range(12))],
    ]
    # 10 characters of the first, and 8 with 2 before them for each of five others.
    seen = plain(shown("\n".join(_markdown_table(head, rows)), 60)).splitlines()
    assert [line.split()[:2] for line in seen if line.startswith("increase")] == [
        ["increase", "0.5"],
        ["increase", "5.5"],
        ["increase", "10.5"],
    ]


def test_a_line_below_a_table_that_is_as_long_is_no_row():
    rows = aligned([["update", "batch size"], ["0", "32"]])
    assert plain(shown("\n".join([*rows, "throughout: m 0.9."]))).endswith("\nthroughout: m 0.9.\n")


def test_of_markdown_no_mark_is_seen():
    text = "# Runs *compared*\n\n- **increase\\_lr**: 2\\*3 \\[b\\]x\\[/b\\]; C:\\dir"
    assert plain(shown(text)).split("\n\n") == [
        "Runs *compared*",
        "- increase_lr: 2*3 [b]x[/b]; C:\\dir\n",
    ]


def test_lines_are_wrapped_between_words_but_commands_can_be_copied():
    words, command = "many words " * 20, "bigbatch train --config=digits " + "--x=y " * 20
    seen = plain(shown(f"{words}\n{command}")).splitlines()
    assert seen[-1].strip() == command.strip()
    assert all(line.split() == ["many", "words"] * 7 for line in seen[:2])


@pytest.mark.parametrize(("environment", "is_coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colours_only_where_they_are_wanted(environment, is_coloured):
    assert ("\x1b[33m" in shown("warning: x", **environment)) == is_coloured


def test_elsewhere_a_text_is_as_it_was(capsys):
    assert shown('{"x": "' + "y " * 80 + '"}') == '{"x": "' + "y " * 80 + '"}\n'
    text = "\n".join(["# **x**", "", *_markdown_table(["a", "b"], [EVIL[:2]]), "", *EVIL])
    show(text)
    assert capsys.readouterr() == (text + "\n", "")
