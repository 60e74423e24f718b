"""What can go wrong with a caller's request, in the domain's own terms; interceptors.py gives each its status."""

from collections.abc import Mapping

MOST_SAID = 1024
"""Bytes of a message to a caller, at most: gRPC's clients refuse a call whose trailers have more than 8 KiB."""
_FIELD_SAID = 128


def shortened(text: str, most: int = MOST_SAID) -> str:
    """The text, without its middle where it has more than `most` bytes."""
    raw = text.encode(errors="replace")
    if len(raw) <= most:
        return text
    half = (most - 5) // 2
    return f"{raw[:half].decode(errors='ignore')} ... {raw[-half:].decode(errors='ignore')}"


class RequestError(Exception):
    """A request can't be served. The message is for the caller; it carries no feature values and no secrets.

    Args:
        description: What is wrong, with the limit or the expected value; what is too long to be told is shortened.
        field: The request field at fault, in protobuf's path syntax; empty where none is.

    Attributes:
        reason: What a program can tell it by, for google.rpc.ErrorInfo; empty where the status says it all.
    """

    reason = ""

    def __init__(self, description: str, field: str = "") -> None:
        # Both can hold what a caller sent, at any length.
        self.description = shortened(description)
        self.field = shortened(field, _FIELD_SAID)
        super().__init__(self._message())

    def rename(self, fields: Mapping[str, str]) -> None:
        """Says of the field at fault what it is called where the caller wrote it.

        Args:
            fields: Its names there by its names where the error was raised; what is not in it stays.
        """
        self.field = fields.get(self.field, self.field)
        self.args = (self._message(),)

    def _message(self) -> str:
        return f"{self.field}: {self.description}" if self.field else self.description


class InvalidRequestError(RequestError):
    """A field's value is wrong, whatever the state of the server."""


class ModelNotFoundError(RequestError):
    """No such model or version is served."""


class ModelRefusedError(RequestError):
    """The repository holds the model, but nothing of it that can be served."""

    reason = "MODEL_REFUSED"


class SequenceStateError(RequestError):
    """The request does not fit the state that its sequence is in, or the snapshot it brings."""


class OverloadedError(RequestError):
    """There is no room for more work, or none that would be done in time.

    Args:
        description: What is full, with the limit.
        retry_after: Seconds after which to try again.
        reason: Which room: see admission.py.
    """

    def __init__(self, description: str, retry_after: float, reason: str = "") -> None:
        super().__init__(description)
        self.retry_after = retry_after
        self.reason = reason or type(self).reason


class ExpiredError(RequestError):
    """The caller's deadline passed before the work could be done."""


class DrainingError(RequestError):
    """The server is shutting down and takes no new work."""


class NotOfferedError(RequestError):
    """What is asked for is not done here."""


class InternalError(RequestError):
    """The server failed; the log has the cause."""


class UnauthenticatedError(RequestError):
    """The call brings no credentials that are known."""


class ForbiddenError(RequestError):
    """The caller is known and may not do this."""


class SessionNotFoundError(RequestError):
    """No session has this id, or it is somebody else's."""

    reason = "SESSION_UNKNOWN"


class SessionExpiredError(RequestError):
    """The session rested for too long, or had to make room for others."""

    reason = "SESSION_EXPIRED"


class SessionTakenError(RequestError):
    """Another writer has moved the session on meanwhile."""

    reason = "SESSION_TAKEN"


class SessionRoomError(RequestError):
    """There is no room for another session."""

    reason = "SESSION_ROOM"


class SessionStoreError(RequestError):
    """Where the sessions are kept does not answer."""

    reason = "SESSION_STORE"


class StartupError(Exception):
    """The server can't start as configured; the message is one line."""


class SessionsLostError(Exception):
    """The server ends and could not save its sessions; the message is one line."""
