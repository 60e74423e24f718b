"""Files that are written completely or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO


@contextmanager
def replacing(path: Path, *, private: bool = False) -> Iterator[IO[bytes]]:
    """Yields a temporary neighbour of `path` to write to, which replaces `path` at the end.

    After an exception the neighbour is removed and `path` is unchanged. The content is on the disk before the
    replacement, so a power cut leaves no partial file.

    Args:
        path: The file.
        private: True if only the owner may read the file, from the first moment on; else it gets the usual
            permissions.
    """
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False) as file:
        temporary = Path(file.name)
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if not private:
                # Temporary files are readable only by their owner.
                umask = os.umask(0o022)
                os.umask(umask)
                temporary.chmod(0o666 & ~umask)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
