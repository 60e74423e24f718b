"""ClientApi: the parts of a client that its sequences share."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from unroll_client._calls import Calls
from unroll_client._errors import UnrollError
from unroll_client._models import Models
from unroll_client._proxy import explained
from unroll_client._stream import SharedStream
from unroll_client._tracing import traced_stream
from unroll_client._types import ModelInfo


class ClientApi:
    """The streams of a client, and what its sequences need of its calls and models.

    Args:
        calls: Calls of the client.
        models: Models of the client.
        targets: Targets of the client.
    """

    def __init__(self, calls: Calls, models: Models, targets: tuple[str, ...]) -> None:
        self._calls = calls
        self._models = models
        self._targets = targets
        self._streams: list[SharedStream] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def closed(self) -> bool:
        """True if the client is closed."""
        return self._calls.closed

    @property
    def waits(self) -> bool:
        """True if calls wait for a server within their timeout instead of failing while there is none."""
        return self._calls.wait_for_ready

    def explained(self, error: UnrollError) -> UnrollError:
        """Adds to an error without an answer the proxy of the environment, if there is one."""
        return error if self.closed else explained(error, self._targets)

    def shared_stream(self) -> SharedStream:
        """Returns the stream for new sequences; a new one if there is none or it is lost."""
        self._streams = [stream for stream in self._streams if not stream.ended]
        for stream in self._streams:
            if stream.usable:
                return stream
        servers = self._calls.servers()
        # With several servers, the one to wait for may never come back.
        wait = self._calls.wait_for_ready and len(servers) == 1
        call = traced_stream(servers.next().Unroll, self._calls.metadata, wait)
        self._streams.append(SharedStream(call))
        return self._streams[-1]

    async def known_model(self, name: str, version: int) -> ModelInfo:
        """Returns a served model version, from memory if it is known."""
        return await self._models.find(name, version, self._calls.deadline(None))

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Starts a task that is cancelled when the client closes."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Cancels the tasks and ends the streams; open sequences fail."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(stream.close() for stream in self._streams))
        self._streams.clear()
