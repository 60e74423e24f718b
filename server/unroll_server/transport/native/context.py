"""The context of a call for handlers and middleware."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import grpc.aio

from unroll_server.transport.native._http2 import Call
from unroll_server.transport.native.running import Run

if TYPE_CHECKING:
    from unroll_server.transport.native.connection import Connection


class Context:
    """The context of a call; see middleware.CallContext.

    Args:
        call: The call on the wire.
        connection: Its connection.
        sent: Called after data was queued.

    Attributes:
        parse: Parses a request message; None to pass bytes.
        serialize: Serializes a response message; None to accept bytes.
        unread: The only message of the call, if the handler reads it; None once it has.
        task: Runs the handler, and is cancelled when the call is aborted; None once it has ended.
        trailers: Metadata to end the call with.
    """

    __slots__ = (
        "_call",
        "_code",
        "_connection",
        "_done",
        "_readable",
        "_sent",
        "_writable",
        "parse",
        "serialize",
        "task",
        "trailers",
        "unread",
    )

    def __init__(self, call: Call, connection: "Connection", sent: Callable[[], None]) -> None:
        self._call = call
        self._connection = connection
        self._sent = sent
        self._code: grpc.StatusCode | None = None
        self.trailers: Sequence[tuple[str, str | bytes]] = ()
        self._done: list[Callable[[Any], None]] | None = None
        # Wait for a message or the end of the requests, and for room to write.
        self._readable: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self.parse: Callable[[bytes], Any] | None = None
        self.serialize: Callable[[Any], bytes] | None = None
        self.unread: bytes | None = None
        self.task: asyncio.Task[None] | Run | None = None

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        """See CallContext."""
        return self._call.metadata

    def peer(self) -> str:
        """See CallContext."""
        return self._connection.peer

    def auth_context(self) -> Mapping[str, Sequence[bytes]]:
        """See CallContext."""
        return self._connection.auth

    @property
    def connection_closed(self) -> asyncio.Future[None]:
        """Done once the connection has closed. grpcio reports no such event, so its contexts have no such attribute."""
        return self._connection.closed

    def time_remaining(self) -> float | None:
        """See CallContext."""
        deadline = self._call.deadline
        return None if deadline == math.inf else max(0.0, deadline - time.monotonic())

    def code(self) -> Any:
        """See CallContext."""
        return self._code

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """See CallContext."""
        self.trailers = trailing_metadata

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """See CallContext."""
        self._call.reports_end = True
        self._done = [*(self._done or ()), callback]

    async def read(self) -> Any:
        """See CallContext."""
        if self.unread is not None:
            message, self.unread = self.unread, None
            return message
        while True:
            data = self._call.receive()
            self._sent()
            if data is not None:
                return self.parse(data) if self.parse else data
            if self._call.ended:
                return grpc.aio.EOF
            self._readable = self._waiting()
            await self._readable

    async def requests(self) -> AsyncIterator[Any]:
        """Yields the request messages, until the caller half-closes."""
        while (request := await self.read()) is not grpc.aio.EOF:
            yield request

    async def write(self, message: Any) -> None:
        """See CallContext."""
        room = self._call.send(self.serialize(message) if self.serialize else message)
        self._sent()
        if not room:
            self._writable = self._waiting()
            await self._writable

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        """See CallContext."""
        self._code = code
        self._call.finish(code.value[0], details, trailing_metadata or self.trailers)
        self._sent()
        raise grpc.aio.AbortError

    def finish(self, code: int = 0, details: str = "") -> None:
        """Ends the call, if it has not ended."""
        self._call.finish(code, details, self.trailers)
        self._sent()

    def _waiting(self) -> asyncio.Future[None]:
        if self._call.finished:
            # The call was aborted while the handler did something else.
            raise asyncio.CancelledError
        return asyncio.get_running_loop().create_future()

    def resume_reading(self) -> None:
        """Resumes the reader: a message or the end of the requests has arrived."""
        if self._readable and not self._readable.done():
            self._readable.set_result(None)

    def resume_writing(self) -> None:
        """Resumes the writer: there is room for messages."""
        if self._writable and not self._writable.done():
            self._writable.set_result(None)

    def abandon(self) -> None:
        """Stops the handler: the call is over."""
        if self.task:
            self.task.cancel()
        if not self._call.reports_end:
            self._call.context = None

    def close(self) -> None:
        """Runs the callbacks: the answer was taken, or never will be."""
        for callback in self._done or ():
            callback(self)
        self._done = self._call.context = None
