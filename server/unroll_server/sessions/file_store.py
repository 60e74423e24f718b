"""Sessions in memory that outlive the process, in a file.

The file is a line that names its format, each unroll.v1.KeptSession after its length (uint32, little-endian), a length
of 0, and the SHA-256 of all before. It is written completely or not at all. A server that loaded it removes it: its
sessions advance, and no other server may resume them from the old states.
"""

import hashlib
import logging
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from unroll_proto.files import replacing
from unroll_proto.v1.session_pb2 import KeptSession, SavedAt
from unroll_server.errors import SessionsLostError, StartupError
from unroll_server.sessions.clock import Moment
from unroll_server.sessions.memory_store import MemoryStore

_log = logging.getLogger(__name__)

FIRST_LINE = b"unroll sessions 1\n"
_LENGTH = struct.Struct("<I")
MAX_ENTRY = 2**28
"""Most bytes of one session."""


class FileBackedStore(MemoryStore):
    """A MemoryStore that is loaded from a file when it opens, and saved to it when it closes.

    Args:
        ttl: See MemoryStore.
        max_sessions: See MemoryStore.
        path: See MemoryStore.
        file: File of the sessions, which need not exist. Time without a server counts: expired sessions are not
            loaded. A file that can't be trusted is renamed to NAME.refused, and the log has the reason.
        count: See MemoryStore.
        moment: Reads the clocks.

    Raises:
        StartupError: no file can be written there.
    """

    def __init__(
        self,
        ttl: float,
        max_sessions: int,
        path: Path | None,
        file: Path,
        count: Callable[[str], None] = lambda _: None,
        moment: Callable[[], Moment] = Moment.now,
    ) -> None:
        super().__init__(ttl, max_sessions, path, count, lambda: moment().monotonic)
        self._ttl = ttl
        self._moment = moment
        # The target of a link: the link itself must not be replaced or removed.
        self._file = file = Path(os.path.realpath(file))
        self._open = True
        if not os.access(file.parent, os.W_OK | os.X_OK) or (file.exists() and not file.is_file()):
            raise StartupError(
                f"--sessions-file: can't write {file}: needs a writable folder, and no other kind of file"
            )
        try:
            with file.open("rb") as stream:
                number = self._load(stream)
        except FileNotFoundError:
            return
        except OSError as error:
            raise StartupError(f"--sessions-file: can't read {file}: {error.strerror}") from None
        except ValueError as error:
            refused = file.with_name(f"{file.name}.refused")
            with _replaceable(file):
                file.replace(refused)
            _log.error("refused the sessions of %s, now %s: %s", file, refused.name, error)
        else:
            _log.info("took over %d sessions of %s", number, file)

    def confirm_takeover(self) -> None:
        """Removes the file, whose states are about to be outdated.

        Raises:
            StartupError: it can't be removed.
        """
        with _replaceable(self._file):
            self._file.unlink(missing_ok=True)

    async def close(self) -> None:
        """Saves the sessions and closes the store; does nothing if it is closed.

        Raises:
            SessionsLostError: they can't be saved.
        """
        if not self._open:
            return
        self._open = False
        try:
            # Private: the values belong to the callers.
            with replacing(self._file, private=True) as stream:
                _log.info("saved %d sessions in %s", self._save(stream), self._file)
        except OSError as error:
            _log.error("the sessions are lost: can't write %s: %s", self._file, error.strerror)
            # The exit code reports it too, for scripts that read no log.
            raise SessionsLostError(f"the sessions are lost: can't write {self._file}: {error.strerror}") from None
        finally:
            await super().close()

    def _save(self, stream: IO[bytes]) -> int:
        """Writes the file; returns the number of sessions."""
        digest = hashlib.sha256()
        number = 0

        def write(raw: bytes) -> None:
            digest.update(raw)
            stream.write(raw)

        def write_entry(kept: KeptSession) -> None:
            raw = kept.SerializeToString()
            write(_LENGTH.pack(len(raw)) + raw)

        write(FIRST_LINE)
        now = self._moment()
        to_wall = now.wall - now.monotonic
        write_entry(KeptSession(saved=SavedAt(**now._asdict())))
        for expires, record in self._table.rows():
            number += 1
            kept = KeptSession(expires=expires + to_wall)
            kept.session.ParseFromString(record)
            write_entry(kept)
        for until, owner, session_id, out in self._table.gone():
            kept = KeptSession(expires=until + to_wall)
            kept.gone.owner, kept.gone.session_id, kept.gone.pushed_out = owner, session_id, out
            write_entry(kept)
        write(_LENGTH.pack(0))
        stream.write(digest.digest())
        return number

    def _load(self, stream: IO[bytes]) -> int:
        """Loads the entries of a file; returns the number of sessions.

        Raises:
            ValueError: the file is incomplete, was changed, or is of another format.
        """
        # The whole file is verified before any entry is parsed.
        for _ in _entries(stream):
            pass
        stream.seek(0)
        number = 0
        now = self._moment()
        # From the wall clock of `expires` to the monotonic one; the entry `saved` gives the exact difference.
        to_monotonic = now.monotonic - now.wall
        table = self._table
        with table.transaction():
            for raw in _entries(stream):
                kept = KeptSession.FromString(raw)
                session, gone, saved = kept.session, kept.gone, kept.saved
                expires = kept.expires + to_monotonic
                if kept.HasField("saved"):
                    down = now.since(Moment(saved.wall, saved.monotonic, saved.boot))
                    to_monotonic = now.monotonic - down - saved.wall
                elif kept.HasField("gone"):
                    table.remember(gone.owner, gone.session_id, gone.pushed_out, expires)
                elif expires > now.monotonic:
                    table.write(session, expires)
                    number += 1
                elif not session.ended:
                    table.remember(session.owner, session.session_id, False, expires + self._ttl)
        return number


@contextmanager
def _replaceable(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # A file that is itself a mount point (`docker run -v FILE:FILE`) can be written, but not moved or removed.
        problem = f"--sessions-file: can't replace {file}: {error.strerror}; if it is mounted, mount its folder"
        raise StartupError(problem) from None


def _entries(stream: IO[bytes]) -> Iterator[bytes]:
    """Yields the entries of a file; raises ValueError at its end if it can't be trusted."""
    digest = hashlib.sha256()

    def read(size: int) -> bytes:
        raw = stream.read(size)
        if len(raw) != size:
            raise ValueError("it is incomplete")
        digest.update(raw)
        return raw

    if stream.read(len(FIRST_LINE)) != FIRST_LINE:
        raise ValueError("it is not a file of sessions, or of another format")
    digest.update(FIRST_LINE)
    while size := _LENGTH.unpack(read(_LENGTH.size))[0]:
        if size > MAX_ENTRY:
            raise ValueError("it was changed")
        yield read(size)
    if stream.read(digest.digest_size + 1) != digest.digest():
        raise ValueError("it was changed")
