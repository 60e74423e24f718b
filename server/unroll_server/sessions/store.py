"""The interface of session stores: a write succeeds only if no other write came since the read."""

import secrets
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from unroll_engine.errors import SequenceStateError
from unroll_engine.models.spec import ModelKey
from unroll_proto.v1.session_pb2 import Session
from unroll_server.errors import SessionExpiredError

FORMAT = 1
"""Version of the meaning of a stored `unroll.v1.Session`."""
ENDED_SECONDS = 60.0
"""Seconds for which the end of a session can be answered again."""


class Kept(NamedTuple):
    """A session as read.

    Attributes:
        session: The stored message.
        revision: Identifies the write that stored it.
    """

    session: Session
    revision: bytes


@dataclass(frozen=True, slots=True)
class Listed:
    """One session in a listing.

    Attributes:
        owner: Identity that owns it; empty without authentication.
        session_id: Its id.
        model: The model version that it runs on.
        step: Timesteps consumed.
        expires_in: Seconds until it expires if it is not used.
    """

    owner: str
    session_id: str
    model: ModelKey
    step: int
    expires_in: float


class Store(Protocol):
    """Keeps sessions by owner and id, each for a time after its last use.

    Every method raises SessionStoreError if the store does not answer.
    """

    async def get(self, owner: str, session_id: str) -> Kept | None:
        """Returns a session; None if there is none. Reading counts as a use.

        Raises:
            SessionExpiredError: it expired or made room, and the store remembers it.
        """
        ...

    async def put(self, session: Session, before: bytes | None) -> bool:
        """Stores a session; an ended one is kept for at most `ENDED_SECONDS`.

        Args:
            session: The new content.
            before: The revision that it follows; None if there was no session.

        Returns:
            False, without a change, if another writer was faster.

        Raises:
            SessionRoomError: there is no room for it.
        """
        ...

    async def remove(self, owner: str, session_id: str) -> bool:
        """Deletes a session without remembering it; returns True if there was one."""
        ...

    async def remove_bound(self, bound: bytes) -> int:
        """Deletes sessions that are bound to a connection, many at a time; returns their number, 0 if none is left."""
        ...

    async def count(self, model: ModelKey, bundle: bytes) -> int:
        """Returns the number of sessions on a model version with the content that `bundle` identifies."""
        ...

    async def owned(self, owner: str) -> int:
        """Returns the number of sessions of an owner."""
        ...

    async def listed(self, limit: int) -> list[Listed]:
        """Returns up to `limit` sessions, the most recently used first."""
        ...

    def confirm_takeover(self) -> None:
        """Removes the file from which sessions were loaded, once this process serves."""
        ...

    async def close(self) -> None:
        """Closes the store; saves the sessions first if they are to outlive the process."""
        ...


def new_revision() -> bytes:
    """Returns an identifier that no other write has."""
    return secrets.token_bytes(12)


def parse(raw: bytes) -> Session:
    """Parses a stored session.

    Raises:
        SequenceStateError: the bytes are not a session of a format that this server reads.
    """
    try:
        session = Session.FromString(raw)
    except Exception:  # protobuf's own DecodeError, or what a broken message makes of its implementation
        session = Session()
    if session.format != FORMAT:
        problem = f"the session is stored in format {session.format}, this server reads format {FORMAT}"
        raise SequenceStateError(problem, "session_id")
    return session


def lifetime(session: Session, ttl: float) -> float:
    """Returns the seconds for which a session is kept from now on."""
    return min(ttl, ENDED_SECONDS) if session.ended else ttl


def expired(ttl: float) -> SessionExpiredError:
    """Returns the error for a session that was unused for too long."""
    return SessionExpiredError(f"the session was unused for more than {ttl:g} s and has expired", "session_id")


def pushed_out() -> SessionExpiredError:
    """Returns the error for a session that made room for others."""
    return SessionExpiredError("the session was the least recently used and made room for others", "session_id")
