"""Coalescing: concurrent classify calls share a request, and each gets the result of a request of its own."""

from __future__ import annotations

import asyncio
import copy
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable

from unroll_client._arrays import FLOAT32
from unroll_client._classify import Batch, decode, message_room
from unroll_client._errors import DeadlineExceeded, ResourceExhausted, Unavailable, UnrollError
from unroll_client._in_flight import DEADLINE_EXCEEDED, InFlightBatch, PendingCall, halves, retries
from unroll_client._types import Classification, ModelInfo
from unroll_proto.v1 import unroll_pb2 as pb

# Requests of one kind in flight before calls are gathered: one is computed while another one travels.
IN_FLIGHT = 2
# The same for full requests, which gain nothing by waiting.
FULL_IN_FLIGHT = 16
# Bounds of a gathered request: large enough to make the RPC's cost small, small enough to answer the first call soon.
REQUEST_SEQUENCES = 128
REQUEST_BYTES = 1 << 20
# A call over one of these bounds gets an RPC of its own; others that shared it would wait for it.
CALL_STEPS = 1024
CALL_BYTES = 1 << 16

# Makes one RPC before a deadline in seconds of time.monotonic(), without retries; raises UnrollError.
Rpc = Callable[[pb.ClassifyRequest, float], Awaitable[pb.ClassifyResponse]]

# Model, version, features, has initial states, wants final states. Calls with different numbers of features must not
# meet: their concatenated values could have the length that the server expects.
_Key = tuple[str, int, int, bool, bool]


class Coalescer:
    """Gathers the calls of one client, on the running event loop.

    There is no timer. Calls made in one iteration of the loop go together: at once while few requests are in flight,
    else when they fill a request or an answer arrives.

    Args:
        rpc: Makes one RPC.
        forget: Called when a shared request was refused, since outdated limits can be the cause.
    """

    def __init__(self, rpc: Rpc, forget: Callable[[], None]) -> None:
        self._rpc = rpc
        self._forget = forget
        self._groups: dict[_Key, _Group] = {}

    @staticmethod
    def takes(batch: Batch, info: ModelInfo) -> bool:
        """True if a call is small enough to share a request and within the server's limits."""
        ragged, limits = batch.ragged, info.limits
        return (
            0 < len(ragged.values) <= min(CALL_BYTES, CALL_STEPS * ragged.features * FLOAT32.itemsize)
            and len(ragged.lengths) <= (limits.max_sequences or math.inf)
            and max(ragged.lengths) <= (limits.max_steps or math.inf)
            and batch.size <= min(REQUEST_BYTES, message_room(limits))
        )

    async def classify(
        self, batch: Batch, model: str, version: int, info: ModelInfo, deadline: float
    ) -> Classification:
        """Classifies a batch for which `takes` is true, before a deadline in seconds of `time.monotonic()`.

        Raises:
            UnrollError: the error that a request of its own would have raised.
        """
        if deadline <= time.monotonic():
            raise DeadlineExceeded(DEADLINE_EXCEEDED)
        loop = asyncio.get_running_loop()
        key = (model, version, batch.ragged.features, bool(batch.states), batch.return_final_states)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(key, self._rpc, self._forget, self._groups)
        call = PendingCall(batch, deadline, loop.create_future())
        timer = None if math.isinf(deadline) else loop.call_later(deadline - time.monotonic(), call.expire)
        group.add(call, info)
        try:
            outcome = await call.future
        finally:
            if timer is not None:
                timer.cancel()
            if call.in_flight is not None:
                call.in_flight.leave()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def close(self) -> None:
        """Cancels the requests in flight; pending calls fail with Unavailable."""
        groups = list(self._groups.values())
        await asyncio.gather(*(task for group in groups for task in group.close()), return_exceptions=True)


class _Group:
    """Calls that may share a request."""

    def __init__(self, key: _Key, rpc: Rpc, forget: Callable[[], None], groups: dict[_Key, _Group]) -> None:
        self._key = key
        self._rpc = rpc
        self._forget = forget
        self._groups = groups
        self._info: ModelInfo | None = None
        self._waiting: deque[PendingCall] = deque()
        self._waiting_sequences = 0
        self._waiting_bytes = 0
        self._most = REQUEST_SEQUENCES
        self._room = REQUEST_BYTES
        self._scheduled = False
        self._in_flight: set[InFlightBatch] = set()
        # Only requests sent after the last answered one count as in flight: one that was overtaken, because it is slow
        # or its replica hangs, delays nobody.
        self._sent = 0
        self._answered = 0

    def add(self, call: PendingCall, info: ModelInfo) -> None:
        """Queues a call; it is sent in the next iteration of the loop, or later."""
        if info is not self._info:
            self._info = info
            self._most = min(REQUEST_SEQUENCES, info.limits.max_sequences or REQUEST_SEQUENCES)
            self._room = min(REQUEST_BYTES, message_room(info.limits))
        self._waiting.append(call)
        self._waiting_sequences += len(call.batch)
        self._waiting_bytes += call.batch.size
        self._schedule()

    def close(self) -> list[asyncio.Task[None]]:
        """Fails every call; returns the tasks that are ending."""
        error = Unavailable("the client was closed")
        for call in self._waiting:
            call.settle(copy.copy(error))
        tasks = []
        for in_flight in self._in_flight:
            in_flight.settle(error)
            if in_flight.task is not None:
                in_flight.task.cancel()
                tasks.append(in_flight.task)
        return tasks

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._send)

    def _send(self) -> None:
        self._scheduled = False
        while self._waiting and self._sent - self._answered < (FULL_IN_FLIGHT if self._full() else IN_FLIGHT):
            if calls := self._gather():
                self._sent += 1
                self._launch(calls, self._sent)
        if not self._waiting and not self._in_flight:
            self._groups.pop(self._key, None)

    def _full(self) -> bool:
        return self._waiting_sequences >= self._most or self._waiting_bytes >= self._room

    def _gather(self) -> list[PendingCall]:
        """Removes the calls of one request from the queue, at least one, and drops those whose callers gave up."""
        calls: list[PendingCall] = []
        sequences, room = self._most, self._room
        while self._waiting:
            call = self._waiting[0]
            sequences -= len(call.batch)
            room -= call.batch.size
            if calls and (sequences < 0 or room < 0):
                break
            self._waiting.popleft()
            self._waiting_sequences -= len(call.batch)
            self._waiting_bytes -= call.batch.size
            if call.future.done():
                sequences += len(call.batch)
                room += call.batch.size
            else:
                calls.append(call)
        return calls

    def _launch(self, calls: list[PendingCall], number: int) -> None:
        in_flight = InFlightBatch(calls, number)
        self._in_flight.add(in_flight)
        in_flight.task = asyncio.get_running_loop().create_task(self._run(in_flight))

    async def _run(self, in_flight: InFlightBatch) -> None:
        try:
            await self._ask(in_flight.calls)
        except UnrollError as error:
            for calls in await self._refused(in_flight, error):
                self._launch(calls, in_flight.number)
        except asyncio.CancelledError:
            in_flight.settle(Unavailable("the call was cancelled"))
            raise
        except Exception as error:
            in_flight.settle(error)
        finally:
            self._in_flight.discard(in_flight)
            self._answered = max(self._answered, in_flight.number)
            self._schedule()

    async def _ask(self, calls: list[PendingCall]) -> None:
        model, version, _, _, with_states = self._key
        request = pb.ClassifyRequest(
            model=model,
            version=version,
            lengths=[length for call in calls for length in call.batch.ragged.lengths],
            values=b"".join([call.batch.ragged.values for call in calls]),
            initial_states=[state for call in calls for state in call.batch.states],
            return_final_states=with_states,
        )
        answer = await self._rpc(request, max(call.deadline for call in calls))
        assert self._info is not None
        result = decode(answer, len(request.lengths), self._info, with_states)
        start = 0
        for call in calls:
            end = start + len(call.batch)
            call.settle(result if len(calls) == 1 else _rows(result, start, end))
            start = end

    async def _refused(self, in_flight: InFlightBatch, error: UnrollError) -> list[list[PendingCall]]:
        """Fails the calls that an error concerns; returns the calls of each request to send instead."""
        pause = error.retry_after if isinstance(error, ResourceExhausted) else None
        if pause is not None:
            for call in in_flight.calls:
                if pause >= call.deadline - time.monotonic():
                    call.settle(copy.copy(error))
            await asyncio.sleep(pause)
            # The server may never have room for all of them at once.
            again = halves(in_flight.calls)
        else:
            again = retries(in_flight.calls, error)
            if again:
                self._forget()
            else:
                in_flight.settle(error)
        staying = [[call for call in piece if not call.future.done()] for piece in again]
        return [piece for piece in staying if piece]


def _rows(result: Classification, start: int, end: int) -> Classification:
    """Copies the rows of some sequences, so that a kept result does not keep the whole response alive."""
    states = result.final_states
    return Classification(
        labels=result.labels[start:end],
        label_indices=result.label_indices[start:end].copy(),
        probabilities=result.probabilities[start:end].copy(),
        logits=result.logits[start:end].copy(),
        final_states=None if states is None else states[start:end],
        model=result.model,
        version=result.version,
    )
