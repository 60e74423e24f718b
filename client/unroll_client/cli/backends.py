"""Backends of `unroll classify`: what computes the classes of blocks of sequences. A server is one."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import chain, repeat
from typing import NamedTuple, Protocol, TypeVar

from unroll_client._async_client import AsyncClient
from unroll_client._errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, Unavailable
from unroll_client._types import Classification, ModelInfo
from unroll_client.cli.options import Server
from unroll_proto.sequences import Block

T = TypeVar("T")


class BlockSize(NamedTuple):
    """Most sequences of a block, and most numbers; a longer sequence is alone."""

    sequences: int
    values: int


class Backend(Protocol):
    """Classifies blocks by one version of one model."""

    @property
    def block_size(self) -> BlockSize:
        """Size of a block: large enough to make the cost of a call small, small enough to show progress."""
        ...

    @property
    def name(self) -> str:
        """Name of the model."""
        ...

    @property
    def version(self) -> int:
        """Version of the model."""
        ...

    @property
    def input_size(self) -> int:
        """Features of a timestep."""
        ...

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Name of each of them."""
        ...

    @property
    def class_labels(self) -> tuple[str, ...]:
        """Class names by index."""
        ...

    async def classify(self, block: Block) -> Classification:
        """Classifies the sequences of a block of `input_size` features; several calls may run at once.

        Raises:
            RefusedSequenceError: one of them can't be computed.
            UnrollError: the server failed.
        """
        ...


class RefusedSequenceError(Exception):
    """A sequence can't be computed.

    Attributes:
        index: Its index in the block.
        reason: The problem.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"sequence {index}: {reason}")
        self.index = index
        self.reason = reason


class ServerBackend:
    """A model version of a server.

    Args:
        client: Calls the server.
        model: The model version.
        wait: Seconds to try again while no server answers.
    """

    block_size = BlockSize(sequences=1024, values=1 << 19)

    def __init__(self, client: AsyncClient, model: ModelInfo, wait: float) -> None:
        self._client = client
        self._wait = wait
        self.name, self.version = model.name, model.version
        self.input_size, self.class_labels = model.input_size, model.class_labels
        self.feature_names = model.feature_names

    async def classify(self, block: Block) -> Classification:
        """See Backend."""
        arrays = [sequence.values for sequence in block]
        try:
            return await patiently(
                lambda: self._client.classify(arrays, model=self.name, version=self.version), self._wait
            )
        except InvalidArgument as error:
            for violation in error.fields:
                if place := re.fullmatch(r"sequences\[(\d+)\]", violation.field):
                    raise RefusedSequenceError(int(place[1]), violation.description) from None
            raise


async def patiently(call: Callable[[], Awaitable[T]], wait: float) -> T:
    """Makes a call again and again for `wait` seconds while no server answers or has room.

    Raises:
        UnrollError: as the call.
    """
    begin = time.monotonic()
    for pause in chain((0.2, 0.5, 1, 2, 5), repeat(10)):
        try:
            return await call()
        except (Unavailable, DeadlineExceeded, ResourceExhausted):
            left = begin + wait - time.monotonic()
            if left <= 0:
                raise
        await asyncio.sleep(min(pause, left))
    raise AssertionError


@asynccontextmanager
async def serving(server: Server, name: str, version: int, wait: float = 0) -> AsyncIterator[Backend]:
    """Yields the backend of a server's model.

    Args:
        server: The server.
        name: Name of the model; empty for the only one.
        version: Its version; 0 is the newest.
        wait: Seconds to wait while no server answers, now and later.

    Raises:
        UnrollError: the server does not answer, or has no such model.
    """
    async with server.client() as client:
        model = await patiently(lambda: client.model(name, version), wait)
    # The server has answered before, so from here on a restart is waited for.
    async with server.client(wait_for_ready=True) as client:
        yield ServerBackend(client, model, wait)
