"""Every error of a call, provoked on a real server: its status, reason and details."""

import asyncio
import base64
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import grpc
import grpc.aio
import hpack
import numpy as np
import pytest
from google.rpc import error_details_pb2
from support import raw_http2, wire
from support.operators import admin_address, bearer, channel_to, write_identities
from support.processes import PATIENCE, ServerProcess
from support.redis_server import RedisServer, redis_executable
from support.transports import BOTH

from unroll_proto.inference import service_pb2 as oip
from unroll_proto.inference.service_pb2_grpc import GRPCInferenceServiceStub
from unroll_proto.v1 import admin_pb2 as admin
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_proto.v1.admin_pb2_grpc import AdminServiceStub

pytestmark = BOTH

STEPS = np.zeros((3, 12), np.float32)
SLOW = {"max_lanes": 1, "tick_steps": 1}
"""One step at a time, so that a little work takes long."""
TIGHT = {**SLOW, "max_queued_steps": 20000, "max_queued_bytes": 400000, "max_sessions": 1}


class Place:
    """Servers for the errors, which end together.

    Attributes:
        bundles: The models of its servers.
        folder: Folder for files.
        shared: A server with the defaults.
    """

    def __init__(self, bundles: Path, folder: Path, shared: ServerProcess) -> None:
        self.folder = folder
        self.shared = shared
        self.bundles = bundles
        self._open = ExitStack()
        self._kept: dict[Any, ServerProcess] = {}
        self._redis: RedisServer | None = None

    @asynccontextmanager
    async def server(self, *options: str) -> AsyncIterator[ServerProcess]:
        """A new server."""
        with await asyncio.to_thread(self._started, *options) as server:
            yield server

    async def kept(self, *options: str, **tuning: int) -> ServerProcess:
        """A server that errors with the same settings share."""
        key = (options, tuple(tuning.items()))
        if key not in self._kept:
            started = await asyncio.to_thread(self._started, *options, **tuning)
            self._kept[key] = self._open.enter_context(started)
        return self._kept[key]

    def redis(self) -> RedisServer:
        """A running store without room."""
        if redis_executable() is None:
            pytest.skip("there is no redis-server")
        if self._redis is None:
            folder = self.folder / "redis"
            folder.mkdir()
            self._redis = RedisServer(folder, "--maxmemory", "1", "--maxmemory-policy", "noeviction")
            self._open.enter_context(self._redis)
        return self._redis

    def close(self) -> None:
        """Ends the servers."""
        self._open.close()

    def _started(self, *options: str, **tuning: int) -> ServerProcess:
        log = self.folder / f"log{len(list(self.folder.iterdir()))}"
        return ServerProcess(self.bundles, log, *options, tuning=tuning)


Provocation = Callable[[Place], Awaitable[grpc.aio.AioRpcError]]


async def error_of(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def on_shared(place: Place, path: str, message: bytes, **more: Any) -> grpc.aio.AioRpcError:
    async with channel_to(place.shared.address) as channel:
        call: Any = channel.unary_unary(path)
        return await error_of(call(message, timeout=PATIENCE, **more))


async def classify(place: Place, request: pb.ClassifyRequest) -> grpc.aio.AioRpcError:
    return await on_shared(place, "/unroll.v1.UnrollService/Classify", request.SerializeToString())


async def wrong_field(place: Place) -> grpc.aio.AioRpcError:
    return await classify(place, pb.ClassifyRequest(model="jv", lengths=[0]))


async def malformed(place: Place) -> grpc.aio.AioRpcError:
    return await on_shared(place, "/unroll.v1.UnrollService/Classify", b"\xff\xff")


async def no_model(place: Place) -> grpc.aio.AioRpcError:
    return await classify(place, pb.ClassifyRequest(model="nothing", lengths=[1], values=bytes(48)))


async def other_snapshot(place: Place) -> grpc.aio.AioRpcError:
    snapshot = pb.Snapshot(format=1, model="other", version=1, architecture="simple_rnn", state=[bytes(512)])
    return await classify(place, wire.classify_request([STEPS], initial_states=[snapshot], version=1))


async def large_message(place: Place) -> grpc.aio.AioRpcError:
    return await classify(place, pb.ClassifyRequest(model="jv", values=bytes(17 * 2**20)))


async def late(place: Place) -> grpc.aio.AioRpcError:
    async with channel_to(place.shared.address) as channel:
        # A stream that is never opened waits as long as its caller does.
        return await error_of(wire.stub_of(channel).Unroll(timeout=0.2).read())


async def no_method(place: Place) -> grpc.aio.AioRpcError:
    return await on_shared(place, "/unroll.v1.UnrollService/Nothing", b"")


async def not_offered(place: Place) -> grpc.aio.AioRpcError:
    async with channel_to(place.shared.address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        return await error_of(stub.RepositoryModelLoad(oip.RepositoryModelLoadRequest(model_name="jv")))


async def not_compressed(place: Place) -> grpc.aio.AioRpcError:
    """Sends a message that is wrongly marked as compressed, which grpcio's client can't."""
    path, raw = "/unroll.v1.UnrollService/Classify", b"not gzip"
    with raw_http2.Connection(place.shared.address) as connection:
        headers = raw_http2.header_block(path, ("grpc-encoding", "gzip"))
        body = b"\1" + len(raw).to_bytes(4, "big") + raw
        connection.send(
            raw_http2.frame(raw_http2.HEADERS, raw_http2.END_HEADERS, 1, headers),
            raw_http2.frame(raw_http2.DATA, raw_http2.END_STREAM, 1, body),
        )
        decoder = hpack.Decoder()
        got: dict[Any, Any] = {}
        for each in connection.frames():
            if each.kind == raw_http2.HEADERS and each.stream == 1:
                got |= dict(decoder.decode(each.payload))
                if "grpc-status" in got:
                    break
    return ended_with(got)


def ended_with(headers: dict[str, str]) -> grpc.aio.AioRpcError:
    """Converts trailers as grpcio's client does."""
    codes = {str(code.value[0]): code for code in grpc.StatusCode}
    trailers = grpc.aio.Metadata()
    for name, value in headers.items():
        trailers.add(name, base64.b64decode(value + "==") if name.endswith("-bin") else value)
    return grpc.aio.AioRpcError(
        codes[headers["grpc-status"]], grpc.aio.Metadata(), trailers, unquote(headers["grpc-message"])
    )


async def unread_answers(place: Place) -> grpc.aio.AioRpcError:
    """Calls without reading the answers, which grpcio's client can't."""
    sequences = list(np.zeros((4096, 1, 12), np.float32))
    request = wire.classify_request(sequences, return_final_states=True).SerializeToString()

    def ask() -> dict[str, str]:
        # Headers without references to earlier ones can be decoded alone.
        greeting = raw_http2.PREFACE + raw_http2.settings(header_table_size=0, initial_window_size=0)
        with raw_http2.Connection(place.shared.address, greeting) as connection:
            for stream in range(1, 100, 2):
                assert connection.call(stream, "/unroll.v1.UnrollService/Classify", request)
            for each in connection.frames():
                if each.kind == raw_http2.HEADERS and each.flags & raw_http2.END_STREAM:
                    return {str(name): str(value) for name, value in hpack.Decoder().decode(each.payload)}
        raise AssertionError("never refused")

    return ended_with(await asyncio.to_thread(ask))


async def unknown_session(place: Place) -> grpc.aio.AioRpcError:
    async with channel_to(place.shared.address) as channel:
        return await error_of(wire.stub_of(channel).Advance(advance("nobody's")))


async def taken_session(place: Place) -> grpc.aio.AioRpcError:
    async with channel_to(place.shared.address) as channel:
        stub = wire.stub_of(channel)
        await stub.Advance(advance("taken", start=True, first_step=0))
        return await error_of(stub.Advance(advance("taken", first_step=1)))


async def evicted_session(place: Place) -> grpc.aio.AioRpcError:
    server = await place.kept(**TIGHT)
    async with channel_to(server.address) as channel:
        stub = wire.stub_of(channel)
        for name in ("first", "second"):
            await stub.Advance(advance(name, start=True))
        return await error_of(stub.Advance(advance("first")))


def advance(session: str, **more: Any) -> pb.AdvanceRequest:
    return pb.AdvanceRequest(session_id=session, values=wire.to_bytes(STEPS), **more)


async def full_store(place: Place) -> grpc.aio.AioRpcError:
    server = await place.kept("--sessions", place.redis().url)
    async with channel_to(server.address) as channel:
        return await error_of(wire.stub_of(channel).Advance(advance("a", start=True)))


async def dead_store(place: Place) -> grpc.aio.AioRpcError:
    store = place.redis()
    server = await place.kept("--sessions", store.url)
    store.kill()
    try:
        async with channel_to(server.address) as channel:
            return await error_of(wire.stub_of(channel).Advance(advance("a", start=True)))
    finally:
        store.start()


async def refused_among(
    calls: Iterable[Awaitable[Any]], waiting: set[asyncio.Future[Any]], reason: str
) -> grpc.aio.AioRpcError | None:
    """Makes calls besides the waiting ones and waits for one to end; returns one refused for the reason, or None."""
    waiting |= {asyncio.ensure_future(call) for call in calls}
    done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    waiting -= done
    for error in (call.exception() for call in done):
        if isinstance(error, grpc.aio.AioRpcError) and reason_of(error) == reason:
            return error
    return None


async def called_off(calls: set[asyncio.Future[Any]]) -> None:
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


async def refused_beside(place: Place, large: int, small: int, reason: str) -> grpc.aio.AioRpcError:
    """Returns a refusal while a call of `large` steps and consecutive calls of `small` ones run together."""
    server = await place.kept(**TIGHT)
    first, other = (wire.classify_request([np.zeros((count, 12), np.float32)]) for count in (large, small))
    waiting: set[asyncio.Future[Any]] = set()
    beside: asyncio.Future[Any] | None = None
    async with channel_to(server.address) as channel, asyncio.timeout(PATIENCE):
        stub = wire.stub_of(channel)
        try:
            while True:
                if beside is None or beside.done():
                    beside = asyncio.ensure_future(stub.Classify(first))
                    waiting.add(beside)
                if refused := await refused_among([stub.Classify(other)], waiting, reason):
                    return refused
        finally:
            await called_off(waiting)


async def full_of_steps(place: Place) -> grpc.aio.AioRpcError:
    return await refused_beside(place, 30_000, 10, "QUEUED_STEPS")


async def full_of_bytes(place: Place) -> grpc.aio.AioRpcError:
    return await refused_beside(place, 8_000, 1_000, "QUEUED_BYTES")


async def too_near(place: Place) -> grpc.aio.AioRpcError:
    server = await place.kept(**SLOW)
    request = wire.classify_request([np.zeros((300, 12), np.float32)])
    waiting: set[asyncio.Future[Any]] = set()
    async with channel_to(server.address) as channel, asyncio.timeout(PATIENCE):
        stub = wire.stub_of(channel)
        try:
            # More and more, until it exceeds the capacity.
            while True:
                calls = (stub.Classify(request, timeout=1) for _ in range(20))
                if refused := await refused_among(calls, waiting, "DEADLINE_TOO_NEAR"):
                    return refused
        finally:
            await called_off(waiting)


async def without_token(place: Place) -> grpc.aio.AioRpcError:
    return await guarded(place, lambda stub: stub.ListModels(pb.ListModelsRequest()))


async def too_much_for_one(place: Place) -> grpc.aio.AioRpcError:
    async def call(stub: Any) -> Any:
        first = stub.Unroll(metadata=bearer("TOKEN-bob"))
        await first.write(wire.open_request("a"))
        await first.read()
        try:
            return await stub.ListModels(pb.ListModelsRequest(), metadata=bearer("TOKEN-bob"))
        finally:
            first.cancel()

    return await guarded(place, call)


async def guarded(place: Place, ask: Callable[[Any], Awaitable[Any]]) -> grpc.aio.AioRpcError:
    server = await guarded_server(place)
    async with channel_to(server.address) as channel:
        return await error_of(ask(wire.stub_of(channel)))


async def guarded_server(place: Place) -> ServerProcess:
    """A server that knows bob, who may make one call at a time and is no administrator."""
    identities = write_identities(place.folder / "identities.toml", bob={"max_concurrent_calls": 1})
    return await place.kept("--tokens", str(identities), "--admin", "127.0.0.1:0")


async def no_administrator(place: Place) -> grpc.aio.AioRpcError:
    server = await guarded_server(place)
    async with channel_to(admin_address(server)) as channel:
        stub = AdminServiceStub(channel)
        return await error_of(stub.ListSessions(admin.ListSessionsRequest(), metadata=bearer("TOKEN-bob")))


async def refused_model(place: Place) -> grpc.aio.AioRpcError:
    models = place.folder / "models"
    shutil.copytree(place.bundles, models)
    async with place.server("--models", str(models), "--admin", "127.0.0.1:0", "--models-poll", "0") as server:
        bad = models / "bad" / "1"
        shutil.copytree(models / "jv" / "1", bad)
        (bad / "manifest.json").write_text("none")
        async with channel_to(admin_address(server)) as channel:
            return await error_of(AdminServiceStub(channel).LoadModel(admin.LoadModelRequest(model="bad")))


async def gone(place: Place) -> grpc.aio.AioRpcError:
    async with place.server() as server, channel_to(server.address) as channel:
        stub = wire.stub_of(channel)
        await stub.ListModels(pb.ListModelsRequest())
        server.signal(signal.SIGTERM)
        await asyncio.to_thread(server.wait)
        return await error_of(stub.ListModels(pb.ListModelsRequest(), timeout=PATIENCE))


ERRORS: list[tuple[str, str, str, Provocation]] = [
    ("INVALID_ARGUMENT", "", "BadRequest", wrong_field),
    ("INVALID_ARGUMENT", "MALFORMED_MESSAGE", "ErrorInfo", malformed),
    ("NOT_FOUND", "", "BadRequest", no_model),
    ("NOT_FOUND", "SESSION_UNKNOWN", "ErrorInfo BadRequest", unknown_session),
    ("NOT_FOUND", "SESSION_EXPIRED", "ErrorInfo BadRequest", evicted_session),
    ("FAILED_PRECONDITION", "", "BadRequest", other_snapshot),
    ("FAILED_PRECONDITION", "MODEL_REFUSED", "ErrorInfo", refused_model),
    ("ABORTED", "SESSION_TAKEN", "ErrorInfo BadRequest", taken_session),
    ("RESOURCE_EXHAUSTED", "QUEUED_STEPS", "ErrorInfo RetryInfo", full_of_steps),
    ("RESOURCE_EXHAUSTED", "QUEUED_BYTES", "ErrorInfo RetryInfo", full_of_bytes),
    ("RESOURCE_EXHAUSTED", "DEADLINE_TOO_NEAR", "ErrorInfo RetryInfo", too_near),
    ("RESOURCE_EXHAUSTED", "IDENTITY_LIMIT", "ErrorInfo RetryInfo", too_much_for_one),
    ("RESOURCE_EXHAUSTED", "UNREAD_ANSWERS", "ErrorInfo RetryInfo", unread_answers),
    ("RESOURCE_EXHAUSTED", "SESSION_ROOM", "ErrorInfo", full_store),
    ("RESOURCE_EXHAUSTED", "", "", large_message),
    ("DEADLINE_EXCEEDED", "", "", late),
    ("UNAUTHENTICATED", "", "", without_token),
    ("PERMISSION_DENIED", "", "", no_administrator),
    ("UNIMPLEMENTED", "", "", not_offered),
    ("INTERNAL", "", "", not_compressed),
    ("UNAVAILABLE", "", "", gone),
    ("UNAVAILABLE", "SESSION_STORE", "ErrorInfo", dead_store),
]
"""Status, reason, details, and a call that ends with them."""


def reason_of(error: object) -> str:
    """Returns the reason in an error's ErrorInfo; empty if there is none."""
    info = _details(error).get("ErrorInfo")
    return str(info.reason) if info else ""


def _details(error: object) -> dict[str, Any]:
    if not isinstance(error, grpc.aio.AioRpcError) or "grpc-status-details-bin" not in dict(
        error.trailing_metadata() or ()
    ):
        return {}
    found: dict[str, Any] = {}
    for detail in wire.details_of(error).details:
        for kind in (error_details_pb2.BadRequest, error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo):
            message = kind()
            if detail.Unpack(message):
                found[kind.DESCRIPTOR.name] = message
    return found


@pytest.fixture(scope="module")
def place(bundle_root: Path, tmp_path_factory: pytest.TempPathFactory, server: ServerProcess) -> Iterator[Place]:
    place = Place(bundle_root, tmp_path_factory.mktemp("place"), server)
    yield place
    place.close()


@pytest.mark.parametrize(("status", "reason", "expected", "provoke"), ERRORS)
async def test_an_error_has_its_status_reason_and_details(
    place: Place, status: str, reason: str, expected: str, provoke: Provocation
) -> None:
    error = await provoke(place)
    assert error.code().name == status, error.details()
    assert reason_of(error) == reason
    assert error.details()
    details = _details(error)
    assert set(details) == set(expected.split())
    trailers = dict(error.trailing_metadata() or ())
    assert ("grpc-retry-pushback-ms" in trailers) == ("RetryInfo" in expected)
    if "RetryInfo" in expected:
        delay = details["RetryInfo"].retry_delay.ToTimedelta().total_seconds()
        assert int(str(trailers["grpc-retry-pushback-ms"])) == pytest.approx(delay * 1000, abs=1)
        assert 0 < delay <= 30
    if reason:
        assert details["ErrorInfo"].domain == "unroll"
