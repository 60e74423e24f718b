"""Memory of processes, as reported by the kernel."""

import os
from contextlib import suppress
from pathlib import Path

from support.workers import workers_of


def resident_bytes(pid: int) -> int:
    """Returns the resident memory of a server process and its workers, in bytes."""
    pages = 0
    for each in (pid, *workers_of(pid)):
        with suppress(OSError):
            pages += int(Path(f"/proc/{each}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
