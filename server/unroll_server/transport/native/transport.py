"""The native transport: asyncio's connections, HTTP/2 and gRPC in C++, and the same handlers as with grpcio."""

import asyncio
import math
import random
import time
from contextlib import ExitStack
from typing import Any

import grpc
import grpc.aio

from unroll_server.addresses import Address
from unroll_server.config import Connections
from unroll_server.middleware.access_log import REQUEST_ID
from unroll_server.telemetry.tracing import TRACEPARENT
from unroll_server.transport.limits import HANDSHAKE, METADATA, SHORTEST_PINGS
from unroll_server.transport.native import _http2
from unroll_server.transport.native.backlog import Backlog
from unroll_server.transport.native.connection import Connection
from unroll_server.transport.native.context import Context
from unroll_server.transport.native.listening import Listener, listening
from unroll_server.transport.native.refusals import UnreadRefusals
from unroll_server.transport.native.running import Run
from unroll_server.transport.registry import Registry
from unroll_server.transport.tls import Certificates

UNFINISHED = 512 * 2**20
"""Most bytes of incomplete requests, over all connections; further calls are refused."""
READ = 256 * 1024
"""Most bytes taken from a socket at once."""
TICK = 0.25
"""Seconds between checks of the age and the silence of connections."""
JITTER = 0.1
"""Random share of a connection's age, so that clients do not reconnect all at once."""
QUIET = 0.1
"""Seconds without a new call after which a draining server stops refusing calls."""
LAST_CALLS = 1.0
"""Most seconds for which it refuses calls."""
_UNKNOWN: int = grpc.StatusCode.UNKNOWN.value[0]
_INTERNAL: int = grpc.StatusCode.INTERNAL.value[0]
_UNIMPLEMENTED: int = grpc.StatusCode.UNIMPLEMENTED.value[0]


class NativeTransport:
    """A server of the methods of a registry.

    Args:
        address: The address to listen on.
        registry: The methods to serve.
        max_message_bytes: Size of the largest request message; a larger one is RESOURCE_EXHAUSTED.
        share_port: True if other processes listen on the same port, each with a share of the connections.
        connections: Limits of connections; None for the defaults.
        certificates: Certificates for TLS; None for plaintext.
    """

    name = "native"

    def __init__(
        self,
        address: Address,
        registry: Registry,
        max_message_bytes: int,
        share_port: bool = False,
        connections: Connections | None = None,
        certificates: Certificates | None = None,
    ) -> None:
        self._address = address
        self._registry = registry
        self._share_port = share_port
        self._certificates = certificates
        self._limits = connections or Connections()
        self._loop = asyncio.get_running_loop()
        self._server = _http2.Server(
            message_bytes=max_message_bytes,
            metadata_bytes=METADATA,
            unfinished_bytes=UNFINISHED,
            calls=self._limits.calls,
            keepalive=self._limits.keepalive,
            patience=HANDSHAKE,
            shortest_pings=SHORTEST_PINGS,
        )
        self._buffer = memoryview(bytearray(READ))
        self._connections: set[Connection] = set()
        self._resting: list[Connection] = []
        self._resources = ExitStack()
        self._listeners: list[Listener] = []
        self._is_scheduled = False
        self._timer: asyncio.TimerHandle | None = None
        self._ticking: asyncio.TimerHandle | None = None
        self._draining_since = math.inf
        self._refusals: UnreadRefusals | None = None
        self._backlog: Backlog | None = None
        # Numbers of the methods whose calls the sessions refuse.
        self._checked: set[int] = set()
        # Numbers of the methods that give the engine work, whose calls need no task; their answers since the last turn.
        self._hot: set[int] = set()
        self._answers: list[tuple[_http2.Call, bytes, _http2.Metadata]] = []
        # Done once a draining server has no calls.
        self._idle: asyncio.Future[None] | None = None

    async def start(self) -> str:
        """Listens and serves; returns the address, with the port that it got.

        Raises:
            StartupError: the address can't be listened on.
        """
        refusable = []
        for path, method in self._registry.methods.items():
            work = method.work if method.is_plain else None
            number = self._server.add_method(path, method.streams, -1 if work is None else int(work.interactive))
            if method.work is not None:
                self._hot.add(number)
            if work is not None:
                refusable.append((number, method))
        if guard := self._registry.guard:
            self._refusals = UnreadRefusals(self._server, guard.admission, refusable)
            self._checked = {number for number, _ in refusable}
            bulk = {number: method for number, method in refusable if not method.interactive}
            self._backlog = Backlog(guard.admission, bulk, self._begin)
        sockets, address = self._resources.enter_context(listening(self._address, self._share_port))
        self._listeners = [Listener(each, self._accept, self._certificates) for each in sockets]
        self._tick()
        return address

    def _accept(self) -> Connection | None:
        """Returns the protocol of a new connection; None if there are too many."""
        if len(self._connections) >= self._limits.most:
            return None
        age = self._limits.age * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311
        connection = Connection(self._server, self._buffer, age, self._schedule, self._rest, self._connections.discard)
        self._connections.add(connection)
        return connection

    def _rest(self, connection: Connection) -> None:
        """Leaves a connection with refused calls alone for a moment: many calls in one read or write cost much less.

        One with a stream is served at once.
        """
        if self._refusals and not connection.streams and (seconds := self._refusals.rest):
            connection.rest()
            if not self._resting:
                self._loop.call_later(seconds, self._wake)
            self._resting.append(connection)

    def _wake(self) -> None:
        resting, self._resting = self._resting, []
        for connection in resting:
            connection.wake()

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        """Passes on all events since the last turn, and sends pending data."""
        self._is_scheduled = False
        server = self._server
        answers, self._answers = self._answers, []
        server.respond(answers)
        now = time.monotonic()
        server.expire(now)
        if (backlog := self._backlog) is not None:
            backlog.begin(now)
        for kind, call, message in server.take_events():
            if kind == _http2.REQUEST:
                if backlog is None or not backlog.add(call, message, now):
                    self._begin(call, message)
            elif kind == _http2.OPENED:
                self._begin(call, None)
            elif (context := getattr(call, "context", None)) is not None:
                self._continue(kind, context)
        if self._refusals:
            self._refusals.update()
        for connection in server.take_dirty():
            if not connection.rests:
                connection.flush()
        if server.has_events:
            self._schedule()
        if self._timer is None or server.next_deadline < self._timer.when():
            self._watch_deadlines()
        if self._idle and not self._idle.done() and not any(each.calls for each in self._connections):
            self._idle.set_result(None)

    @staticmethod
    def _continue(kind: int, context: Any) -> None:
        if kind == _http2.ABORTED:
            context.abandon()
        elif kind == _http2.READABLE:
            context.resume_reading()
        elif kind == _http2.WRITABLE:
            context.resume_writing()
        else:
            context.close()

    def _begin(self, call: _http2.Call, message: bytes | None, waited: float | None = None) -> None:
        """Begins a call; `waited` is for those that the backlog begins: the seconds for which they waited there."""
        if call.finished:
            # The caller has left before a context was made.
            return
        context = call.context = Context(call, call.session, self._schedule)
        run = self._run(call, context, message, waited)
        if call.method in self._hot:
            context.task = Run(run, self._loop)
            context.task.start()
        else:
            context.task = self._loop.create_task(run)

    async def _run(self, call: _http2.Call, context: Context, message: bytes | None, waited: float | None) -> None:
        in_flight = self._registry.in_flight
        in_flight.add(context)
        # The guard is for calls that the sessions have not checked, and for those that began after the drain.
        is_checked = call.method in self._checked or self._draining_since < math.inf
        admitted = is_checked and call.began < self._draining_since
        request_id, traceparent = call.value(REQUEST_ID) or "", call.value(TRACEPARENT)
        handler = self._registry.begin(call.path, request_id, traceparent, admitted, waited or 0.0)
        try:
            if handler is None:
                context.finish(_UNIMPLEMENTED, "Method not found!")
            elif handler.unary_unary:
                self._respond(call, await handler.unary_unary(message, context), context)
            elif handler.stream_unary:
                context.unread = message
                self._respond(call, await handler.stream_unary(None, context), context)
            else:
                context.parse, context.serialize = handler.request_deserializer, handler.response_serializer
                if handler.stream_stream:
                    await handler.stream_stream(context.requests(), context)
                elif (request := await context.read()) is grpc.aio.EOF:
                    context.finish(_INTERNAL, "the request has no message, or not all of one")
                else:
                    await handler.unary_stream(request, context)
                context.finish()
        except grpc.aio.AbortError:
            pass
        except BaseException:
            # A cancelled call has already ended.
            context.finish(_UNKNOWN)
            raise
        finally:
            if waited is not None and self._backlog:
                self._backlog.ended()
            context.task = None
            in_flight.discard(context)
            if not call.reports_end:
                # Call and context refer to each other: nothing is left for the garbage collector.
                call.context = None

    def _respond(self, call: _http2.Call, answer: bytes, context: Context) -> None:
        """Ends a call with its only answer, together with the others of this turn."""
        self._answers.append((call, answer, context.trailers))
        self._schedule()

    def _watch_deadlines(self) -> None:
        if self._timer:
            self._timer.cancel()
        deadline = self._server.next_deadline
        self._timer = None if deadline == math.inf else self._loop.call_at(deadline, self._expire)

    def _expire(self) -> None:
        self._timer = None
        self._schedule()

    def _tick(self) -> None:
        for connection in self._server.tick(time.monotonic()):
            connection.abort()
        self._schedule()
        self._ticking = self._loop.call_later(TICK, self._tick)

    async def stop(self, grace: float) -> bool:
        """Refuses new calls, waits for those in flight, and cancels those not done after `grace` seconds.

        Returns:
            False if calls in flight were cancelled.
        """
        clock = self._loop.time
        begin = clock()
        end = begin + max(grace, QUIET)
        self._draining_since = time.monotonic()
        # New calls are answered with UNAVAILABLE until none arrives.
        while self._registry.turn_away() and clock() + QUIET < min(end, begin + LAST_CALLS):
            before = self._registry.turned_away
            await asyncio.sleep(QUIET)
            if self._registry.turned_away == before:
                break
        for listener in self._listeners:
            listener.close()
        for connection in self._connections:
            connection.drain()
        self._idle = self._loop.create_future()
        self._schedule()
        drained = True
        try:
            await asyncio.wait_for(self._idle, max(0.0, end - clock()))
        except TimeoutError:
            drained = False
        for connection in [*self._connections]:
            connection.close()
        for context in [*self._registry.in_flight]:
            context.abandon()
        if self._ticking:
            self._ticking.cancel()
        # The answers of the cancelled calls, and GOAWAY, are given to the sockets.
        await asyncio.sleep(0)
        self._resources.close()
        return drained
