"""Publication of refusals: what sessions refuse by headers is what admission would refuse."""

import asyncio
import time
from typing import Any

import grpc
import grpc.aio
import pytest
from support.admission import PIECE, RATE, ROOMY, Admission, Asked, work_off
from support.processes import PATIENCE
from support.transports import make_native

pytest.importorskip("unroll_server.transport.native._http2", reason="the native transport is not compiled")
from support.native_peer import WORK, Peer  # needs it

from unroll_server.addresses import Address
from unroll_server.middleware.access_log import CallObserver
from unroll_server.telemetry.metrics import Metrics
from unroll_server.transport.native.refusals import UnreadRefusals
from unroll_server.transport.registry import Guard, Registry, Work

TIMEOUT = ("grpc-timeout", "1S")


async def _answer(request: bytes, context: Any) -> bytes:
    return request


def test_refusals_are_published_before_the_first_is_needed_and_end_with_the_queue() -> None:
    admission = Admission(ROOMY, ROOMY, full_tick=PIECE)
    now = work_off(admission, 5)
    registry = Registry(CallObserver(Metrics()), guard=Guard(admission, {WORK: Work(interactive=False)}, ()))
    service, _, name = WORK[1:].partition("/")
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(_answer)
    registry.add_registered_method_handlers(service, {name: handler})
    peer = Peer()
    peer.now = now
    refusals = UnreadRefusals(peer.server, admission, [(peer.methods[WORK], registry.methods[WORK])])
    job = Asked(int(RATE), deadline=now + 0.5)
    admission.admit(job)
    assert admission.overloaded_until < now
    refusals.update()
    # A second of work is queued, and the call has a second: it ends without its message.
    peer.open(1, WORK, TIMEOUT)
    answer = peer.answer(1)
    assert answer.status == ("8", "too much is queued for an answer within the deadline")
    assert int(answer.headers["grpc-retry-pushback-ms"]) > 0
    # The next update counts it.
    admission.at(now + 0.01)
    refusals.update()
    assert admission.overloaded_until > now
    admission.ends(job, now + 0.02, computed=True)
    refusals.update()
    peer.now = now + 0.02
    peer.call(3, b"work", WORK, TIMEOUT)
    assert [body for _, body in peer.requests()] == [b"work"]


async def test_an_answer_arrives_on_a_connection_with_refused_calls() -> None:
    admission = Admission(ROOMY, ROOMY, full_tick=PIECE)
    admission.now = work_off(admission, 5, now=time.monotonic() - 1)
    # A second of work that is due before the call.
    admission.admit(Asked(int(RATE), deadline=admission.now + 0.5))
    registry = Registry(CallObserver(Metrics()), guard=Guard(admission, {"/t/Work": Work(interactive=False)}, ()))
    arrived, may_answer = asyncio.Event(), asyncio.Event()

    async def wait(request: bytes, context: Any) -> bytes:
        arrived.set()
        await may_answer.wait()
        return request

    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Work": grpc.unary_unary_rpc_method_handler(_answer),
        "Wait": grpc.unary_unary_rpc_method_handler(wait),
    }
    registry.add_registered_method_handlers("t", handlers)
    transport = make_native(Address.of("--listen", "127.0.0.1:0"), registry, 1000)
    async with grpc.aio.insecure_channel(await transport.start()) as channel:
        work: Any = channel.unary_unary("/t/Work")
        waiting: Any = channel.unary_unary("/t/Wait")
        call = asyncio.ensure_future(waiting(b"x", timeout=PATIENCE))
        await arrived.wait()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await work(b"x", timeout=1)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        may_answer.set()
        assert await call == b"x"
        assert await transport.stop(PATIENCE)
