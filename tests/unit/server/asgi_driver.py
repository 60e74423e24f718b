"""A driver for the ASGI front: gRPC calls without a network, and a check of ASGI's order of events."""

import asyncio
import urllib.parse
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc

from unroll_server.fronts.asgi import AsgiFront

PATIENCE = 30.0
Handler = Any  # grpc.RpcMethodHandler, which is generic to type checkers alone


def framed(*messages: bytes) -> bytes:
    """The messages uncompressed, end to end, as gRPC frames them."""
    return b"".join(b"\0" + len(message).to_bytes(4, "big") + message for message in messages)


def messages_in(body: bytes) -> list[bytes]:
    """The messages of a body of uncompressed frames."""
    found = []
    while body:
        assert body[0] == 0
        size = int.from_bytes(body[1:5], "big")
        assert len(body) >= 5 + size
        found.append(body[5 : 5 + size])
        body = body[5 + size :]
    return found


def front_of(*interceptors: Any, limit: int = 1000, **methods: Handler) -> AsgiFront:
    """A front that serves the methods under /t/NAME."""
    front = AsgiFront(interceptors, limit)
    front.registry.add_registered_method_handlers("t", methods)
    return front


class Exchange:
    """One request to an application.

    Args:
        front: The application.
        method: `Name` of /t/Name, or a whole path.
        headers: More than gRPC needs, or instead.
        polled: Whether the server is like Envoy's, which answers a request for more after the end at once; others wait
            until the caller leaves, as the specification has it.
        http: The request's method.
        without: The header of those that gRPC needs that it has not.

    Attributes:
        pieces: The pieces of the response's body.
        asked: How often the application has asked for a piece of the request.
        can_send: Cleared, the application's sends wait.
    """

    def __init__(
        self,
        front: AsgiFront,
        method: str,
        *headers: tuple[bytes, bytes],
        polled: bool = True,
        http: str = "POST",
        without: bytes = b"",
    ) -> None:
        path = method if method.startswith("/") else f"/t/{method}"
        usual = {b"content-type": b"application/grpc", b"te": b"trailers"}
        more = [item for item in usual.items() if item[0] not in (*dict(headers), without)]
        self._scope: dict[str, Any] = {"type": "http", "method": http, "path": path, "headers": [*more, *headers]}
        self._scope["client"] = ("127.0.0.1", 4242)
        self._front = front
        self._polled = polled
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._ended = False
        self.gone = asyncio.Event()
        self.can_send = asyncio.Event()
        self.can_send.set()
        self.asked = 0
        self.start: dict[str, Any] | None = None
        self.pieces: list[bytes] = []
        self.complete = asyncio.Event()
        self.progress = asyncio.Condition()
        self._trailers: list[tuple[bytes, bytes]] | None = None
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> "Exchange":
        """Hands the request to the application."""
        self._task = asyncio.create_task(self._front(self._scope, self._receive, self._send))
        return self

    def feed(self, body: bytes, more: bool = True) -> None:
        """Adds a piece of the request's body."""
        self._inbox.put_nowait({"type": "http.request", "body": body, "more_body": more})

    async def leave(self) -> None:
        """Resets the stream, as a caller who cancels does, and waits until the application has ended."""
        self.gone.set()
        await self.ended()

    async def ended(self) -> None:
        """Waits until the application has returned."""
        assert self._task
        await asyncio.wait_for(self._task, PATIENCE)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until the response got that far."""
        async with asyncio.timeout(PATIENCE), self.progress:
            await self.progress.wait_for(condition)

    async def _receive(self) -> dict[str, Any]:
        self.asked += 1
        if self._ended and self._polled and not self.gone.is_set():
            return {"type": "http.request", "body": b"", "more_body": False}
        getting = asyncio.ensure_future(self._inbox.get())
        leaving = asyncio.ensure_future(self.gone.wait())
        ending = asyncio.ensure_future(self.complete.wait())
        try:
            await asyncio.wait({getting, leaving, ending}, return_when=asyncio.FIRST_COMPLETED)
            if self.gone.is_set() or self.complete.is_set():
                return {"type": "http.disconnect"}
            event = getting.result()
            self._ended = not event["more_body"]
            return event
        finally:
            getting.cancel()
            leaving.cancel()
            ending.cancel()

    async def _send(self, event: dict[str, Any]) -> None:
        await self.can_send.wait()
        if self.gone.is_set():
            raise OSError("the peer is gone")
        assert not self.complete.is_set()
        kind = event["type"]
        if kind == "http.response.start":
            assert self.start is None
            self.start = event
        elif kind == "http.response.body":
            assert self.start is not None
            assert self._trailers is None
            self.pieces.append(event["body"])
            if not event["more_body"] and not self.start.get("trailers"):
                self.complete.set()
        else:
            assert kind == "http.response.trailers"
            assert self.start is not None
            self._trailers = event["headers"]
            self.complete.set()
        async with self.progress:
            self.progress.notify_all()

    @property
    def headers(self) -> dict[bytes, bytes]:
        assert self.start is not None
        return dict(self.start["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    @property
    def messages(self) -> list[bytes]:
        return messages_in(self.body)

    @property
    def trailers(self) -> list[tuple[bytes, bytes]]:
        """Those after the body, or those in the headers where there is nothing else."""
        assert self.complete.is_set()
        assert self.start is not None
        return self.start["headers"] if self._trailers is None else self._trailers

    @property
    def status(self) -> grpc.StatusCode:
        number = int(dict(self.trailers)[b"grpc-status"])
        return next(code for code in grpc.StatusCode if code.value[0] == number)

    @property
    def details(self) -> str:
        raw = dict(self.trailers).get(b"grpc-message", b"")
        assert all(0x20 <= byte <= 0x7E for byte in raw)
        return urllib.parse.unquote(raw.decode(), errors="strict")


async def ask(
    front: AsgiFront,
    method: str,
    *headers: tuple[bytes, bytes],
    body: bytes | Sequence[bytes] = framed(b""),
    **more: Any,
) -> Exchange:
    """Sends a whole request, in one piece or in several, and waits for the whole response."""
    exchange = Exchange(front, method, *headers, **more)
    pieces = [body] if isinstance(body, bytes) else list(body)
    for index, piece in enumerate(pieces):
        exchange.feed(piece, index < len(pieces) - 1)
    await exchange.begin().ended()
    return exchange


@asynccontextmanager
async def open_call(
    front: AsgiFront, method: str, *headers: tuple[bytes, bytes], **more: Any
) -> AsyncIterator[Exchange]:
    """A call whose request goes on; its caller leaves at the end of the block, if it has not ended."""
    exchange = Exchange(front, method, *headers, **more).begin()
    try:
        yield exchange
    finally:
        await exchange.leave()
