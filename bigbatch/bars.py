"""Progress on a terminal: a bar on standard error, where that is one."""

import sys
from typing import Any, Self


class Bar:
    """A bar with its rate and the time that is left. Use it as a context manager.

    What is printed meanwhile appears above it. Where standard error is no terminal, or nobody asked
    for a bar, there is none, and nothing else changes.

    Args:
      total: amount of work.
      unit: of the amount, in the plural.
      show: whether to draw it.
      done: of the amount, by whoever was there before.
      words: what stands before it.

    Attributes:
      shown: whether there is a bar.
    """

    def __init__(self, total: int, unit: str, *, show: bool, done: int = 0, words: str = ""):
        self.shown = show and sys.stderr.isatty()
        self._task = {"total": total, "completed": done, "description": words, "unit": unit}
        self._bar: Any = None

    def __enter__(self) -> Self:
        if self.shown:
            self._bar = _drawn()
            self._bar.add_task(**self._task)
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def move(self, amount: int, **changes: Any) -> None:
        """Adds to what is done; `total` and `words` may be given anew."""
        if self._bar is not None:
            if "words" in changes:
                changes["description"] = changes.pop("words")
            self._bar.update(0, advance=amount, **changes)


def _drawn() -> Any:
    # Where nothing is drawn, nothing is imported.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            rate = f"{speed:,.0f} {task.fields['unit']}/s" if speed else ""
            return Text(rate)

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        Rate(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
        expand=True,
        refresh_per_second=4,
    )
