"""A flight: one RPC that several calls wait for, who leaves it early, and who is to blame when it is refused."""

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

# What grpc says of a call of its own.
PASSED = "Deadline Exceeded"

# Fields that name one sequence of a request, and those that all of its calls have in common.
_SEQUENCE_FIELD = re.compile(r"(?:lengths|initial_states)\[(\d+)\]")
_COMMON_FIELDS = frozenset({"model", "version"})


class Waiter:
    """One call.

    Attributes:
        future: Its outcome; an error is a result too, so that nobody misses one that is never raised.
        flight: The RPC that it waits for, while it does.
    """

    __slots__ = ("batch", "deadline", "flight", "future")

    def __init__(self, batch: Batch, deadline: float, future: asyncio.Future[Classification | Exception]) -> None:
        self.batch = batch
        self.deadline = deadline
        self.future = future
        self.flight: Flight | None = None

    def expire(self) -> None:
        """Ends the wait at its deadline, with the words of a call of its own; the request goes on for the others."""
        if not self.future.done():
            self.future.set_result(DeadlineExceeded(PASSED))

    def settle(self, outcome: Classification | Exception) -> None:
        """Ends the wait, where it hasn't ended."""
        self.flight = None
        if not self.future.done():
            self.future.set_result(outcome)


class Flight:
    """One RPC and the calls that wait for it.

    Attributes:
        number: Counts the requests of a group; those made of a refused one have its number.
        task: Makes the RPC.
    """

    __slots__ = ("_staying", "number", "task", "waiters")

    def __init__(self, waiters: list[Waiter], number: int) -> None:
        self.waiters = waiters
        self.number = number
        self.task: asyncio.Task[None] | None = None
        self._staying = len(waiters)
        for waiter in waiters:
            waiter.flight = self

    def leave(self) -> None:
        """One of the calls has gone; the last one takes the RPC with it."""
        self._staying -= 1
        if not self._staying and self.task is not None:
            self.task.cancel()

    def settle(self, error: Exception) -> None:
        """Fails every call, each with an exception of its own."""
        for waiter in self.waiters:
            waiter.settle(copy.copy(error))


def pieces(waiters: list[Waiter], error: UnrollError) -> list[list[Waiter]]:
    """How to ask again after an error that can be one call's alone, so that it fails alone.

    Returns:
        The calls by request; none where the error is every call's.
    """
    if len(waiters) == 1 or not _is_about_one(error):
        return []
    culprit = _culprit(waiters, error)
    others = [waiter for waiter in waiters if waiter is not culprit]
    # Asked alone, it learns what is wrong with it in its own terms.
    return [*([[culprit]] if culprit else []), *halves(others)]


def halves(waiters: list[Waiter]) -> list[list[Waiter]]:
    """Two requests instead of one; a single call stays one."""
    middle = (len(waiters) + 1) // 2
    return [half for half in (waiters[:middle], waiters[middle:]) if half]


def _is_about_one(error: UnrollError) -> bool:
    """Whether one call of several can be to blame: for a bad value, or for what makes the request too large."""
    kinds = (InvalidArgument, FailedPrecondition, ResourceExhausted)
    return isinstance(error, kinds) and not any(field.field in _COMMON_FIELDS for field in error.fields)


def _culprit(waiters: Listing[Waiter], error: UnrollError) -> Waiter | None:
    """The call whose sequence the error names, where it names one."""
    for field in error.fields:
        if place := _SEQUENCE_FIELD.match(field.field):
            index = int(place[1])
            for waiter in waiters:
                index -= len(waiter.batch)
                if index < 0:
                    return waiter
    return None
