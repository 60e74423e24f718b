"""Coalescer: classify calls of the same moment share one request, and each gets what it would have got alone."""

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
from unroll_client._flight import PASSED, Flight, Waiter, halves, pieces
from unroll_client._types import Classification, ModelInfo
from unroll_proto.v1 import unroll_pb2 as pb

# Requests of one kind that are under way before calls are gathered: one is computed while others travel.
IN_FLIGHT = 2
# The same for requests that are full, since waiting makes them no better.
FULL_IN_FLIGHT = 16
# What one request gathers at most: enough to make the RPC's own cost small, little enough to answer the first soon.
REQUEST_SEQUENCES = 128
REQUEST_BYTES = 1 << 20
# A call over one of these is worth an RPC of its own, and would keep those that share it waiting.
CALL_STEPS = 1024
CALL_BYTES = 1 << 16

# Makes one RPC by a time of time.monotonic(), without trying again where the server says when; raises UnrollError.
Rpc = Callable[[pb.ClassifyRequest, float], Awaitable[pb.ClassifyResponse]]

# Model, version, features, whether there are initial states, whether final states are wanted. Calls of different
# numbers of features must not meet: end to end, their values could add up to what the server expects.
_Key = tuple[str, int, int, bool, bool]


class Coalescer:
    """Gathers the calls of one client, on the running event loop.

    There is no timer. The calls of one iteration of the loop go together, at once while few requests are under way;
    else they wait with those that follow, until they fill a request or an answer comes.

    Args:
        rpc: Makes one RPC.
        forget: Told when a shared request was refused, since the limits that are remembered may be why.
    """

    def __init__(self, rpc: Rpc, forget: Callable[[], None]) -> None:
        self._rpc = rpc
        self._forget = forget
        self._groups: dict[_Key, _Group] = {}

    @staticmethod
    def takes(batch: Batch, info: ModelInfo) -> bool:
        """Whether a call is small enough to share a request, and within the server's limits."""
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
        """Classifies what `takes` takes, by a time of time.monotonic().

        Raises:
            UnrollError: what a call of its own would have raised.
        """
        if deadline <= time.monotonic():
            raise DeadlineExceeded(PASSED)
        loop = asyncio.get_running_loop()
        key = (model, version, batch.ragged.features, bool(batch.states), batch.return_final_states)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(key, self._rpc, self._forget, self._groups)
        waiter = Waiter(batch, deadline, loop.create_future())
        timer = None if math.isinf(deadline) else loop.call_later(deadline - time.monotonic(), waiter.expire)
        group.add(waiter, info)
        try:
            outcome = await waiter.future
        finally:
            if timer is not None:
                timer.cancel()
            if waiter.flight is not None:
                waiter.flight.leave()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def close(self) -> None:
        """Ends all that is under way; what waits fails with Unavailable."""
        groups = list(self._groups.values())
        await asyncio.gather(*(task for group in groups for task in group.close()), return_exceptions=True)


class _Group:
    """The calls that may share a request."""

    def __init__(self, key: _Key, rpc: Rpc, forget: Callable[[], None], groups: dict[_Key, _Group]) -> None:
        self._key = key
        self._rpc = rpc
        self._forget = forget
        self._groups = groups
        self._info: ModelInfo | None = None
        self._waiting: deque[Waiter] = deque()
        self._waiting_sequences = 0
        self._waiting_bytes = 0
        self._most = REQUEST_SEQUENCES
        self._room = REQUEST_BYTES
        self._scheduled = False
        self._flights: set[Flight] = set()
        # Requests are under way that were sent after the last one that was answered: one that was overtaken, as it
        # is slow or its replica hangs, holds up nobody.
        self._sent = 0
        self._answered = 0

    def add(self, waiter: Waiter, info: ModelInfo) -> None:
        """Takes a call; it goes when the loop comes round, or later."""
        if info is not self._info:
            self._info = info
            self._most = min(REQUEST_SEQUENCES, info.limits.max_sequences or REQUEST_SEQUENCES)
            self._room = min(REQUEST_BYTES, message_room(info.limits))
        self._waiting.append(waiter)
        self._waiting_sequences += len(waiter.batch)
        self._waiting_bytes += waiter.batch.size
        self._schedule()

    def close(self) -> list[asyncio.Task[None]]:
        """Fails every call; returns the tasks that are ending."""
        error = Unavailable("the client was closed")
        for waiter in self._waiting:
            waiter.settle(copy.copy(error))
        tasks = []
        for flight in self._flights:
            flight.settle(error)
            if flight.task is not None:
                flight.task.cancel()
                tasks.append(flight.task)
        return tasks

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._send)

    def _send(self) -> None:
        self._scheduled = False
        while self._waiting and self._sent - self._answered < (FULL_IN_FLIGHT if self._full() else IN_FLIGHT):
            if waiters := self._gather():
                self._sent += 1
                self._launch(waiters, self._sent)
        if not self._waiting and not self._flights:
            self._groups.pop(self._key, None)

    def _full(self) -> bool:
        return self._waiting_sequences >= self._most or self._waiting_bytes >= self._room

    def _gather(self) -> list[Waiter]:
        """Takes what one request holds, at least one call, without those that have gone."""
        waiters: list[Waiter] = []
        sequences, room = self._most, self._room
        while self._waiting:
            waiter = self._waiting[0]
            sequences -= len(waiter.batch)
            room -= waiter.batch.size
            if waiters and (sequences < 0 or room < 0):
                break
            self._waiting.popleft()
            self._waiting_sequences -= len(waiter.batch)
            self._waiting_bytes -= waiter.batch.size
            if waiter.future.done():
                sequences += len(waiter.batch)
                room += waiter.batch.size
            else:
                waiters.append(waiter)
        return waiters

    def _launch(self, waiters: list[Waiter], number: int) -> None:
        flight = Flight(waiters, number)
        self._flights.add(flight)
        flight.task = asyncio.get_running_loop().create_task(self._fly(flight))

    async def _fly(self, flight: Flight) -> None:
        try:
            await self._ask(flight.waiters)
        except UnrollError as error:
            for waiters in await self._refused(flight, error):
                self._launch(waiters, flight.number)
        except asyncio.CancelledError:
            flight.settle(Unavailable("the call was cancelled"))
            raise
        except Exception as error:
            flight.settle(error)
        finally:
            self._flights.discard(flight)
            self._answered = max(self._answered, flight.number)
            self._schedule()

    async def _ask(self, waiters: list[Waiter]) -> None:
        model, version, _, _, with_states = self._key
        request = pb.ClassifyRequest(
            model=model,
            version=version,
            lengths=[length for waiter in waiters for length in waiter.batch.ragged.lengths],
            values=b"".join([waiter.batch.ragged.values for waiter in waiters]),
            initial_states=[state for waiter in waiters for state in waiter.batch.states],
            return_final_states=with_states,
        )
        answer = await self._rpc(request, max(waiter.deadline for waiter in waiters))
        assert self._info is not None
        result = decode(answer, len(request.lengths), self._info, with_states)
        start = 0
        for waiter in waiters:
            end = start + len(waiter.batch)
            waiter.settle(result if len(waiters) == 1 else _rows(result, start, end))
            start = end

    async def _refused(self, flight: Flight, error: UnrollError) -> list[list[Waiter]]:
        """Fails the calls that an error is about; returns those to ask for again, by request."""
        pause = error.retry_after if isinstance(error, ResourceExhausted) else None
        if pause is not None:
            for waiter in flight.waiters:
                if pause >= waiter.deadline - time.monotonic():
                    waiter.settle(copy.copy(error))
            await asyncio.sleep(pause)
            # There may never be room for all of them at a time.
            again = halves(flight.waiters)
        else:
            again = pieces(flight.waiters, error)
            if again:
                self._forget()
            else:
                flight.settle(error)
        staying = [[waiter for waiter in piece if not waiter.future.done()] for piece in again]
        return [piece for piece in staying if piece]


def _rows(result: Classification, start: int, end: int) -> Classification:
    """Some of a result's sequences; copies, so that keeping one answer keeps no others."""
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
