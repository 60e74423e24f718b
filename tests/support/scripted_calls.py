"""Calls whose caller says what their handler does, and two servers that do it: one of each transport."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import grpc
import grpc.aio
from hypothesis import strategies as st

from support.transports import MakeTransport
from unroll_server.addresses import Address
from unroll_server.middleware.access_log import CallObserver
from unroll_server.telemetry.metrics import Metrics
from unroll_server.transport.registry import Registry

MESSAGE_BYTES = 100_000
NAMES = st.text("abcxyz0189-_.", max_size=8).map("k".__add__).filter(lambda name: not name.endswith("-bin"))
TEXTS = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=40)
PAIRS = st.lists(
    st.tuples(NAMES, TEXTS) | st.tuples(NAMES.map("{}-bin".format), st.binary(max_size=60)), max_size=5
).map(tuple)


class Script(NamedTuple):
    """A call: what the client does, and what the handler does with it.

    Attributes:
        method: The method.
        messages: Requests.
        metadata: Metadata of the client.
        compression: Compression of the requests.
        answers: Times that the handler returns each request.
        code: The status.
        details: Its message.
        trailers: Trailers of the handler.
        end: End of the call: "status", "raise", "cancel" by the client, or "deadline".
    """

    method: str
    messages: tuple[bytes, ...]
    metadata: tuple[tuple[str, str | bytes], ...]
    compression: grpc.Compression
    answers: int
    code: int
    details: str
    trailers: tuple[tuple[str, str | bytes], ...]
    end: str

    def packed(self) -> str:
        """Returns the handler's part, for a header."""
        trailers = [(name, list(value) if isinstance(value, bytes) else value) for name, value in self.trailers]
        return json.dumps([self.answers, self.code, self.details, trailers, self.end])


CODES = {code.value[0]: code for code in grpc.StatusCode}


class Handlers:
    """Handlers that follow the metadata of a call."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str | bytes]] = []

    async def unary(self, request: bytes, context: Any) -> bytes:
        answers = await self._do(context, True)
        return request * answers

    async def stream(self, requests: AsyncIterator[bytes], context: Any) -> None:
        answers = await self._do(context, False)
        async for request in requests:
            for _ in range(answers):
                await context.write(request)
        await self._do(context, True)

    async def letters(self, request: bytes, context: Any) -> None:
        answers = await self._do(context, False)
        for begin in range(0, len(request), 1000):
            for _ in range(answers):
                await context.write(request[begin : begin + 1000])
        await self._do(context, True)

    async def _do(self, context: Any, ends: bool) -> int:
        metadata = dict(context.invocation_metadata())
        answers, code, details, trailers, end = json.loads(metadata["script"])
        self.seen = sorted(each for each in context.invocation_metadata() if each[0].startswith("k"))
        if ends:
            if end in ("cancel", "deadline"):
                await asyncio.Event().wait()
            if end == "raise":
                raise ValueError(details)
            made = tuple((name, bytes(value) if isinstance(value, list) else value) for name, value in trailers)
            context.set_trailing_metadata(made)
            if code:
                await context.abort(CODES[code], details, made)
        return int(answers)


class Side(NamedTuple):
    """A server of the methods Unary, Stream and Letters of the service `t`.

    Attributes:
        address: HOST:PORT.
        channel: A client's, to it.
        handlers: Its handlers.
        registry: Its registry.
    """

    address: str
    channel: grpc.aio.Channel
    handlers: Handlers
    registry: Registry


@asynccontextmanager
async def serving(make: MakeTransport) -> AsyncIterator[Side]:
    """Serves on a transport."""
    handlers = Handlers()
    registry = Registry(CallObserver(Metrics()))
    registry.add_registered_method_handlers(
        "t",
        {
            "Unary": grpc.unary_unary_rpc_method_handler(handlers.unary),
            "Stream": grpc.stream_stream_rpc_method_handler(handlers.stream),
            "Letters": grpc.unary_stream_rpc_method_handler(handlers.letters),
        },
    )
    transport = make(Address.of("--listen", "127.0.0.1:0"), registry, MESSAGE_BYTES)
    address = await transport.start()
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            yield Side(address, channel, handlers, registry)
    finally:
        await transport.stop(0.0)
