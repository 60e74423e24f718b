"""Forks of a process that uses gRPC: closes idle channels before, and refuses in the child what can't work.

gRPC's core runs threads, which a child process does not have. The core's own fork handlers make things worse under
grpc.aio: half of them are skipped, and children that never use gRPC crash. So they are switched off unless the
environment asks for them. A child can use gRPC if the core was shut down before the fork: its first client starts the
core anew.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Protocol

# gRPC's core reads the variable while it is imported.
_TOO_LATE = "grpc" in sys.modules and "GRPC_ENABLE_FORK_SUPPORT" not in os.environ
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

STRANDED = (
    "this process was forked while gRPC was in use, which gRPC does not survive: before the fork, close the sequences"
    " and wait for the calls of each Client, and close each AsyncClient; or start the process by 'spawn' or"
    " 'forkserver'"
)

CRASHING = (
    "a fork while a client is in use can crash the child, as grpc was imported before unroll_client: import"
    " unroll_client first, or set GRPC_ENABLE_FORK_SUPPORT=0"
)

# Prefixes of the names of the core's threads.
_CORE_THREADS = ("event_engine", "grpc_", "lifeguard")
# Seconds to wait for the core to shut down after the last channel is closed; it usually takes milliseconds.
_LONGEST_SHUTDOWN = 1.0


class Resting(Protocol):
    """A user of gRPC that starts again by itself."""

    def rest(self) -> None:
        """Closes its channels if no call is in flight."""

    def abandon(self) -> None:
        """Leaves to the parent process what is the parent's, without touching it."""


_resting: weakref.WeakValueDictionary[int, Resting] = weakref.WeakValueDictionary()
_open: weakref.WeakSet[object] = weakref.WeakSet()
_settling = False  # True once channels were opened since the core was last seen shutting down, or given up
_alive = False  # True if the core runs while the process forks
_stranded = False


def register(user: Resting) -> None:
    """Registers a user of gRPC, whose channels are closed before a fork if no call is in flight."""
    _resting[id(user)] = user


def opened(channels: object) -> None:
    """Records that channels are open, until `closed` or until they are garbage."""
    global _settling
    _open.add(channels)
    _settling = True


def closed(channels: object) -> None:
    """Records that channels are closed."""
    _open.discard(channels)


def check() -> None:
    """Raises RuntimeError if gRPC can't be used in this process, with the way out."""
    if _stranded:
        raise RuntimeError(STRANDED)


def _users() -> list[Resting]:
    # A single operation of the interpreter, since other threads may add channels.
    return [user for reference in _resting.valuerefs() if (user := reference()) is not None]


def _before() -> None:
    global _alive, _settling
    for user in _users():
        user.rest()
    deadline = time.monotonic() + _LONGEST_SHUTDOWN
    while (alive := _core_is_alive()) and _settling and not _open and time.monotonic() < deadline:
        time.sleep(0.001)
    # Other code may use gRPC all the time; no fork must wait for it again.
    _settling = bool(_open)
    _alive = alive
    if _open and _TOO_LATE:
        warnings.warn(CRASHING, RuntimeWarning, stacklevel=2)


def _after_in_child() -> None:
    global _stranded, _settling
    _stranded = _stranded or _alive or bool(_open)
    _settling = False
    for user in _users():
        user.abandon()


def _core_is_alive() -> bool:
    try:
        threads = list(Path("/proc/self/task").iterdir())
    except OSError:
        return bool(_open)
    for thread in threads:
        with suppress(OSError):  # The thread may have ended by now.
            if (thread / "comm").read_text().startswith(_CORE_THREADS):
                return True
    return False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_child=_after_in_child)
