"""The machine: cores of client and server, and its description in reports."""

import os
import platform
from importlib.metadata import version
from typing import NamedTuple

from unroll_export.publishing import cpu_name

LIBRARIES = ("grpcio", "numpy", "onnxruntime", "protobuf", "torch")


class Cores(NamedTuple):
    """Cores of the load generator and of the measured server."""

    client: int
    server: int

    @property
    def apart(self) -> bool:
        """True if the two are different cores."""
        return self.client != self.server


def cores() -> Cores:
    """Returns the first usable core for the client, the last one for the server."""
    allowed = sorted(os.sched_getaffinity(0))
    return Cores(allowed[0], allowed[-1])


def describe(pinned: Cores) -> dict[str, str]:
    """Describes the machine for comparisons: processor, cores, system, library versions."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "cpu": cpu_name(),
        "cores": f"{os.cpu_count()}, client on {pinned.client}, server on {pinned.server}",
        "memory": f"{memory:.0f} GiB",
        "system": f"{platform.system()} {platform.release().split('-')[0]}, Python {platform.python_version()}",
        "libraries": ", ".join(f"{name} {version(name)}" for name in LIBRARIES),
    }
