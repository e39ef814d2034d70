"""A word from a process that could not say it itself.

When process 0 of a run goes, JAX aborts the others at once, on a thread of its own; Python is not
asked. Nor is it where processes do not find each other. So a shell waits at the end of a pipe that
only its process holds open. A process that ends by itself sends a line; where the pipe closes
without one, the shell says what to do.
"""

import contextlib
import os
import shutil
import socket
import subprocess

# The shell ends with its process, and not by what is sent to both.
_SCRIPT = 'trap "" HUP INT TERM; read -r line || echo "$1" >&2'


class Witness:
    """Stands beside a process of several until it is dismissed; nothing where there is no shell.

    Args:
      words: what it says of the process, where that ends before.
    """

    def __init__(self, words: str) -> None:
        text = f"bigbatch: process {os.getpid()} on {socket.gethostname()} {words}"
        shell = shutil.which("sh")
        self._shell = None
        if shell is not None:
            self._shell = subprocess.Popen(
                [shell, "-c", _SCRIPT, shell, text],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
            )

    def dismiss(self) -> None:
        """Tells the shell that all is well; may be called again."""
        if self._shell is not None:
            with contextlib.suppress(BrokenPipeError):
                self._shell.communicate(b"\n")
            self._shell = None
