"""Runs a process on one core that ends with its parent.

`python -m unroll_bench.contest.confine CORE COMMAND...` executes COMMAND. Code between fork and exec would be unsafe
in a process that has threads.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def pin(core: int) -> None:
    """Pins the calling process, and the processes that it starts from now on, to one core."""
    os.sched_setaffinity(0, {core})


def die_with_parent() -> None:
    """Asks the kernel to send SIGTERM to the calling process when its parent ends for any reason."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    pin(int(sys.argv[1]))
    die_with_parent()
    os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606  (a command of ours)
