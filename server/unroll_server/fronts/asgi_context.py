"""What a servicer sees of its call over ASGI, and what it can say of it."""

import asyncio
from abc import ABC
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import grpc
import grpc.aio

from unroll_server.fronts.client_certificate import ALTERNATIVE_NAME, COMMON_NAME, names_in
from unroll_server.fronts.grpc_wire import CODECS, Metadata, decode_metadata, encode_metadata

Event = dict[str, Any]

_CODEC_OF = {grpc.Compression.Gzip: b"gzip", grpc.Compression.Deflate: b"deflate"}


class Context(grpc.aio.ServicerContext[Any, Any], ABC):
    """The part of grpc.aio.ServicerContext that sends nothing.

    Args:
        scope: ASGI's.
        headers: The request's; of repeated ones the last.
    """

    # Class attributes stand for what most calls never set: a call costs its constructor.
    deadline: float | None = None
    """When the caller gives up, by the loop's clock."""
    started = False
    """Whether the response's headers are on their way."""
    over = False
    """Whether the last of the response is on its way, or nobody is there to read it."""
    ended_by: tuple[grpc.StatusCode, str] | None = None
    """What ended the call from outside its servicer."""
    _aborted = False
    _status: grpc.StatusCode | None = None
    _details = ""
    _trailing: Metadata = ()
    _compression: bytes | None = None
    _compress_next = True
    _callbacks: tuple[Callable[[Any], None], ...] = ()

    def __init__(self, scope: Event, headers: Mapping[bytes, bytes]) -> None:
        self.loop = asyncio.get_running_loop()
        self.scope = scope
        self.headers = headers

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        """See grpc.aio.ServicerContext."""
        self.set_abort(code, details, trailing_metadata)
        raise grpc.aio.AbortError("the servicer ended the call")

    async def abort_with_status(self, status: grpc.Status) -> NoReturn:
        """See grpc.aio.ServicerContext."""
        await self.abort(status.code, status.details, status.trailing_metadata or ())

    def set_abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Metadata) -> None:
        """Leaves the status of an abort; its caller raises."""
        if self._aborted:
            raise grpc.aio.UsageError("abort was called already")
        self._aborted = True
        # A call can't be aborted into a good end.
        self._status = grpc.StatusCode.UNKNOWN if code is grpc.StatusCode.OK else code
        self._details = details or self._details
        self._trailing = tuple(trailing_metadata) or self._trailing

    def set_code(self, code: grpc.StatusCode) -> None:
        """See grpc.aio.ServicerContext."""
        self._status = code

    def set_details(self, details: str) -> None:
        """See grpc.aio.ServicerContext."""
        self._details = details

    def set_trailing_metadata(self, trailing_metadata: Metadata) -> None:
        """See grpc.aio.ServicerContext."""
        self._trailing = tuple(trailing_metadata)
        encode_metadata(self._trailing)

    def set_code_unless_bad(self, code: grpc.StatusCode) -> None:
        """Sets the code where the servicer has set none, or OK."""
        if self._status in (None, grpc.StatusCode.OK):
            self._status = code

    def code(self) -> grpc.StatusCode:
        """See grpc.aio.ServicerContext."""
        return self._status or grpc.StatusCode.OK

    def details(self) -> str:
        """See grpc.aio.ServicerContext."""
        return self._details

    def trailing_metadata(self) -> Any:
        """See grpc.aio.ServicerContext."""
        return self._trailing

    def invocation_metadata(self) -> Any:
        """See grpc.aio.ServicerContext."""
        return decode_metadata(self.scope["headers"])

    def time_remaining(self) -> float | None:  # type: ignore[override]  # grpc.aio gives None as well
        """Seconds until the deadline, None where the caller set none."""
        return None if self.deadline is None else max(self.deadline - self.loop.time(), 0.0)

    def set_compression(self, compression: grpc.Compression) -> None:
        """See grpc.aio.ServicerContext; what the caller does not accept is not used."""
        if self.started:
            raise RuntimeError("compression is set before the initial metadata is sent, or not at all")
        codec = _CODEC_OF.get(compression)
        accepted = self.headers.get(b"grpc-accept-encoding", b"").replace(b" ", b"").split(b",")
        self._compression = codec if codec in CODECS and codec in accepted else None

    def disable_next_message_compression(self) -> None:
        """See grpc.aio.ServicerContext."""
        self._compress_next = False

    def peer(self) -> str:
        """`ipv4:HOST:PORT`, `ipv6:[HOST]:PORT`, or `unknown`."""
        if not self.scope.get("client"):
            return "unknown"
        host, port = self.scope["client"]
        return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"

    def peer_identities(self) -> list[bytes] | None:
        """What the caller's certificate names it: its alternative names, else its common name; None without one."""
        key = self.peer_identity_key()
        return None if key is None else self.auth_context()[key]

    def peer_identity_key(self) -> str | None:
        """See grpc.aio.ServicerContext."""
        known = self.auth_context()
        return next((key for key in (ALTERNATIVE_NAME, COMMON_NAME) if key in known), None)

    def auth_context(self) -> dict[str, list[bytes]]:
        """What the caller's certificate says of it, as grpc.aio has it; empty where callers need none."""
        forwarded = self.headers.get(b"x-forwarded-client-cert")
        return {} if forwarded is None else names_in(forwarded)

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """See grpc.aio.ServicerContext."""
        self._callbacks = (*self._callbacks, callback)

    def cancelled(self) -> bool:
        """Whether the caller left or its deadline passed."""
        return self.ended_by is not None

    def done(self) -> bool:
        """Whether the call has ended."""
        return self.over or self.ended_by is not None
