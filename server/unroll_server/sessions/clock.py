"""Measures how long sessions are unused, independent of steps of the wall clock."""

import time
from functools import cache
from pathlib import Path
from typing import NamedTuple, Self

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Moment(NamedTuple):
    """One moment on the clocks of this machine.

    Sessions expire by the monotonic clock, which all processes of a machine share and which nobody can set. Unlike
    CLOCK_BOOTTIME it stands still while the machine is suspended, when no caller can use a session.

    Attributes:
        wall: Seconds since 1970.
        monotonic: Seconds of `time.monotonic`.
        boot: Id of the system's boot that `monotonic` counts from; empty if the system has none.
    """

    wall: float
    monotonic: float
    boot: str

    @classmethod
    def now(cls) -> Self:
        """Reads the clocks."""
        return cls(time.time(), time.monotonic(), _boot_id())

    def since(self, earlier: "Moment") -> float:
        """Returns the seconds, 0 or more, from `earlier` to this moment.

        Across a boot, or between machines, only the wall clock measures them. It can't tell a forward step from time
        that passed, so a step counts as time; after a step back no time has passed.
        """
        if self.boot and self.boot == earlier.boot and self.monotonic >= earlier.monotonic:
            return self.monotonic - earlier.monotonic
        return max(0.0, self.wall - earlier.wall)


@cache
def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
