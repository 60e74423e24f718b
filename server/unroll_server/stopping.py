"""Signals that stop a process before it serves and after its last call. Imports only fast modules."""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def end_on_signals() -> None:
    """Makes SIGTERM and SIGINT end this process at once, with exit code 0, since no call could be lost.

    Call it before slow imports: the kernel ignores signals without a handler to process 1 of a container.
    `process.Stop` replaces the handlers.
    """
    for number in SIGNALS:
        signal.signal(number, _end)


def end(code: int) -> NoReturn:
    """Ends this process with an exit code, after it has flushed its output.

    Python's own exit restores the default action of signals, so a late signal would change the exit code. It also
    waits for threads, one of which may be loading a model.
    """
    for stream in (sys.stdout, sys.stderr):
        # Closed or broken output does not justify a traceback now.
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _end(number: int, frame: FrameType | None) -> None:
    # An import or a callback might catch SystemExit.
    os._exit(0)
