"""Errors of the server, besides those of the engine; status.py maps them to statuses."""

from unroll_engine.errors import RequestError


class ModelRefusedError(RequestError):
    """The repository holds the model, but no version of it can be served."""

    reason = "MODEL_REFUSED"


class DrainingError(RequestError):
    """The server is shutting down and has not run the call, or only a part of it."""

    def __init__(self, part: str = "this call") -> None:
        super().__init__(f"the server is shutting down and has not run {part}")


class NotOfferedError(RequestError):
    """The server does not implement the request."""


class UnauthenticatedError(RequestError):
    """The call has no known credentials."""


class ForbiddenError(RequestError):
    """The caller is known and lacks the right."""


class SessionNotFoundError(RequestError):
    """No session has this id, or another identity owns it."""

    reason = "SESSION_UNKNOWN"


class SessionExpiredError(RequestError):
    """The session was unused for too long, or made room for others."""

    reason = "SESSION_EXPIRED"


class SessionTakenError(RequestError):
    """Another writer advanced the session in the meantime."""

    reason = "SESSION_TAKEN"


class SessionRoomError(RequestError):
    """The store has no room for another session."""

    reason = "SESSION_ROOM"


class SessionStoreError(RequestError):
    """The session store does not answer."""

    reason = "SESSION_STORE"


class StartupError(Exception):
    """The server can't start as configured; the message is one line."""


class SessionsLostError(Exception):
    """The sessions could not be saved at the end; the message is one line."""


class UndrainedError(Exception):
    """The server has cancelled calls in flight at its end; the message is one line."""
