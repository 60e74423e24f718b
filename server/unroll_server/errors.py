"""What can go wrong with a caller's request, in the domain's own terms; interceptors.py gives each its status."""


class RequestError(Exception):
    """A request can't be served. The message is for the caller; it carries no feature values and no secrets.

    Args:
        description: What is wrong, with the limit or the expected value.
        field: The request field at fault, in protobuf's path syntax; empty where none is.
    """

    def __init__(self, description: str, field: str = "") -> None:
        super().__init__(f"{field}: {description}" if field else description)
        self.description = description
        self.field = field


class InvalidRequestError(RequestError):
    """A field's value is wrong, whatever the state of the server."""


class ModelNotFoundError(RequestError):
    """No such model or version is served."""


class SequenceStateError(RequestError):
    """The request does not fit the state that its sequence is in, or the snapshot it brings."""


class OverloadedError(RequestError):
    """The queue is full.

    Args:
        retry_after: Seconds after which to try again.
    """

    def __init__(self, description: str, retry_after: float) -> None:
        super().__init__(description)
        self.retry_after = retry_after


class ExpiredError(RequestError):
    """The caller's deadline passed before the work could be done."""


class DrainingError(RequestError):
    """The server is shutting down and takes no new work."""


class InternalError(RequestError):
    """The server failed; the log has the cause."""


class StartupError(Exception):
    """The server can't start as configured; the message is one line."""
