"""Messages between a supervisor and its workers: JSON objects, one a line, over a pair of sockets.

From the supervisor: the worker's `WorkerConfig` once, questions (relay.py), then `{"drain": true}`. From the worker:
`{"serving": MODELS}` or `{"failed": WHY}`, and answers. The end of the connection means that the other process ended.
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
"""Environment variable with the number of a worker's socket."""


class Channel:
    """One end of the connection. Made on the event loop that it is used on."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def on(cls, end: socket.socket) -> Self:
        """Takes over a connected socket."""
        return cls(*await asyncio.open_connection(sock=end, limit=LONGEST_LINE))

    @classmethod
    async def inherited(cls) -> Self:
        """Returns the channel to the supervisor that started this process."""
        return await cls.on(socket.socket(fileno=int(os.environ.pop(FD))))

    def send(self, **message: Any) -> None:
        """Sends a message; it is dropped if the other end has closed."""
        self._writer.write(json.dumps(message).encode() + b"\n")

    async def flush(self) -> None:
        """Waits until the messages sent have left this process, or the other end has closed."""
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    async def receive(self) -> dict[str, Any] | None:
        """Returns the next message; None once the other end has closed."""
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
class WorkerConfig:
    """Configuration of a worker, the first message that it gets.

    Attributes:
        settings: Settings of the server, with the port that all workers share.
        worker: Number of the worker, from 0.
        folder: Folder for the files of this supervisor's workers.
    """

    settings: Settings
    worker: int
    folder: Path

    @property
    def metrics(self) -> Path:
        """Folder of the metrics of all workers, which the supervisor and any worker (ModelStatistics) sum up."""
        return metrics_folder(self.folder)

    def to_message(self) -> dict[str, Any]:
        """Returns the message."""
        return {"settings": self.settings.to_json(), "worker": self.worker, "folder": str(self.folder)}

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> Self:
        """Reads a message of `to_message`."""
        return cls(Settings.from_json(message["settings"]), message["worker"], Path(message["folder"]))


def metrics_folder(folder: Path) -> Path:
    """Returns the folder of the workers' metrics, inside the folder that they share."""
    return folder / "metrics"
