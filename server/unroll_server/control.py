"""What a supervisor and its workers say to each other: JSON objects, one a line, over a pair of sockets.

From the supervisor: the worker's `Orders` once, questions (relay.py), then `{"drain": true}`. From the worker:
`{"serving": MODELS}` or `{"failed": WHY}`, and answers. The end of the connection means that the other one is gone.
"""

import asyncio
import contextlib
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from unroll_server.config import Settings

LONGEST_LINE = 64 * 2**20
"""Bytes of a message, at most."""
FD = "UNROLL_CONTROL_FD"
"""The variable that tells a worker the number of its socket."""


class Channel:
    """One end. Made on the event loop that it is used on."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def on(cls, end: socket.socket) -> Self:
        """Takes over a connected socket."""
        return cls(*await asyncio.open_connection(sock=end, limit=LONGEST_LINE))

    @classmethod
    async def inherited(cls) -> Self:
        """The channel to the supervisor that started this process."""
        return await cls.on(socket.socket(fileno=int(os.environ.pop(FD))))

    def send(self, **message: Any) -> None:
        """Sends a message; one that the other end can't take any more is lost."""
        self._writer.write(json.dumps(message).encode() + b"\n")

    async def flush(self) -> None:
        """Waits until what was sent has left this process, or can't."""
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    async def receive(self) -> dict[str, Any] | None:
        """The next message; None at the end."""
        try:
            line = await self._reader.readline()
        except ConnectionError:
            return None
        if not line.endswith(b"\n"):
            return None
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        """Closes this end."""
        self._writer.close()


@dataclass(frozen=True, slots=True)
class Orders:
    """What a worker is told first.

    Attributes:
        settings: What to serve, on an address with a port of its own.
        worker: Its number.
        folder: Where the workers of this supervisor have their files.
    """

    settings: Settings
    worker: int
    folder: Path

    @property
    def metrics(self) -> Path:
        """Where it counts, so that the supervisor, or any worker (ModelStatistics), can tell the sum."""
        return metrics_folder(self.folder)

    def to_message(self) -> dict[str, Any]:
        """As a message."""
        return {"settings": self.settings.to_json(), "worker": self.worker, "folder": str(self.folder)}

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> Self:
        """What `to_message` gave."""
        return cls(Settings.from_json(message["settings"]), message["worker"], Path(message["folder"]))


def metrics_folder(folder: Path) -> Path:
    """Where the workers count, in the folder that they share."""
    return folder / "metrics"
