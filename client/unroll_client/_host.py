"""Host: what a sequence needs of the client that it belongs to."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Protocol

from unroll_client._errors import UnrollError
from unroll_client._stream import SharedStream
from unroll_client._types import ModelInfo


class Host(Protocol):
    """A client."""

    @property
    def closed(self) -> bool:
        """Whether it is closed."""

    @property
    def waits(self) -> bool:
        """Whether it waits for a server within the timeout, rather than fail while there is none."""

    def explained(self, error: UnrollError) -> UnrollError:
        """Adds to an error of no answer which proxy is in between, if one is."""

    def shared_stream(self) -> SharedStream:
        """The RPC on which new sequences are opened."""

    async def known_model(self, name: str, version: int) -> ModelInfo:
        """Looks a model version up, at best in memory."""

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs something until the client is closed."""
