"""Middleware: code around the handlers of all methods, composed once per method at its registration."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import grpc


class CallContext(Protocol):
    """The part of grpc.aio.ServicerContext that handlers and middleware use; transports provide it for each call."""

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]] | None:
        """Returns the caller's metadata."""

    def peer(self) -> str:
        """Returns the address of the connection."""

    def auth_context(self) -> Mapping[str, Sequence[bytes]]:
        """Returns the properties of the caller's certificate; empty without one."""

    def time_remaining(self) -> float | None:
        """Returns the seconds to the deadline; None if there is none."""

    def code(self) -> Any:
        """Returns the status that the call was given; None or 0 if none was."""

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """Sets the trailers."""

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Adds a callback for when the call is over and its answer is taken."""

    async def read(self) -> Any:
        """Returns the next request message, or grpc.aio.EOF."""

    async def write(self, message: Any) -> None:
        """Writes a response message; returns when the transport has taken it."""

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        """Ends the call with a status, and raises grpc.aio.AbortError."""


Behavior = Callable[[Any, CallContext], Awaitable[Any]]
"""Handles a call: takes the request, or an iterator over the requests, and returns the response, or None after it has
written the responses to the context. Always a coroutine function."""


class Method(NamedTuple):
    """A method of a service, with the middleware composed so far.

    Attributes:
        path: `/package.Service/Method`.
        request_streaming: True if a call has many requests.
        response_streaming: True if a call has many responses.
        behavior: The handler inside the middleware composed so far.
    """

    path: str
    request_streaming: bool
    response_streaming: bool
    behavior: Behavior


class Middleware(Protocol):
    """Code around the handlers of all methods."""

    def wrap(self, method: Method) -> Behavior:
        """Returns the behavior to run instead of the method's own; the same if there is nothing to add."""
