"""A process on one core that ends with its parent.

`python -m unroll_bench.contest.confine CORE COMMAND...` becomes COMMAND. Code between fork and exec would not be safe
in a process that has threads.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def pin(core: int) -> None:
    """Keeps the calling process, and what it starts from now on, on one core."""
    os.sched_setaffinity(0, {core})


def die_with_parent() -> None:
    """Has the kernel ask the calling process to end when its parent is gone, however that went."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    pin(int(sys.argv[1]))
    die_with_parent()
    os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606  (a command of ours)
