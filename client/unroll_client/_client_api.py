"""ClientApi: the methods of a client that its sequences call."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Protocol

from unroll_client._errors import UnrollError
from unroll_client._stream import SharedStream
from unroll_client._types import ModelInfo


class ClientApi(Protocol):
    """The client of a sequence."""

    @property
    def closed(self) -> bool:
        """True if the client is closed."""

    @property
    def waits(self) -> bool:
        """True if calls wait for a server within their timeout instead of failing while there is none."""

    def explained(self, error: UnrollError) -> UnrollError:
        """Adds the proxy of the environment, if there is one, to an error without an answer."""

    def shared_stream(self) -> SharedStream:
        """Returns the stream for new sequences."""

    async def known_model(self, name: str, version: int) -> ModelInfo:
        """Returns a model version, from memory if it is known."""

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Starts a task that is cancelled when the client closes."""
