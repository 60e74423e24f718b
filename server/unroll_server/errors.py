"""Errors of the server, on top of the engine's; status.py has the status of each."""

from unroll_engine.errors import RequestError


class ModelRefusedError(RequestError):
    """The repository holds the model, but no version of it can be served."""

    reason = "MODEL_REFUSED"


class DrainingError(RequestError):
    """The server is shutting down, and has not run the call, or not all of it."""

    def __init__(self, part: str = "this call") -> None:
        super().__init__(f"the server is shutting down and has not run {part}")


class NotOfferedError(RequestError):
    """What is asked for is not done here."""


class UnauthenticatedError(RequestError):
    """The call brings no credentials that are known."""


class ForbiddenError(RequestError):
    """The caller is known and may not do this."""


class SessionNotFoundError(RequestError):
    """There is no session of this id, or another identity owns it."""

    reason = "SESSION_UNKNOWN"


class SessionExpiredError(RequestError):
    """The session was unused for too long, or has made room for others."""

    reason = "SESSION_EXPIRED"


class SessionTakenError(RequestError):
    """Another writer has advanced the session meanwhile."""

    reason = "SESSION_TAKEN"


class SessionRoomError(RequestError):
    """There is no room for another session."""

    reason = "SESSION_ROOM"


class SessionStoreError(RequestError):
    """The store of the sessions does not answer."""

    reason = "SESSION_STORE"


class StartupError(Exception):
    """The server can't start as configured; the message is one line."""


class SessionsLostError(Exception):
    """The sessions could not be saved at the end; the message is one line."""


class UndrainedError(Exception):
    """The server ends and has cancelled calls in flight; the message is one line."""
