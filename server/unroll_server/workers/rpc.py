"""Questions that a supervisor asks its workers over their channels, any number at a time, and their answers.

A question is `{"ask": NUMBER, "method": NAME, "request": BASE64}`; the answer repeats its number with `response` or
`refusal`, which are base64 too.
"""

import asyncio
import base64
import logging
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any

from unroll_server.workers.channel import Channel

_log = logging.getLogger(__name__)

Ask = Callable[[str, bytes], Awaitable[bytes]]
"""Asks a method with the bytes of its request for those of its response. Raises RefusedError, or GoneError."""


class RefusedError(Exception):
    """The method refused.

    Attributes:
        status: A google.rpc.Status, serialized.
    """

    def __init__(self, status: bytes) -> None:
        super().__init__("refused")
        self.status = status


class GoneError(Exception):
    """Nobody is there to answer."""


class Questions:
    """The side that asks."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._numbers = count(1)
        self._open: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reading = asyncio.create_task(self._read())

    async def ask(self, method: str, request: bytes) -> bytes:
        """See `Ask`."""
        if self._reading.done():
            raise GoneError
        number = next(self._numbers)
        answered: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._open[number] = answered
        try:
            self._channel.send(ask=number, method=method, request=_text(request))
            answer = await answered
        finally:
            del self._open[number]
        if "refusal" in answer:
            raise RefusedError(base64.b64decode(answer["refusal"]))
        return base64.b64decode(answer["response"])

    def close(self) -> None:
        """Takes no more answers."""
        self._reading.cancel()

    async def _read(self) -> None:
        try:
            while message := await self._channel.receive():
                answered = self._open.get(message.get("answer", 0))
                if answered and not answered.done():
                    answered.set_result(message)
        finally:
            for answered in self._open.values():
                if not answered.done():
                    answered.set_exception(GoneError())


class Answers:
    """The side that answers.

    Attributes:
        ask: What answers; None where nothing does yet.
    """

    def __init__(self, channel: Channel) -> None:
        self.ask: Ask | None = None
        self._channel = channel
        self._tasks: set[asyncio.Task[None]] = set()

    def take(self, message: dict[str, Any]) -> None:
        """Answers a question, in its own time."""
        task = asyncio.create_task(self._answer(message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, message: dict[str, Any]) -> None:
        number = message["ask"]
        try:
            if self.ask is None:
                raise RefusedError(b"")
            response = await self.ask(message["method"], base64.b64decode(message["request"]))
        except RefusedError as error:
            self._channel.send(answer=number, refusal=_text(error.status))
        else:
            self._channel.send(answer=number, response=_text(response))


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
