"""Gate: checks every request before its route, and gives every answer its security headers."""

import asyncio
import logging
import re
import uuid
from time import perf_counter
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unroll_web.context import REQUEST_ID, Context
from unroll_web.problems import Problem, too_large

_log = logging.getLogger(__name__)

SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "font-src 'self'; connect-src 'self'; worker-src 'self'; manifest-src 'self'; form-action 'none'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(self)",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
# As the server accepts them.
_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Gate:
    """ASGI middleware around all routes.

    It refuses requests for other hosts (DNS rebinding), requests of other sites' pages, and bodies that are too large
    or too slow. Each request gets an id, its caller's or a new one.

    Args:
        app: The application behind it.
        context: Parts of the process.
    """

    def __init__(self, app: ASGIApp, context: Context) -> None:
        self._app = app
        self._settings = context.settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        answer = _Answer(scope, send, request_id)
        body = _Body(receive, self._settings.max_body_bytes, self._settings.body_timeout)
        try:
            self._check(scope, headers)
            await self._app(scope, body.receive if scope["type"] == "http" else receive, answer.send)
        except Problem as problem:
            await problem.response(request_id)(scope, receive, answer.send)
        except Exception:
            if answer.begun:
                raise
            _log.exception("request_id=%s", request_id)
            failure = Problem(500, "the web process failed, and its log has the cause")
            await failure.response(request_id)(scope, receive, answer.send)
        finally:
            answer.log()

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raises Problem if the request must not be handled."""
        host = headers.get("host", "")
        hosts = self._settings.hosts
        if hosts and urlsplit(f"//{host}").hostname not in hosts:
            allowed = ", ".join(sorted(hosts))
            raise Problem(421, f"host: {host[:128]!r} is not this server's name ({allowed}); --host adds names")
        origin = headers.get("origin")
        unsafe = scope["type"] == "websocket" or scope["method"] not in _SAFE_METHODS
        if origin is not None and unsafe and origin not in self._settings.origins and urlsplit(origin).netloc != host:
            raise Problem(403, f"origin: pages of {origin[:128]!r} may not call this server; --origin allows them")
        if int(headers.get("content-length", "0")) > self._settings.max_body_bytes:
            raise too_large(self._settings.max_body_bytes)


class _Answer:
    """Sends an answer with the security headers, unless the route set its own, and logs its status."""

    def __init__(self, scope: Scope, send: Send, request_id: str) -> None:
        self._scope = scope
        self._send = send
        self._id = request_id
        self._status: int | str = "-"
        self._began = perf_counter()

    @property
    def begun(self) -> bool:
        return self._status != "-"

    async def send(self, message: Message) -> None:
        if message["type"] in ("http.response.start", "websocket.http.response.start"):
            self._status = message["status"]
            message.setdefault("headers", [])
            headers = MutableHeaders(scope=message)
            for name, value in SECURITY_HEADERS.items():
                headers.setdefault(name, value)
            headers.setdefault("cache-control", "no-store")
            headers[REQUEST_ID] = self._id
        elif message["type"] == "websocket.accept":
            self._status = 101
        await self._send(message)

    def log(self) -> None:
        method = self._scope.get("method", "WEBSOCKET")
        milliseconds = (perf_counter() - self._began) * 1e3
        # A path can hold anything, also line ends.
        path = ascii(self._scope["path"])[1:-1]
        _log.info("%s %s %s %.1f ms request_id=%s", method, path, self._status, milliseconds, self._id)


class _Body:
    """Receives a request's body within its limits."""

    def __init__(self, receive: Receive, limit: int, timeout: float) -> None:
        self._receive = receive
        self._limit = limit
        self._left = limit
        self._timeout = timeout
        self._complete = False

    async def receive(self) -> Message:
        """Returns the next message of ASGI.

        Raises:
            Problem: the body is too large, or pauses too long.
        """
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout(self._timeout):
                message = await self._receive()
        except TimeoutError:
            raise Problem(408, f"body: nothing came for {self._timeout:g} s", headers={"connection": "close"}) from None
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise too_large(self._limit)
        self._complete = not message.get("more_body", False)
        return message
