"""How calls end on the ASGI front: deadlines, callers who leave, slow readers, drains; and what stands before them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from unit.server.asgi_driver import PATIENCE, Exchange, ask, framed, front_of, open_call

from unroll_engine.errors import InvalidRequestError
from unroll_server.endless import EndlessCalls
from unroll_server.fronts.asgi import LOOKS
from unroll_server.fronts.asgi_streams import HIGH_WATER
from unroll_server.interceptors import StatusInterceptor

UNARY = grpc.unary_unary_rpc_method_handler
STREAM = grpc.stream_stream_rpc_method_handler


class Sleeper:
    """Servicers that wait for ever, and remember how they were ended."""

    def __init__(self) -> None:
        self.contexts: list[Any] = []
        self.begun = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.called_back = asyncio.Event()

    async def sleep(self, context: Any) -> None:
        self.contexts.append(context)
        context.add_done_callback(lambda _: self.called_back.set())
        self.begun.set()
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def unary(self, request: bytes, context: Any) -> bytes:
        await self.sleep(context)
        return request

    async def stream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request
            if request == b"sleep":
                await self.sleep(context)

    async def reading(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        self.begun.set()
        try:
            async for _ in requests:
                pass
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        yield b""

    def front(self, *interceptors: Any) -> Any:
        return front_of(
            *interceptors,
            limit=10**6,
            unary=UNARY(self.unary),
            stream=STREAM(self.stream),
            reading=STREAM(self.reading),
        )


async def soon(event: asyncio.Event) -> None:
    await asyncio.wait_for(event.wait(), PATIENCE)


@pytest.mark.parametrize("polled", [True, False])
@pytest.mark.parametrize(
    ("method", "body", "more"),
    [
        ("unary", framed(b""), False),
        ("stream", framed(b"sleep"), False),
        ("stream", framed(b"sleep"), True),
        ("stream", framed(b"sleep", b"unread"), True),
        ("reading", framed(b""), True),
    ],
)
async def test_a_caller_who_leaves_cancels_the_servicer_wherever_it_waits(
    polled: bool, method: str, body: bytes, more: bool
) -> None:
    sleeper = Sleeper()
    exchange = Exchange(sleeper.front(), method, polled=polled)
    exchange.feed(body, more)
    exchange.begin()
    await soon(sleeper.begun)
    assert not sleeper.cancelled.is_set()
    await exchange.leave()
    assert sleeper.cancelled.is_set()
    assert not exchange.complete.is_set()
    if sleeper.contexts:
        assert sleeper.called_back.is_set()
        assert sleeper.contexts[0].cancelled()
        assert sleeper.contexts[0].done()


async def test_many_callers_who_leave_are_all_missed() -> None:
    sleeper = Sleeper()
    front = sleeper.front()
    exchanges = [Exchange(front, "unary") for _ in range(3 * LOOKS)]
    for exchange in exchanges:
        exchange.feed(framed(b""), more=False)
        exchange.begin()
    await soon(sleeper.begun)
    await asyncio.gather(*(exchange.leave() for exchange in exchanges))


async def test_a_caller_who_leaves_before_the_request_is_whole_is_not_served() -> None:
    sleeper = Sleeper()
    async with open_call(sleeper.front(), "unary") as call:
        call.feed(framed(b"abc")[:4])
    assert not sleeper.begun.is_set()
    assert call.start is None


@pytest.mark.parametrize("method", ["unary", "stream"])
async def test_a_deadline_cancels_the_servicer_and_says_so(method: str) -> None:
    sleeper = Sleeper()
    answer = await ask(sleeper.front(), method, (b"grpc-timeout", b"20m"), body=framed(b"sleep"))
    assert sleeper.cancelled.is_set()
    assert sleeper.contexts[0].time_remaining() == 0
    assert answer.status is grpc.StatusCode.DEADLINE_EXCEEDED
    assert answer.messages == ([b"sleep"] if method == "stream" else [])


async def test_a_deadline_that_has_passed_reaches_no_servicer() -> None:
    sleeper = Sleeper()
    answer = await ask(sleeper.front(), "unary", (b"grpc-timeout", b"0n"))
    assert answer.status is grpc.StatusCode.DEADLINE_EXCEEDED
    assert not sleeper.begun.is_set()
    malformed = await ask(sleeper.front(), "unary", (b"grpc-timeout", b"soon"))
    assert malformed.status is grpc.StatusCode.INTERNAL


@pytest.mark.parametrize("begun", [None, b"", framed(b"sleep")[:7], framed(b"sleep")])
async def test_a_request_that_never_ends_is_over_at_its_deadline(begun: bytes | None) -> None:
    sleeper = Sleeper()
    async with open_call(sleeper.front(), "unary", (b"grpc-timeout", b"20m")) as call:
        if begun is not None:
            call.feed(begun)
        await call.ended()
    assert call.status is grpc.StatusCode.DEADLINE_EXCEEDED
    assert not sleeper.begun.is_set()


async def test_a_request_that_never_ends_does_not_keep_a_drain_past_its_grace() -> None:
    sleeper = Sleeper()
    front = sleeper.front()
    async with open_call(front, "unary") as call:
        call.feed(framed(b"sleep")[:7])
        for _ in range(20):
            await asyncio.sleep(0)
        assert call.asked == 2
        await asyncio.wait_for(front.stop(0), PATIENCE)
        await call.ended()
    assert call.status is grpc.StatusCode.UNAVAILABLE
    assert not sleeper.begun.is_set()


async def test_without_a_deadline_there_is_no_time_remaining() -> None:
    async def remaining(request: bytes, context: Any) -> bytes:
        assert context.time_remaining() is None
        return request

    assert (await ask(front_of(remaining=UNARY(remaining)), "remaining")).status is grpc.StatusCode.OK


async def test_a_slow_reader_stops_the_servicer_and_loses_nothing() -> None:
    made = 0

    async def endless(request: bytes, context: Any) -> AsyncIterator[bytes]:
        nonlocal made
        while made < 1000:
            made += 1
            yield made.to_bytes(4, "big") + bytes(1020)

    front = front_of(endless=grpc.unary_stream_rpc_method_handler(endless))
    exchange = Exchange(front, "endless")
    exchange.feed(framed(b""), more=False)
    exchange.can_send.clear()
    exchange.begin()
    before = -1
    while made != before:
        before = made
        for _ in range(20):
            await asyncio.sleep(0)
    # One piece under way, and as much again that waits for it.
    assert 0 < made <= 2 * HIGH_WATER // 1024 + 2
    exchange.can_send.set()
    await exchange.ended()
    assert [int.from_bytes(message[:4], "big") for message in exchange.messages] == list(range(1, 1001))


async def test_a_servicer_that_does_not_read_is_not_sent_more() -> None:
    sleeper = Sleeper()
    async with open_call(sleeper.front(), "stream") as call:
        call.feed(framed(b"sleep", bytes(HIGH_WATER)))
        for _ in range(10):
            call.feed(framed(bytes(1000)))
        await soon(sleeper.begun)
        # It is asked now and then whether the caller is there, but no piece is taken past the mark.
        before = call.asked
        other = await ask(sleeper.front(), "stream", (b"grpc-timeout", b"100m"), body=framed(b"sleep"))
        assert other.status is grpc.StatusCode.DEADLINE_EXCEEDED
        assert call.asked == before


async def test_a_drain_waits_for_calls_in_flight_and_takes_no_new_ones() -> None:
    begun, release = asyncio.Event(), asyncio.Event()

    async def waits(request: bytes, context: Any) -> bytes:
        begun.set()
        await release.wait()
        return request

    front = front_of(waits=UNARY(waits))
    exchange = Exchange(front, "waits")
    exchange.feed(framed(b"x"), more=False)
    exchange.begin()
    await soon(begun)
    stopping = asyncio.create_task(front.stop(PATIENCE))
    await asyncio.sleep(0)
    assert (await ask(front, "waits")).status is grpc.StatusCode.UNAVAILABLE
    assert not stopping.done()
    release.set()
    await asyncio.wait_for(stopping, PATIENCE)
    await exchange.ended()
    assert exchange.messages == [b"x"]


@pytest.mark.parametrize("method", ["unary", "stream"])
async def test_what_outlives_the_grace_is_cancelled(method: str) -> None:
    sleeper = Sleeper()
    front = sleeper.front()
    exchange = Exchange(front, method)
    exchange.feed(framed(b"sleep"), more=False)
    exchange.begin()
    await soon(sleeper.begun)
    await front.stop(0)
    assert sleeper.cancelled.is_set()
    assert exchange.status is grpc.StatusCode.UNAVAILABLE
    await front.stop(0)


class Recorder(grpc.aio.ServerInterceptor):
    """Remembers what it was asked about."""

    def __init__(self, per_method: bool) -> None:
        self.per_method = per_method
        self.asked: list[tuple[str, Any]] = []

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        self.asked.append((handler_call_details.method, handler_call_details.invocation_metadata))
        return await continuation(handler_call_details)


@pytest.mark.parametrize("per_method", [True, False])
async def test_interceptors_are_asked_for_each_call_unless_they_need_not_be(per_method: bool) -> None:
    recorder = Recorder(per_method)
    front = Sleeper().front(recorder)
    for user in (b"x", b"y"):
        assert (await ask(front, "stream", (b"user", user), body=b"")).status is grpc.StatusCode.OK
    expected = [("/t/stream", (("user", "x"),)), ("/t/stream", (("user", "y"),))]
    assert recorder.asked == (expected[:1] if per_method else expected)


async def test_domain_errors_become_statuses_and_endless_calls_end() -> None:
    async def refuses(request: bytes, context: Any) -> bytes:
        raise InvalidRequestError("too small", "field")

    async def refuses_late(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        yield b"1"
        raise InvalidRequestError("too late", "field")

    async def breaks(request: bytes, context: Any) -> bytes:
        raise ZeroDivisionError

    endless = EndlessCalls("some.Service")
    sleeper = Sleeper()
    front = front_of(
        StatusInterceptor(),
        endless,
        refuses=UNARY(refuses),
        refuses_late=STREAM(refuses_late),
        breaks=UNARY(breaks),
        stream=STREAM(sleeper.stream),
    )
    refused = await ask(front, "refuses")
    assert (refused.status, refused.details) == (grpc.StatusCode.INVALID_ARGUMENT, "field: too small")
    assert b"grpc-status-details-bin" in dict(refused.trailers)
    late = await ask(front, "refuses_late", body=b"")
    assert (late.messages, late.status) == ([b"1"], grpc.StatusCode.INVALID_ARGUMENT)
    assert (await ask(front, "breaks")).status is grpc.StatusCode.INTERNAL
    async with open_call(front, "stream") as call:
        call.feed(framed(b"sleep"))
        await soon(sleeper.begun)
        endless.end(0)
        await call.ended()
        assert (call.messages, call.status) == ([b"sleep"], grpc.StatusCode.UNAVAILABLE)
