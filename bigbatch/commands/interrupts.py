"""Ctrl-C in a program: the first ends it, or is heeded by the run that trains; the second ends it.

An exception would be lost where Python drops those, as in a destructor, and would come no sooner
than the main thread has left what it waits for.
"""

import os
import signal
import threading
from types import FrameType


def heed() -> None:
    """Lets SIGINT end the process for good, unless it is ignored as in the background of a script.

    The numbers of signals also go to a pipe, at once, where a thread waits for a second SIGINT.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        return
    signal.signal(signal.SIGINT, _end)
    listening, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told)

    def listen() -> None:
        left = 2
        while left:
            left -= os.read(listening, 1)[0] == signal.SIGINT
        _end(signal.SIGINT)

    threading.Thread(target=listen, name="interrupts", daemon=True).start()


def _end(number: int, frame: FrameType | None = None) -> None:
    """Ends the process as a kill would, which leaves all files whole."""
    os.write(2, b"\nbigbatch: ended at once; what was saved before stands\n")
    os._exit(128 + number)
