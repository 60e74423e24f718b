"""The bidirectional RPC that carries the sequences of a client: one task writes, one reads and distributes."""

from __future__ import annotations

import asyncio
import copy
from contextlib import suppress
from typing import Protocol

import grpc

from unroll_client._errors import Internal, Unavailable, UnrollError, from_rpc_error
from unroll_client._outbox import Outbox
from unroll_proto.v1 import unroll_pb2 as pb

Call = grpc.aio.StreamStreamCall[pb.UnrollRequest, pb.UnrollResponse]


class Route(Protocol):
    """A sequence that shares the stream."""

    def receive(self, response: pb.UnrollResponse) -> None:
        """Processes one answer."""

    def lose(self, error: UnrollError) -> None:
        """Records that there will be no more answers."""


class SharedStream:
    """One Unroll RPC, on the running event loop.

    Only its tasks use the RPC. grpc.aio cancels an RPC when a read or write of it is cancelled, and one caller's
    cancellation must not end the others' sequences.
    """

    def __init__(self, call: Call) -> None:
        self._call: Call | None = call
        self._routes: dict[str, Route] = {}
        self._keys = 0
        self._outbox = Outbox()
        self._filled = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._retired = False
        self._ended: UnrollError | None = None
        self._reader = asyncio.create_task(self._read(call))
        self._writer = asyncio.create_task(self._write_until_cancelled(call))

    @property
    def usable(self) -> bool:
        """True if new sequences can be opened on the stream."""
        return self._ended is None and not self._retired

    @property
    def ended(self) -> bool:
        """True if the RPC has ended."""
        return self._ended is not None

    def retire(self) -> None:
        """Refuses new sequences, since the server drains or hangs; open ones continue."""
        self._retired = True
        self._end_if_deserted()

    def register(self, route: Route) -> str:
        """Adds a sequence and returns its key."""
        self._keys += 1
        key = str(self._keys)
        self._routes[key] = route
        return key

    def release(self, key: str) -> None:
        """Removes a sequence; later answers to it are dropped."""
        self._routes.pop(key, None)
        self._end_if_deserted()

    async def room(self) -> None:
        """Waits until there is room for one more message.

        Raises:
            UnrollError: the stream ended.
        """
        while self._ended is None and not self._room.is_set():
            await self._room.wait()
        if self._ended is not None:
            raise copy.copy(self._ended)

    def put(self, message: pb.UnrollRequest) -> None:
        """Hands a message to the writer, without waiting."""
        if self._ended is None:
            self._outbox.put(message)
            self._filled.set()
            if self._outbox.full:
                self._room.clear()

    async def close(self) -> None:
        """Ends the RPC; open sequences fail."""
        call = self._call
        self._end(Unavailable("the client was closed"))
        if call is not None:
            call.cancel()
        await asyncio.gather(self._reader, self._writer, return_exceptions=True)

    async def _write(self, call: Call) -> None:
        while self._ended is None:
            if not self._outbox:
                self._filled.clear()
                await self._filled.wait()
                continue
            message = self._outbox.take()
            if not self._outbox.full:
                self._room.set()
            try:
                await call.write(message)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # The reader gets the cause.

    async def _write_until_cancelled(self, call: Call) -> None:
        # A cancelled task keeps the call alive until garbage collection; a task that returns does not.
        with suppress(asyncio.CancelledError):
            await self._write(call)

    async def _read(self, call: Call) -> None:
        error: UnrollError = Unavailable("the server ended the stream")
        try:
            # read() would drop answers that have arrived already after a failed write.
            async for response in call:
                if response.HasField("steps_batch"):
                    self._receive_batch(response.steps_batch)
                    continue
                if response.HasField("opened"):
                    self._outbox.max_batch_bytes = response.opened.max_chunks_bytes
                self._receive(response)
        except UnrollError as failure:
            error = failure
            call.cancel()
        except grpc.aio.AioRpcError as failure:
            error = from_rpc_error(failure)
            if failure.code() is grpc.StatusCode.CANCELLED:
                error = Unavailable(f"the stream was cancelled: {error.message}")
        except asyncio.CancelledError:
            error = Unavailable("the stream was cancelled")
        finally:
            self._end(error)

    def _receive(self, response: pb.UnrollResponse) -> None:
        route = self._routes.get(response.key)
        if route is not None:
            route.receive(response)

    def _receive_batch(self, batch: pb.StepsBatch) -> None:
        """Passes the answers of several sequences on, as if each had come by itself."""
        fields = (batch.keys, batch.first_steps, batch.counts, batch.states, batch.logits)
        if len({len(field) for field in fields}) > 1:
            raise Internal("the server's answer can't be read: fields of different lengths in steps_batch")
        for key, first_step, count, states, logits in zip(*fields, strict=True):
            steps = pb.Steps(first_step=first_step, count=count, states=states, logits=logits)
            self._receive(pb.UnrollResponse(key=key, steps=steps))

    def _end_if_deserted(self) -> None:
        if self._retired and not self._routes and self._call is not None:
            self._call.cancel()

    def _end(self, error: UnrollError) -> None:
        if self._ended is not None:
            return
        self._ended = error
        # A write to an RPC that is cancelled before it is connected never returns.
        self._writer.cancel()
        # A call keeps its connection alive, even if closed; a kept sequence must not.
        self._call = None
        self._outbox.clear()
        self._filled.set()
        self._room.set()
        routes, self._routes = self._routes, {}
        for route in routes.values():
            route.lose(copy.copy(error))
