"""Requests shared by several classify calls: cancellation by call, and the split after a refusal."""

from __future__ import annotations

import asyncio
import copy
import re
from collections.abc import Sequence as Listing

from unroll_client._classify import Batch
from unroll_client._errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    UnrollError,
)
from unroll_client._types import Classification

# gRPC's own message.
DEADLINE_EXCEEDED = "Deadline Exceeded"

# Fields that name one sequence of a request, and fields that all of its calls share.
_SEQUENCE_FIELD = re.compile(r"(?:lengths|initial_states)\[(\d+)\]")
_COMMON_FIELDS = frozenset({"model", "version"})


class PendingCall:
    """A classify call that waits for its part of a request.

    Attributes:
        batch: Sequences of the call.
        deadline: Time of time.monotonic() by which the caller needs the result.
        future: The outcome. An error is set as a result, so that asyncio reports none as never retrieved.
        in_flight: The request that the call waits for; None before and after.
    """

    __slots__ = ("batch", "deadline", "future", "in_flight")

    def __init__(self, batch: Batch, deadline: float, future: asyncio.Future[Classification | Exception]) -> None:
        self.batch = batch
        self.deadline = deadline
        self.future = future
        self.in_flight: InFlightBatch | None = None

    def expire(self) -> None:
        """Fails the call at its deadline; the request continues for the others."""
        if not self.future.done():
            self.future.set_result(DeadlineExceeded(DEADLINE_EXCEEDED))

    def settle(self, outcome: Classification | Exception) -> None:
        """Sets the outcome, unless the call has one."""
        self.in_flight = None
        if not self.future.done():
            self.future.set_result(outcome)


class InFlightBatch:
    """A request in flight and the calls that wait for it.

    Attributes:
        calls: The calls, in the order of their sequences in the request.
        number: Number of the request in its group; the parts of a refused request keep its number.
        task: Task that makes the RPC.
    """

    __slots__ = ("_staying", "calls", "number", "task")

    def __init__(self, calls: list[PendingCall], number: int) -> None:
        self.calls = calls
        self.number = number
        self.task: asyncio.Task[None] | None = None
        self._staying = len(calls)
        for call in calls:
            call.in_flight = self

    def leave(self) -> None:
        """Records that a caller stopped waiting; cancels the RPC once all have."""
        self._staying -= 1
        if not self._staying and self.task is not None:
            self.task.cancel()

    def settle(self, error: Exception) -> None:
        """Fails every call with its own copy of an error."""
        for call in self.calls:
            call.settle(copy.copy(error))


def retries(calls: list[PendingCall], error: UnrollError) -> list[list[PendingCall]]:
    """Splits a refused request so that a call at fault fails alone.

    Returns:
        The calls of each new request; empty if the error concerns every call.
    """
    if len(calls) == 1 or not _is_about_one(error):
        return []
    culprit = _culprit(calls, error)
    others = [call for call in calls if call is not culprit]
    # Sent alone, it gets an error with the indices of its own sequences.
    return [*([[culprit]] if culprit else []), *halves(others)]


def halves(calls: list[PendingCall]) -> list[list[PendingCall]]:
    """Splits calls into two lists; a single call stays one."""
    middle = (len(calls) + 1) // 2
    return [half for half in (calls[:middle], calls[middle:]) if half]


def _is_about_one(error: UnrollError) -> bool:
    """True if one call of several can be at fault: for a bad value, or for the size of the request."""
    kinds = (InvalidArgument, FailedPrecondition, ResourceExhausted)
    return isinstance(error, kinds) and not any(field.field in _COMMON_FIELDS for field in error.fields)


def _culprit(calls: Listing[PendingCall], error: UnrollError) -> PendingCall | None:
    """Returns the call whose sequence the error names; None if it names none."""
    for field in error.fields:
        if place := _SEQUENCE_FIELD.match(field.field):
            index = int(place[1])
            for call in calls:
                index -= len(call.batch)
                if index < 0:
                    return call
    return None
