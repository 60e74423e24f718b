"""Calls of every kind on the ASGI front: what a servicer sees, and what its caller is answered."""

import asyncio
import gzip
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2
from hypothesis import given
from hypothesis import strategies as st
from unit.server.asgi_driver import ask, framed, front_of, messages_in, open_call

from unroll_proto.v1 import unroll_pb2 as pb
from unroll_server.fronts.asgi import AsgiFront
from unroll_server.interceptors import StatusInterceptor

UNARY = grpc.unary_unary_rpc_method_handler
STREAM = grpc.stream_stream_rpc_method_handler


async def echo(request: bytes, context: Any) -> bytes:
    return request


async def echo_all(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


async def repeat(request: bytes, context: Any) -> AsyncIterator[bytes]:
    for _ in range(int(request)):
        yield request


async def join(requests: AsyncIterator[bytes], context: Any) -> bytes:
    return b",".join([request async for request in requests])


def plain_front() -> AsgiFront:
    return front_of(
        echo=UNARY(echo),
        echo_all=STREAM(echo_all),
        repeat=grpc.unary_stream_rpc_method_handler(repeat),
        join=grpc.stream_unary_rpc_method_handler(join),
    )


@given(messages=st.lists(st.binary(max_size=50), max_size=5), positions=st.lists(st.integers(0, 300)))
def test_all_cardinalities_whatever_the_pieces_are(messages: list[bytes], positions: list[int]) -> None:
    async def check() -> None:
        front, body = plain_front(), framed(*messages)
        places = sorted({0, len(body), *(position % (len(body) + 1) for position in positions)})
        pieces = [body[begin:end] for begin, end in zip(places, [*places[1:], len(body)], strict=True)]
        assert (await ask(front, "echo_all", body=pieces)).messages == messages
        assert (await ask(front, "join", body=pieces)).messages == [b",".join(messages)]
        unary = await ask(front, "echo", body=pieces)
        if len(messages) == 1:
            assert (unary.messages, unary.status) == (messages, grpc.StatusCode.OK)
        else:
            assert (unary.messages, unary.status) == ([], grpc.StatusCode.UNIMPLEMENTED)
        assert (await ask(front, "repeat", body=framed(b"3"))).messages == [b"3"] * 3

    asyncio.run(check())


async def test_a_good_answer_has_its_headers_and_trailers() -> None:
    answer = await ask(plain_front(), "echo", body=framed(b"abc"))
    assert answer.start is not None
    assert answer.start["status"] == 200
    assert answer.headers[b"content-type"] == b"application/grpc"
    assert answer.headers[b"grpc-accept-encoding"] == b"identity,deflate,gzip"
    assert answer.trailers == [(b"grpc-status", b"0")]


@pytest.mark.parametrize("method", ["echo", "echo_all", "join", "repeat"])
@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        (framed(bytes(1001)), grpc.StatusCode.RESOURCE_EXHAUSTED, "SERVER: Received message larger than max"),
        (framed(b"abc")[:-1], grpc.StatusCode.INTERNAL, "ends within a message"),
        (b"\2" + framed(b"abc")[1:], grpc.StatusCode.INTERNAL, "a frame of kind 2"),
        (b"\1" + framed(b"abc")[1:], grpc.StatusCode.INTERNAL, "without grpc-encoding"),
    ],
)
async def test_a_body_that_breaks_the_rules_ends_the_call(
    method: str, body: bytes, code: grpc.StatusCode, says: str
) -> None:
    answer = await ask(plain_front(), method, body=body)
    assert answer.status is code
    assert says in answer.details


async def test_messages_are_unpacked_and_packed_as_agreed() -> None:
    async def packed(request: bytes, context: Any) -> AsyncIterator[bytes]:
        context.set_compression(grpc.Compression.Gzip)
        yield request
        context.disable_next_message_compression()
        yield request
        yield request

    front = front_of(packed=grpc.unary_stream_rpc_method_handler(packed), echo=UNARY(echo))
    data = gzip.compress(b"abc")
    body = b"\1" + len(data).to_bytes(4, "big") + data
    asked = (b"grpc-encoding", b"gzip"), (b"grpc-accept-encoding", b"identity, gzip")
    answer = await ask(front, "packed", *asked, body=body)
    assert answer.headers[b"grpc-encoding"] == b"gzip"
    assert answer.body[0] == 1
    size = int.from_bytes(answer.body[1:5], "big")
    assert gzip.decompress(answer.body[5 : 5 + size]) == b"abc"
    assert answer.body[5 + size :].startswith(framed(b"abc") + b"\1")
    # To a caller that does not accept it, nothing is packed.
    assert (await ask(front, "packed", asked[0], body=body)).messages == [b"abc"] * 3
    assert (await ask(front, "echo", asked[0], body=body)).messages == [b"abc"]
    unknown = await ask(front, "echo", (b"grpc-encoding", b"snappy"), body=body)
    assert unknown.status is grpc.StatusCode.UNIMPLEMENTED
    assert unknown.headers[b"grpc-accept-encoding"] == b"identity,deflate,gzip"


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        (b"application/grpc", 200),
        (b"application/grpc+proto", 200),
        (b"application/grpc; charset=utf-8", 200),
        (b"application/grpc+json", 415),
        (b"application/grpc-web", 415),
        (b"application/json", 415),
        (b"", 415),
    ],
)
async def test_only_grpc_is_served(content_type: bytes, status: int) -> None:
    answer = await ask(plain_front(), "echo", (b"content-type", content_type))
    assert answer.start is not None
    assert answer.start["status"] == status


async def test_a_caller_who_takes_no_trailers_is_told_so_in_the_headers() -> None:
    answer = await ask(plain_front(), "echo", without=b"te")
    assert answer.status is grpc.StatusCode.INTERNAL
    assert "te: trailers" in answer.details
    assert answer.start is not None
    assert not answer.start.get("trailers")


async def test_other_http_methods_and_unknown_methods() -> None:
    got = await ask(plain_front(), "echo", http="GET")
    assert got.start is not None
    assert got.start["status"] == 405
    for path in ("/t/nothing", "/t", "/", "/x/echo"):
        unknown = await ask(plain_front(), path)
        assert (unknown.status, unknown.details) == (grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        assert unknown.pieces == [b""]


async def test_what_can_t_be_parsed_is_refused_and_never_reaches_the_servicer() -> None:
    seen = []

    async def one(request: Any, context: Any) -> Any:
        seen.append(request)

    async def many(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            seen.append(request)
            yield request

    parse, dump = pb.GetModelRequest.FromString, pb.GetModelRequest.SerializeToString
    front = front_of(StatusInterceptor(), one=UNARY(one, parse, dump), many=STREAM(many, parse, dump))
    for method in ("one", "many"):
        answer = await ask(front, method, body=framed(b"\xff\xff"))
        assert answer.status is grpc.StatusCode.INVALID_ARGUMENT
        assert "can't be parsed" in answer.details
    assert seen == []


async def test_metadata_go_both_ways() -> None:
    seen: list[Any] = []

    async def handle(request: bytes, context: Any) -> bytes:
        seen.append((context.invocation_metadata(), context.peer(), context.time_remaining()))
        await context.send_initial_metadata((("first", "1"), ("raw-bin", b"\0\xff")))
        context.set_trailing_metadata((("last", "2"), ("last", "3"), ("end-bin", b"\1")))
        return request

    sent = (b"a", b"1"), (b"b-bin", b"AAE"), (b"a", b"2"), (b"grpc-timeout", b"1H")
    answer = await ask(front_of(handle=UNARY(handle)), "handle", *sent, body=framed(b"x"))
    metadata, peer, remaining = seen[0]
    assert metadata == (("a", "1"), ("b-bin", b"\0\1"), ("a", "2"))
    assert peer == "ipv4:127.0.0.1:4242"
    assert 3500 < remaining <= 3600
    assert answer.headers[b"first"] == b"1"
    assert answer.headers[b"raw-bin"] == b"AP8"
    assert answer.trailers == [(b"grpc-status", b"0"), (b"last", b"2"), (b"last", b"3"), (b"end-bin", b"AQ")]
    assert answer.messages == [b"x"]


async def test_a_servicer_s_status_reaches_its_caller() -> None:
    async def aborts(request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata((("kept", "1"),))
        await context.abort(grpc.StatusCode.NOT_FOUND, "gibt's nicht: ü%\n")
        raise AssertionError("abort returned")

    async def sets(request: bytes, context: Any) -> bytes:
        context.set_code(grpc.StatusCode.DATA_LOSS)
        context.set_details("lost")
        assert (context.code(), context.details()) == (grpc.StatusCode.DATA_LOSS, "lost")
        return request

    async def raises(request: bytes, context: Any) -> bytes:
        raise ValueError("x")

    async def aborts_well(request: bytes, context: Any) -> None:
        await context.abort(grpc.StatusCode.OK)

    async def aborts_late(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        yield b"said"
        await context.abort(grpc.StatusCode.ABORTED, "late", (("more-bin", b"\0"),))

    front = front_of(
        aborts=UNARY(aborts),
        sets=UNARY(sets),
        raises=UNARY(raises),
        aborts_well=UNARY(aborts_well),
        aborts_late=STREAM(aborts_late),
    )
    aborted = await ask(front, "aborts")
    assert (aborted.status, aborted.details, aborted.body) == (grpc.StatusCode.NOT_FOUND, "gibt's nicht: ü%\n", b"")
    assert (b"kept", b"1") in aborted.trailers
    was_set = await ask(front, "sets")
    assert (was_set.status, was_set.details, was_set.body) == (grpc.StatusCode.DATA_LOSS, "lost", b"")
    raised = await ask(front, "raises")
    assert (raised.status, raised.details) == (grpc.StatusCode.UNKNOWN, "Unexpected <class 'ValueError'>: x")
    assert (await ask(front, "aborts_well")).status is grpc.StatusCode.UNKNOWN
    late = await ask(front, "aborts_late", body=b"")
    assert (late.messages, late.status, late.details) == ([b"said"], grpc.StatusCode.ABORTED, "late")
    assert (b"more-bin", b"AA") in late.trailers


async def test_servicers_that_are_no_coroutines_run_in_threads() -> None:
    threads = set()

    def one(request: bytes, context: grpc.ServicerContext) -> bytes:
        threads.add(threading.current_thread())
        if request == b"bad":
            context.abort(grpc.StatusCode.ABORTED, "no")
        context.set_trailing_metadata((("a", "b"),))
        return request

    def many(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        threads.add(threading.current_thread())
        yield from requests

    def last(requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        return list(requests)[-1]

    def twice(request: bytes, context: grpc.ServicerContext) -> list[bytes]:
        return [request] * 2

    front = front_of(
        one=UNARY(one),
        many=STREAM(many),
        last=grpc.stream_unary_rpc_method_handler(last),
        twice=grpc.unary_stream_rpc_method_handler(twice),
    )
    answer = await ask(front, "one", body=framed(b"x"))
    assert (answer.messages, (b"a", b"b") in answer.trailers) == ([b"x"], True)
    assert (await ask(front, "one", body=framed(b"bad"))).status is grpc.StatusCode.ABORTED
    assert (await ask(front, "many", body=framed(b"1", b"2"))).messages == [b"1", b"2"]
    assert (await ask(front, "last", body=framed(b"1", b"2"))).messages == [b"2"]
    assert (await ask(front, "twice", body=framed(b"1"))).messages == [b"1", b"1"]
    assert threading.current_thread() not in threads


async def test_reads_and_writes_through_the_context() -> None:
    async def by_hand(requests: Any, context: Any) -> None:
        while (request := await context.read()) is not grpc.aio.EOF:
            await context.write(request)

    answer = await ask(front_of(by_hand=STREAM(by_hand)), "by_hand", body=framed(b"1", b"2"))
    assert answer.messages == [b"1", b"2"]


async def test_health_and_reflection_as_grpc_ships_them() -> None:
    front = front_of()
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, front.registry)
    reflection.enable_server_reflection([health.SERVICE_NAME], front.registry)
    await checks.set("", health_pb2.HealthCheckResponse.SERVING)
    async with open_call(front, "/grpc.health.v1.Health/Watch") as watch:
        watch.feed(framed(b""), more=False)
        await watch.until(lambda: len(watch.messages) == 1)
        await checks.enter_graceful_shutdown()
        await watch.until(lambda: len(watch.messages) == 2)
        statuses = [health_pb2.HealthCheckResponse.FromString(message).status for message in watch.messages]
        assert statuses == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]
    unimplemented = await ask(front, "/grpc.health.v1.Health/List")
    assert unimplemented.status is grpc.StatusCode.UNIMPLEMENTED
    asked = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
    path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    (listed,) = (await ask(front, path, body=framed(asked))).messages
    services = reflection_pb2.ServerReflectionResponse.FromString(listed).list_services_response.service
    assert [service.name for service in services] == [health.SERVICE_NAME]


async def test_what_is_said_without_waiting_goes_out_together() -> None:
    answer = await ask(plain_front(), "repeat", body=framed(b"100"))
    assert [len(messages_in(piece)) for piece in answer.pieces if piece] == [100]


async def test_an_answer_is_not_held_back_while_the_servicer_waits() -> None:
    async with open_call(plain_front(), "echo_all") as call:
        for number in range(3):
            call.feed(framed(b"%d" % number))
            await call.until(lambda number=number: len(call.messages) == number + 1)  # type: ignore[misc]  # its default
        call.feed(b"", more=False)
        await call.ended()
    assert call.status is grpc.StatusCode.OK
