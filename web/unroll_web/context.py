"""Context: the parts of a web process that its routes share."""

import asyncio
import re

from starlette.requests import HTTPConnection

from unroll_client import AsyncClient
from unroll_web.problems import Problem
from unroll_web.settings import Settings

REQUEST_ID = "x-request-id"
# Metadata that a caller's headers give to the server, besides its token and the request id.
_PASSED = ("traceparent", "tracestate")
_TOKEN = re.compile(r"[Bb]earer +([\x21-\x7e]+)")


class Context:
    """The parts of a web process that its routes share.

    Args:
        settings: As the attribute.

    Attributes:
        settings: Settings of the process.
        draining: Set when the process begins to end: streams then end too, with a snapshot.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.draining = asyncio.Event()
        self._client = settings.connect()

    def client(
        self, connection: HTTPConnection, token: str | None = None, *, reconnect_timeout: float | None = None
    ) -> AsyncClient:
        """Returns a client that calls for the sender of a request or WebSocket; an async context manager.

        It sends the caller's token, request id and trace. Refusals of an overloaded server are raised at once.

        Args:
            connection: The request or WebSocket.
            token: Bearer token; None for that of the header Authorization, or else the process's own.
            reconnect_timeout: Seconds within which a sequence must resume after a loss; None for the process's own.

        Raises:
            Problem: a header can't be used.
        """
        metadata = [(REQUEST_ID, str(connection.state.request_id))]
        metadata += [(name, value) for name in _PASSED if (value := connection.headers.get(name))]
        header = connection.headers.get("authorization") if token is None else f"Bearer {token}"
        if header is not None:
            if not (match := _TOKEN.fullmatch(header)):
                raise Problem(401, "authorization: 'Bearer TOKEN' expected")
            metadata.append(("authorization", f"Bearer {match[1]}"))
        try:
            return self._client.with_metadata(metadata, retry_refused=False, reconnect_timeout=reconnect_timeout)
        except ValueError as error:
            raise Problem(400, str(error)) from None

    async def close(self) -> None:
        """Closes the connections to the servers."""
        await self._client.close()
