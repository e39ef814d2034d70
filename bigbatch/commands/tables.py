"""What a command has to show: as it is where standard output is no terminal, laid out on one."""

import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# The line below a table's head: of `plan.aligned`, and of Markdown.
_RULE = re.compile(r"-+(  -+)+|\|( -+:? \|)+")
# Of Markdown: what is bold, and marks that are to be seen.
_BOLD = re.compile(r"\*\*((?:\\.|[^\\])+?)\*\*")
_ESCAPED = re.compile(r"\\([^\w\s]|_)")
# What a terminal would obey.
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
# Longer cells are wrapped where the table would be too wide.
_LONG = 16


def show(text: str) -> None:
    """Prints a text with tables, those of `plan.aligned` and of Markdown.

    On a terminal a table is at most as wide as that: long cells are wrapped, and columns that do
    not fit follow in a table below, behind the first column again. Lines are wrapped between words,
    but for commands, which can be copied so. Of Markdown, which begins with a heading, no mark is
    seen. What names hold is shown and never obeyed.

    Args:
      text: lines, or JSON, which is never laid out.
    """
    if text.startswith("{") or not sys.stdout.isatty():
        print(text, flush=True)
        return
    # Where nothing is drawn, nothing is imported.
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    drawn = _of_markdown if text.startswith("#") else _plain
    lines = _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text).split("\n")
    while lines:
        if len(lines) > 1 and _RULE.fullmatch(lines[1]):
            rows = list(itertools.takewhile(bool, map(_cells(lines[1]), lines)))
            del lines[: len(rows)]
            for table in _tables(rows, console.width, drawn):
                console.print(table)
        else:
            console.print(drawn(lines[0]), soft_wrap=" --config" in lines[0])
            del lines[0]
    sys.stdout.flush()


def _cells(rule: str) -> Callable[[str], list[str]]:
    """What gives the cells of a line of the table with that rule; none of another line."""
    if rule.startswith("|"):
        return lambda line: line[2:-2].split(" | ") if line.startswith("|") else []
    columns = re.compile("  ".join(f"(.{{{len(run)}}})" for run in rule.split("  ")))
    return lambda line: [*map(str.strip, m.groups())] if (m := columns.fullmatch(line)) else []


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text, "yellow" if text.startswith("warning: ") else "")


def _of_markdown(text: str) -> Any:
    from rich.text import Text

    words = text.lstrip("#")
    shown = Text(style="bold" if words != text else "")
    # What stands between the matches, and the matches, by turns.
    for number, part in enumerate(_BOLD.split(words.lstrip())):
        shown.append(_ESCAPED.sub(r"\1", part), "bold" * (number % 2))
    return shown


def _tables(
    rows: Sequence[Sequence[str]], width: int, drawn: Callable[[str], Any]
) -> Iterator[Any]:
    """The head, the rule and the rows of a table as tables that are not too wide."""
    from rich import box
    from rich.table import Table

    head, rule, *body = rows
    columns = list(itertools.zip_longest(map(drawn, head), *(map(drawn, row) for row in body)))
    longest = [max(len(word) for cell in c for word in cell.plain.split() or [""]) for c in columns]
    lengths = [[cell.cell_len for cell in column] for column in columns]
    # As they are; with the heads wrapped; with long cells wrapped too.
    tries = [
        [max(cells) for cells in lengths],
        [max(word, *cells[1:]) for word, cells in zip(longest, lengths, strict=True)],
    ]
    pairs = zip(longest, tries[1], strict=True)
    fewest = [min(max(word, min(cells, _LONG)), width // 2 - 1) for word, cells in pairs]
    widths = next((each for each in tries if sum(each) + 2 * len(each) - 2 <= width), fewest)
    left = list(range(1, len(columns)))
    while left:
        shown = [0, left.pop(0)]
        while left and sum(widths[n] + 2 for n in [*shown, left[0]]) - 2 <= width:
            shown.append(left.pop(0))
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for n in shown:
            side: Any = "left" if rule[n] == "---" else "right"
            at: dict[str, Any] = {"justify": side, "vertical": "bottom", "overflow": "fold"}
            table.add_column(columns[n][0], width=widths[n], **at)
        for cells in zip(*(columns[n][1:] for n in shown), strict=True):
            table.add_row(*cells)
        yield table
        if left:
            yield ""
