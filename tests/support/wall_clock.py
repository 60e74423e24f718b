"""A wall clock that steps, for real server processes."""

import os
from pathlib import Path

# grpcio compares Python's wall clock with the kernel's, which can't be changed here.
_SHIFT = """
import pathlib, time, types
import grpc._cython.cygrpc

grpc._cython.cygrpc.time = types.SimpleNamespace(time=time.time)

def shifted(read, unit):
    return lambda: read() + int(pathlib.Path({file!r}).read_text()) * unit

time.time, time.time_ns = shifted(time.time, 1), shifted(time.time_ns, 10**9)
"""


class WallClock:
    """Controls the wall clock of Python processes started with `env`; other clocks do not change.

    Args:
        folder: Folder of its files.

    Attributes:
        env: Variables for those processes.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._file = folder / "shift"
        self.set(0)
        (folder / "sitecustomize.py").write_text(_SHIFT.format(file=str(self._file)))
        self.env = {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}

    def set(self, seconds: int) -> None:
        """Sets the clock ahead of the real time, in seconds."""
        new = self._file.with_name("new")
        new.write_text(str(seconds))
        new.replace(self._file)
