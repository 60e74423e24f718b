"""The time that sessions rest: no step of the wall clock ends them."""

import time
from functools import cache
from pathlib import Path
from typing import NamedTuple, Self

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Moment(NamedTuple):
    """One moment on the clocks of this machine.

    Sessions rest by the monotonic clock, which all processes of a machine share and which nobody can set. Unlike
    CLOCK_BOOTTIME it stands still while the machine is suspended: no caller could use a session meanwhile.

    Attributes:
        wall: Seconds since 1970.
        monotonic: Seconds of `time.monotonic`.
        boot: Names the run of the kernel that `monotonic` belongs to; empty where the system has no name for it.
    """

    wall: float
    monotonic: float
    boot: str

    @classmethod
    def now(cls) -> Self:
        """Reads the clocks."""
        return cls(time.time(), time.monotonic(), _boot_id())

    def since(self, earlier: "Moment") -> float:
        """Seconds, 0 or more, from `earlier` to this moment.

        Across a boot, or between machines, only the wall clock can measure them.
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
