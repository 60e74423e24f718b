"""The native transport compared with grpcio's: the same status, details, metadata and messages."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

import grpc
import grpc.aio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.processes import PATIENCE
from support.transports import MakeTransport, make_native

from unroll_server.addresses import Address
from unroll_server.middleware.access_log import CallObserver
from unroll_server.telemetry.metrics import Metrics
from unroll_server.transport.grpcio import GrpcioTransport
from unroll_server.transport.registry import Registry

MESSAGE_BYTES = 100_000
STEP = 1.0
"""Seconds until a call that waits is over."""


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


class Outcome(NamedTuple):
    """Observations of both sides of a call."""

    code: grpc.StatusCode
    details: str
    messages: tuple[bytes, ...]
    trailers: Sequence[tuple[str, str | bytes]]
    seen: Sequence[tuple[str, str | bytes]]


async def outcome(channel: grpc.aio.Channel, handlers: Handlers, script: Script) -> Outcome:
    metadata = (("script", script.packed()), *script.metadata)
    options: Any = {
        "metadata": metadata,
        "compression": script.compression,
        "timeout": STEP if script.end == "deadline" else PATIENCE,
    }
    call: Any
    handlers.seen, messages = [], []
    try:
        method: Any
        if script.method in ("Unary", "None"):
            method = channel.unary_unary(f"/t/{script.method}")
            call = method(script.messages[0], **options)
        elif script.method == "Letters":
            method = channel.unary_stream("/t/Letters")
            call = method(script.messages[0], **options)
        else:
            call = channel.stream_stream("/t/Stream")(**options)
            for message in script.messages:
                await call.write(message)
            await call.done_writing()
        if script.end == "cancel":
            asyncio.get_running_loop().call_later(0.05, call.cancel)
        if script.method in ("Unary", "None"):
            messages.append(await call)
        else:
            messages += [message async for message in call]
    except (grpc.aio.AioRpcError, asyncio.CancelledError):
        pass
    trailers = sorted(await call.trailing_metadata() or (), key=repr) if script.end != "cancel" else []
    kept = tuple(messages) if script.end == "status" else ()
    return Outcome(await call.code(), await call.details(), kept, trailers, handlers.seen)


Side = tuple[grpc.aio.Channel, Handlers]


@pytest.fixture
async def sides() -> AsyncIterator[list[Side]]:
    """The native transport and grpcio's, each with a client."""
    made: list[Side] = []
    async with AsyncExitStack() as stack:
        makes: list[MakeTransport] = [make_native, GrpcioTransport]
        for make in makes:
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
            stack.push_async_callback(transport.stop, 0.0)
            made.append((await stack.enter_async_context(grpc.aio.insecure_channel(address)), handlers))
        yield made


NAMES = st.text("abcxyz0189-_.", max_size=8).map("k".__add__).filter(lambda name: not name.endswith("-bin"))
TEXTS = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=40)
PAIRS = st.lists(
    st.tuples(NAMES, TEXTS) | st.tuples(NAMES.map("{}-bin".format), st.binary(max_size=60)), max_size=5
).map(tuple)
SIZES = st.sampled_from([0, 1, 5, 1000, 16_384, 65_535, MESSAGE_BYTES, MESSAGE_BYTES + 1])
MESSAGES = st.binary(max_size=20) | st.builds(lambda size, seed: bytes([seed]) * size, SIZES, st.integers(0, 255))


def up_to_too_large(messages: list[bytes]) -> tuple[bytes, ...]:
    """Cuts after a message that ends the call, which grpcio's client may report as its own error while it writes."""
    large = (index + 1 for index, message in enumerate(messages) if len(message) > MESSAGE_BYTES)
    return tuple(messages[: next(large, None)])


SCRIPTS = st.builds(
    Script,
    method=st.sampled_from(["Unary", "Stream", "Letters", "None"]),
    messages=st.lists(MESSAGES, min_size=1, max_size=4).map(up_to_too_large),
    metadata=PAIRS,
    compression=st.sampled_from(list(grpc.Compression)),
    answers=st.integers(0, 3),
    code=st.sampled_from(sorted(CODES)),
    details=st.text(max_size=40),
    trailers=PAIRS,
    end=st.sampled_from(["status"] * 12 + ["raise", "raise", "cancel"]),
    # A call that a large message ends may or may not end before its caller cancels it.
).filter(lambda script: script.end != "cancel" or max(map(len, script.messages)) <= MESSAGE_BYTES)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=SCRIPTS)
async def test_calls_end_alike(sides: list[Side], script: Script) -> None:
    native, grpcio = [await outcome(*side, script) for side in sides]
    assert native == grpcio


@pytest.mark.parametrize("method", ["Unary", "Stream", "Letters"])
async def test_calls_that_wait_end_alike_at_their_deadline(sides: list[Side], method: str) -> None:
    script = Script(method, (b"x", b"y"), (), grpc.Compression.NoCompression, 1, 0, "", (), "deadline")
    # The details depend on whether the server or the client notices the deadline first.
    assert {(await outcome(*side, script)).code for side in sides} == {grpc.StatusCode.DEADLINE_EXCEEDED}
