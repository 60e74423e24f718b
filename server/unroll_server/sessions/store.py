"""What a store of sessions does: one writer at a time goes on with a session, and none that was overtaken."""

import secrets
import time
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from unroll_engine.errors import SequenceStateError
from unroll_engine.models.spec import ModelKey
from unroll_proto.v1.session_pb2 import Session
from unroll_server.errors import SessionExpiredError

FORMAT = 1
"""Meaning of a kept `unroll.v1.Session`."""
ENDED_SECONDS = 60.0
"""How long the end of a session can be answered again."""


class Kept(NamedTuple):
    """A session as it was read.

    Attributes:
        session: What is kept of it.
        revision: Names this writing of it among all others.
    """

    session: Session
    revision: bytes


@dataclass(frozen=True, slots=True)
class Listed:
    """One session in the list of all.

    Attributes:
        owner: Whose it is.
        session_id: Its id.
        model: What it runs on.
        step: Timesteps consumed.
        expires_in: Seconds that it may rest from now on.
    """

    owner: str
    session_id: str
    model: ModelKey
    step: int
    expires_in: float


class Store(Protocol):
    """Keeps sessions by owner and id, each for a time after its last use.

    Every method raises SessionStoreError where the store does not answer.
    """

    async def get(self, owner: str, session_id: str) -> Kept | None:
        """Reads a session, which counts as a use; None where there is none.

        Raises:
            SessionExpiredError: it rested for too long or had to make room, as far as that is remembered.
        """
        ...

    async def put(self, session: Session, before: bytes | None) -> bool:
        """Keeps a session, one that has ended for `ENDED_SECONDS` at most.

        Args:
            session: What to keep.
            before: The revision that it follows; None where there was none.

        Returns:
            False, with nothing changed, where another writer was faster.

        Raises:
            SessionRoomError: there is no room for it.
        """
        ...

    async def remove(self, owner: str, session_id: str) -> bool:
        """Forgets a session as if it had never been; returns whether there was one."""
        ...

    async def count(self, model: ModelKey, bundle: bytes) -> int:
        """How many sessions stay on a model version, on the content of it that `bundle` tells."""
        ...

    async def owned(self, owner: str) -> int:
        """How many sessions an owner has."""
        ...

    async def listed(self, limit: int) -> list[Listed]:
        """Up to `limit` sessions, those used last first."""
        ...

    def keep(self) -> None:
        """Says that what was taken over from an earlier process is in good hands."""
        ...

    async def close(self) -> None:
        """Lets go of what the store holds, and saves what is to outlive the process."""
        ...


def new_revision() -> bytes:
    """A name that no other writing has."""
    return secrets.token_bytes(12)


def parse(raw: bytes) -> Session:
    """Reads what a store has kept.

    Raises:
        SequenceStateError: it is no session that this server understands.
    """
    try:
        session = Session.FromString(raw)
    except Exception:  # protobuf's own DecodeError, or what a broken message makes of its implementation
        session = Session()
    if session.format != FORMAT:
        problem = f"is kept in format {session.format}, this server reads {FORMAT}"
        raise SequenceStateError(problem, "session_id")
    return session


def lifetime(session: Session, ttl: float) -> float:
    """Seconds that a session is kept from now on."""
    return min(ttl, ENDED_SECONDS) if session.ended else ttl


def expired(ttl: float) -> SessionExpiredError:
    """The error for a session that rested too long."""
    return SessionExpiredError(f"the session rested for more than {ttl:g} s and is gone", "session_id")


def pushed_out() -> SessionExpiredError:
    """The error for a session that had to make room for others."""
    return SessionExpiredError("the session was the longest unused and had to make room for others", "session_id")


def wall_clock() -> float:
    """Seconds since 1970: a session's time goes on while no server runs."""
    return time.time()
