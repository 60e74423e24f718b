"""HTTP by the standard library: requests to a web process, and the events of a stream."""

import http.client
import json
import ssl
from collections.abc import Mapping
from email.message import Message
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from support.processes import PATIENCE


class Answer(NamedTuple):
    """An answer.

    Attributes:
        status: HTTP status.
        headers: Its headers.
        data: Its body.
    """

    status: int
    headers: Message
    data: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def events(self) -> list[tuple[str, Any]]:
        """The events of a stream: names and contents."""
        return [event_of(part) for part in self.data.decode().split("\n\n") if part]


def event_of(text: str) -> tuple[str, Any]:
    """Returns the name and the content of an encoded event."""
    fields = dict(line.split(": ", 1) for line in text.splitlines())
    return fields["event"], json.loads(fields["data"])


def connect(url: str, tls: ssl.SSLContext | None = None) -> http.client.HTTPConnection:
    """Opens a connection to the host of a URL."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    if tls is not None:
        return http.client.HTTPSConnection(parts.hostname, parts.port, timeout=PATIENCE, context=tls)
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=PATIENCE)


def ask(
    url: str,
    path: str,
    content: Any = None,
    *,
    method: str = "",
    headers: Mapping[str, str] | None = None,
    tls: ssl.SSLContext | None = None,
) -> Answer:
    """Sends a request on a connection of its own: GET, or POST with content, which is JSON unless it is bytes."""
    sent = {"content-type": "application/json"} if content is not None else {}
    body = content if isinstance(content, bytes | None) else json.dumps(content).encode()
    connection = connect(url, tls)
    try:
        chosen = method or ("GET" if content is None else "POST")
        connection.request(chosen, path, body, {**sent, **(headers or {})})
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())
    finally:
        connection.close()
