"""The signals that stop a process, before it serves and after its last call. Imports nothing that takes time."""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def end_on_signals() -> None:
    """Has SIGTERM and SIGINT end this process at once, with exit code 0: it serves nothing that could be lost.

    Call it before the imports that take time: the kernel ignores signals to process 1 of a container that have no
    handler. `process.Stop` replaces the handlers.
    """
    for number in SIGNALS:
        signal.signal(number, _end)


def end(code: int) -> NoReturn:
    """Ends this process with an exit code, after it has flushed its output.

    Python's own exit restores the default action of signals, and one that arrives then would replace the exit code. It
    also waits for threads, of which one may be loading a model.
    """
    for stream in (sys.stdout, sys.stderr):
        # Closed or broken output is not worth a traceback now.
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _end(number: int, frame: FrameType | None) -> None:
    # An import or a callback could catch SystemExit.
    os._exit(0)
