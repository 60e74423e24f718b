"""Files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO


@contextmanager
def replacing(path: Path, *, private: bool = False) -> Iterator[IO[bytes]]:
    """Gives a temporary neighbour of `path` to write to, which takes its place at the end.

    After an exception the neighbour is removed and `path` is as it was. The content is on the disk before it takes
    the place, so that not even a power cut leaves half of it.

    Args:
        path: The file.
        private: Whether its owner alone may read it, from the first moment on; else it gets the rights of any new file.
    """
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False) as file:
        temporary = Path(file.name)
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if not private:
                # A temporary file is for its owner only.
                umask = os.umask(0o022)
                os.umask(umask)
                temporary.chmod(0o666 & ~umask)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
