"""Registry of the methods of all servicers, each composed once: parse, handler, serialize, inside the middleware."""

import asyncio
import inspect
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from unroll_engine.admission import AdmissionController
from unroll_engine.errors import InvalidRequestError
from unroll_server import caller
from unroll_server.errors import DrainingError
from unroll_server.middleware import Behavior, CallContext, Method, Middleware
from unroll_server.middleware.access_log import REQUEST_ID, CallObserver, MethodObserver, checked_request_id
from unroll_server.middleware.errors import with_status
from unroll_server.middleware.slow_readers import SMALL_BYTES, SlowReaders
from unroll_server.telemetry.metrics import CallMetrics
from unroll_server.telemetry.tracing import TRACEPARENT, CallerTrace

REASON = "MALFORMED_MESSAGE"
_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class Work(NamedTuple):
    """The work that a unary method gives the engine.

    Attributes:
        interactive: True if it goes before bulk work.
        step_mark: Bytes in the message of each call that may go before bulk work all the same; empty if none does.
    """

    interactive: bool
    step_mark: bytes = b""


class Guard(NamedTuple):
    """Refuses calls before their message is read, while the server is overloaded or drains.

    Attributes:
        admission: Refuses calls of an overloaded server.
        working: The unary methods that give the engine work, by path.
        probes: Paths of the unary methods that a draining server still answers.
    """

    admission: AdmissionController
    working: Mapping[str, Work]
    probes: Container[str]


class ComposedMethod(NamedTuple):
    """A method with its composed handlers.

    Attributes:
        reading: Handler of a message that the transport has read; a grpc.RpcMethodHandler.
        guarded: Handler that reads the message only if the guard admits the call; None for unguarded methods.
        work: The work that it gives the engine; None if it gives none.
        counts: The method's metrics.
        is_plain: True if no middleware sees a call and none is reported, so that a transport may refuse it itself.
    """

    reading: Any
    guarded: Any
    work: Work | None
    counts: CallMetrics
    is_plain: bool

    @property
    def interactive(self) -> bool:
        """True if it gives the engine work that goes before bulk work."""
        return self.work is not None and self.work.interactive

    @property
    def streams(self) -> bool:
        """True if a call has many requests or many responses."""
        return bool(self.reading.request_streaming or self.reading.response_streaming)


class Registry(grpc.GenericRpcHandler):
    """Composes methods as servicers register them, and finds them for a transport.

    A composed handler converts between bytes and messages, so a transport needs no message types. Every behavior is a
    coroutine function; a handler that is an asynchronous generator is wrapped.

    Args:
        observer: Reports every call.
        middleware: Middleware of every method, outermost first.
        slow_readers: Bounds the unread answers; None for no bound.
        guard: Refuses calls before their message is read; None for no refusals.

    Attributes:
        guard: The guard.
        methods: The methods by path, `/package.Service/Method`.
        in_flight: Tasks of grpcio's calls, or contexts of native ones, whose answers are not yet sent.
        turned_away: Calls refused since `turn_away`.
    """

    def __init__(
        self,
        observer: CallObserver,
        middleware: Sequence[Middleware] = (),
        slow_readers: SlowReaders | None = None,
        guard: Guard | None = None,
    ) -> None:
        self._observer = observer
        self._middleware = middleware
        self._slow_readers = slow_readers
        self.guard = guard
        self.methods: dict[str, ComposedMethod] = {}
        self._draining = False
        self.in_flight: set[Any] = set()
        self.turned_away = 0

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Composes the methods of a service. Called by the generated `add_...Servicer_to_server` functions.

        Raises:
            TypeError: a handler is not asynchronous, or takes many requests for one response.
        """
        for name, handler in handlers.items():
            path = f"/{service}/{name}"
            self.methods[path] = self._compose(path, handler)

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Ignores the handlers, which generated code has also registered by name."""

    def turn_away(self) -> bool:
        """Refuses unary calls from now on, except probes; returns False without a guard, which refuses none."""
        self._draining = self.guard is not None
        return self._draining

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Begins a call of grpcio's, in its task, and returns its handler; see grpc.GenericRpcHandler."""
        if task := asyncio.current_task():
            self.in_flight.add(task)
            task.add_done_callback(self.in_flight.discard)
        request_id: str | bytes = ""
        traceparent: Any = None
        for key, value in handler_call_details.invocation_metadata or ():
            if key == REQUEST_ID:
                request_id = value
            elif key == TRACEPARENT:
                traceparent = value
        return self.begin(handler_call_details.method, request_id, traceparent)

    def begin(
        self,
        path: str,
        request_id: str | bytes,
        traceparent: str | None = None,
        admitted: bool = False,
        waited: float = 0.0,
    ) -> Any:
        """Begins a call, in a context of its own, and returns its handler; None if there is no such method.

        Args:
            path: Path of the method.
            request_id: Request id of the caller; empty if it gave none.
            traceparent: Trace context of the caller; None if it gave none.
            admitted: True to skip the guard, for a call that began before the server drained.
            waited: Seconds for which the transport let it wait.
        """
        call = caller.Call()
        if waited:
            call.waited = waited
        caller.current.set(call)
        if request_id:
            call.request_id = checked_request_id(request_id)
        if traceparent:
            call.trace = CallerTrace.of(traceparent)
        found = self.methods.get(path)
        if found is None:
            self._observer.unknown_method(path, call)
            return None
        if (guard := self.guard) and found.guarded and not admitted:
            admission = guard.admission
            is_work = found.work is not None
            if self._draining or (is_work and admission.clock() < admission.overloaded_until):
                return found.guarded
        return found.reading

    def _compose(self, path: str, handler: Any) -> ComposedMethod:
        behavior = next(filter(None, (getattr(handler, kind) for kind in _KINDS)))
        if inspect.isasyncgenfunction(behavior):
            behavior = _writing(behavior)
        if not inspect.iscoroutinefunction(behavior) or (handler.request_streaming and not handler.response_streaming):
            raise TypeError(f"{path}: an asynchronous handler is expected, without requests or with many responses")
        method = Method(path, handler.request_streaming, handler.response_streaming, behavior)
        observer = self._observer.method(path, method.request_streaming, method.response_streaming)
        # Without these functions, messages are bytes.
        parse, serialize = handler.request_deserializer or bytes, handler.response_serializer or bytes
        work = self.guard.working.get(path) if self.guard else None
        guarded: Any = None
        if method.response_streaming:
            make = grpc.unary_stream_rpc_method_handler
            if method.request_streaming:
                make = grpc.stream_stream_rpc_method_handler
                parse = _parsing_each(parse, observer.counts)
            else:
                behavior = _parsing_first(behavior, parse, observer.counts)
                parse = None
            serialize = _serializing_each(serialize, observer.counts)
            wrapped, is_plain = self._wrap(method._replace(behavior=behavior), observer)
            reading = make(wrapped, parse, serialize)
        else:
            plain = _unary(behavior, parse, serialize, self._slow_readers)
            wrapped, is_plain = self._wrap(method._replace(behavior=plain), observer)
            reading = grpc.unary_unary_rpc_method_handler(wrapped)
            if self.guard and path not in self.guard.probes:
                # A method with many requests, so that the handler decides whether to read one.
                unread = self._guarded(plain, self.guard, work is not None and work.interactive)
                wrapped, _ = self._wrap(method._replace(behavior=unread), observer)
                guarded = grpc.stream_unary_rpc_method_handler(wrapped)
        return ComposedMethod(reading, guarded, work, observer.counts, is_plain)

    def _wrap(self, method: Method, observer: MethodObserver) -> tuple[Behavior, bool]:
        """Returns a method's behavior inside all its middleware, and `ComposedMethod.is_plain`."""
        plain = method.behavior
        for layer in reversed(self._middleware):
            method = method._replace(behavior=layer.wrap(method))
        return with_status(method, observer), method.behavior is plain and not observer.reports_calls

    def _guarded(self, behavior: Behavior, guard: Guard, interactive: bool) -> Behavior:
        async def run(requests: Any, context: CallContext) -> Any:
            if self._draining:
                self.turned_away += 1
                raise DrainingError
            identity = caller.current.get().identity
            guard.admission.check_unread(identity, context.time_remaining(), interactive)
            data = await context.read()
            if data is grpc.aio.EOF:
                raise InvalidRequestError("the call has no message")
            return await behavior(data, context)

        return run


def _unary(
    behavior: Behavior,
    parse: Callable[[bytes], Any],
    serialize: Callable[[Any], bytes],
    slow_readers: SlowReaders | None,
) -> Behavior:
    """Converts a handler of messages to a handler of bytes."""

    async def run(data: bytes, context: CallContext) -> bytes:
        call = caller.current.get()
        call.received, call.received_bytes = 1, len(data)
        if slow_readers and slow_readers.unread:
            slow_readers.check(context.peer())
        try:
            request = parse(data)
        except DecodeError:
            raise _malformed() from None
        answer = serialize(await behavior(request, context))
        call.sent, call.sent_bytes = 1, len(answer)
        if slow_readers and len(answer) >= SMALL_BYTES:
            slow_readers.hold(context, len(answer))
        return answer

    return run


def _writing(behavior: Callable[[Any, Any], Any]) -> Behavior:
    """Converts an asynchronous generator of responses to a coroutine function that writes them."""

    async def run(request: Any, context: CallContext) -> None:
        async with aclosing(behavior(request, context)) as responses:
            async for response in responses:
                await context.write(response)

    return run


def _parsing_first(behavior: Behavior, parse: Callable[[bytes], Any], counts: CallMetrics) -> Behavior:
    parse = _parsing_each(parse, counts)

    async def run(data: bytes, context: CallContext) -> None:
        await behavior(parse(data), context)

    return run


def _parsing_each(parse: Callable[[bytes], Any], counts: CallMetrics) -> Callable[[bytes], Any]:
    """Returns a `parse` for requests of streams that counts them."""

    def deserialize(data: bytes) -> Any:
        call = caller.current.get()
        call.received += 1
        call.received_bytes += len(data)
        counts.received()
        try:
            return parse(data)
        except DecodeError:
            raise _malformed() from None

    return deserialize


def _serializing_each(serialize: Callable[[Any], bytes], counts: CallMetrics) -> Callable[[Any], bytes]:
    """Returns a `serialize` for responses of streams that counts them."""

    def count(message: Any) -> bytes:
        data = serialize(message)
        call = caller.current.get()
        call.sent += 1
        call.sent_bytes += len(data)
        counts.sent()
        return data

    return count


def _malformed() -> InvalidRequestError:
    error = InvalidRequestError("the message can't be parsed as the one that this method takes")
    error.reason = REASON
    return error
