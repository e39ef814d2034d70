"""Reads run directories and writes what they show: figures, one HTML page, a Markdown table.

The flow: `runs` reads a directory, `curves` brings the losses onto common epochs and measures
the gap between them, `metric` chooses what the runs are judged by, `comparable` names what is not
comparable, `summary` puts the runs of an experiment together, `table`, `figures` and `page` say
and draw it, `write` writes the files.
Nothing here needs JAX, and nothing but the output directory is written.
"""

from bigbatch.commands.report.runs import LoggedRun, read_run
from bigbatch.commands.report.summary import Summary, summarise
from bigbatch.commands.report.write import Report, write_report

__all__ = ["LoggedRun", "Report", "Summary", "read_run", "summarise", "write_report"]
