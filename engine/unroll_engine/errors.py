"""Errors of the engine. Each message is for the caller: it carries no feature values and no secrets."""

from collections.abc import Mapping

MAX_MESSAGE_BYTES = 1024
"""Most bytes of a message: gRPC's clients refuse a call whose trailers have more than 8 KiB."""
_MAX_FIELD_BYTES = 128


def shortened(text: str, most: int = MAX_MESSAGE_BYTES) -> str:
    """Returns the text, without its middle if it has more than `most` bytes."""
    raw = text.encode(errors="replace")
    if len(raw) <= most:
        return text
    half = (most - 5) // 2
    return f"{raw[:half].decode(errors='ignore')} ... {raw[-half:].decode(errors='ignore')}"


class RequestError(Exception):
    """A request can't be served.

    Args:
        description: The problem, with the limit or the expected value; shortened if it is too long.
        field: The request field at fault, in protobuf's path syntax; empty if there is none.

    Attributes:
        reason: Identifies the error to a program, for google.rpc.ErrorInfo; empty if the class suffices.
        sequence: Index of the sequence at fault in its batch; None if it is not about the values of one.
    """

    reason = ""
    sequence: int | None = None

    def __init__(self, description: str, field: str = "") -> None:
        # Both may quote the caller's input at any length.
        self.description = shortened(description)
        self.field = shortened(field, _MAX_FIELD_BYTES)
        super().__init__(self._message())

    def rename(self, fields: Mapping[str, str]) -> None:
        """Renames the field at fault to the caller's name for it.

        Args:
            fields: The caller's names by those used when the error was raised; others stay as they are.
        """
        self.field = fields.get(self.field, self.field)
        self.args = (self._message(),)

    def _message(self) -> str:
        return f"{self.field}: {self.description}" if self.field else self.description


class InvalidRequestError(RequestError, ValueError):
    """A value is invalid in any state of the engine."""


class ModelNotFoundError(RequestError):
    """The model or version is not loaded."""


class SequenceStateError(RequestError, ValueError):
    """The request does not fit the state of its sequence, or its snapshot does not fit the model."""


class OverloadedError(RequestError):
    """The queue is full, or the answer would come too late.

    Args:
        description: The exhausted resource, with its limit.
        retry_after: Seconds after which to retry.
        reason: Name of the limit; see admission.py.
    """

    def __init__(self, description: str, retry_after: float, reason: str = "") -> None:
        super().__init__(description)
        self.retry_after = retry_after
        self.reason = reason or type(self).reason


IDENTITY_LIMIT = "IDENTITY_LIMIT"
"""Reason of an OverloadedError: the caller's identity has used up a quota."""


def over_quota(identity: str, limit: int, what: str, retry_after: float) -> OverloadedError:
    """Returns the error for an identity that has used up a quota.

    Args:
        identity: Name of the identity.
        limit: Its quota.
        what: Name of what is counted, in the plural.
        retry_after: Seconds after which to retry.
    """
    return OverloadedError(f"{identity} may have at most {limit} {what} at once", retry_after, IDENTITY_LIMIT)


class ExpiredError(RequestError):
    """The deadline passed before the work was done."""


class InternalError(RequestError):
    """The runtime failed; the log has the cause."""


class RuntimeUnavailableError(Exception):
    """The requested runtime or device can't be used on this machine; the message is one line."""
